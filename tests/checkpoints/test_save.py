"""Folders: whole or absent, weights of the average, types."""

import pytest
import torch
from safetensors.torch import load_file

from dlm.checkpoints.save import save_model
from dlm.models.configuration import LLaDAConfig
from dlm.models.transformer import LLaDAModelLM
from dlm.training.state import checkpoints, step_folder
from dlm.utils.files import MARKER, whole_folder


def tiny_model():
    torch.manual_seed(0)
    return LLaDAModelLM(
        LLaDAConfig(
            d_model=16, n_heads=2, n_layers=1, mlp_hidden_size=32, vocab_size=24, weight_tying=True, mask_token_id=23,
            eos_token_id=22, pad_token_id=22,
        )
    )  # fmt: skip


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with whole_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    with pytest.raises(KeyError), whole_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("2")
        raise KeyError
    assert (tmp_path / "a" / "x").read_text() == "1" and len(list(tmp_path.iterdir())) == 1
    with whole_folder(tmp_path / "a") as temporary:
        (temporary / "y").write_text("3")
    assert sorted(child.name for child in (tmp_path / "a").iterdir()) == [MARKER, "y"]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = [".a-0123456789ab", ".a-old-0123456789ab"]
    others = [".a", ".ab-0123456789ab", ".a-notes", "a-0123456789ab"]
    for name in left + others:
        (tmp_path / name).mkdir()
    with whole_folder(tmp_path / "a"):
        assert (tmp_path / left[1]).exists()  # the one before stays until the new one is there
    assert {child.name for child in tmp_path.iterdir()} == {"a", *others}


def test_only_folders_of_steps_are_checkpoints(tmp_path):
    for step in (2, 10):
        step_folder(tmp_path, step).mkdir(parents=True)
    for name in (".step-00000004.partial", "step-00000006.damaged", "step-7", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-00000008").write_text("no folder")
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 10]
    assert checkpoints(tmp_path / "nothing") == []


def test_saved_average_loads_again(tmp_path):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = {name: p + 1 for name, p in before.items()}
    save_model(model, tmp_path / "m", weights=average, dtype=torch.bfloat16, notes={"steps": 3})
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 for t in stored.values())
    loaded = LLaDAModelLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, average[name].bfloat16().float())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert '"steps": 3' in (tmp_path / "m" / "training.json").read_text()


def test_weights_of_another_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="another model"):
        save_model(tiny_model(), tmp_path / "m", weights={"x": torch.zeros(1)})
    assert not (tmp_path / "m").exists()
