"""What is refused before memory is taken and before hours are spent."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dlm.data.documents import Documents
from dlm.data.examples import Examples, fetch
from dlm.objectives.losses import OBJECTIVES
from dlm.training.checks import check_batch, check_folders, check_length, check_memory, check_new_model, check_targets
from dlm.training.config import RecipeConfig
from dlm.training.recipe import with_epochs
from dlm.utils.files import whole_folder
from tests.helpers.ranks import settings, tiny_data, tiny_model
from tests.helpers.training import fresh_accelerate, train

assert fresh_accelerate  # a fixture for every test here


def recipe(tmp_path, **changes):
    return RecipeConfig(**{"output": str(tmp_path / "run"), "data": str(tmp_path / "d.jsonl"), **changes})


def test_a_length_given_twice_is_refused():
    check_length(["--epochs", "3"])
    with pytest.raises(ValueError, match="--max-steps and --epochs both say"):
        check_length(["--epochs=3", "--max-steps", "4"])


def test_one_number_type_has_one_name(tmp_path):
    """Fault: --precision fp32 was refused, and --dtype float32 was not."""
    names = ("fp32", "float32", "no", "bf16", "bfloat16")
    assert [recipe(tmp_path, precision=name).precision for name in names] == ["no", "no", "no", "bf16", "bf16"]
    assert recipe(tmp_path, export_dtype="bf16").export_dtype == "bfloat16"


EXPORTS = ["own files", "output", "above the output", "model of the run", "source", "symlink", "file"]


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_that_would_replace_something_is_refused_before_training(tmp_path, kind):
    """Fault: --export deleted a folder of the user's own files, the run's own output, a symlink's target."""
    export, changes, message = tmp_path / "export", {}, "holds what dlm did not write"
    if kind == "own files":
        export.mkdir()
        (export / "thesis.txt").write_text("mine")
    elif kind == "output":
        export, message = tmp_path / "run", "holds the output"
    elif kind == "above the output":
        changes, message = {"output": str(export / "deep" / "run")}, "holds the output"
    elif kind == "model of the run":
        export, message = tmp_path / "run" / "model" / "x", "lies in what the run writes itself"
    elif kind == "source":
        changes, message = {"model": str(export)}, "holds .*export, which this run reads"
        with whole_folder(export) as temporary:
            (temporary / "config.json").write_text("{}")
    elif kind == "symlink":
        (tmp_path / "target").mkdir()
        export.symlink_to(tmp_path / "target")
        message = "is a symbolic link to"
    else:
        export.write_text("mine")
        message = "is a file"
    with pytest.raises(ValueError, match=message):
        check_folders(recipe(tmp_path, export=str(export), **changes))


def test_a_model_of_the_users_in_the_output_is_not_replaced(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "mine.txt").write_text("1")
    with pytest.raises(ValueError, match=r"model holds what dlm did not write \(mine.txt\)"):
        check_folders(recipe(tmp_path))


def test_sizes_are_known_before_memory(tmp_path):
    shape = {"d_model": 64, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": None}
    check_new_model(shape, 500)
    for name in ("d_model", "n_layers"):
        with pytest.raises(ValueError, match=r"make at least .* billion weights; .* GB in all: give a smaller shape"):
            check_new_model({**shape, name: 10**9}, 500)
    with pytest.raises(ValueError, match="n_heads is 0"):
        check_new_model({**shape, "n_heads": 0}, 500)
    config = settings(tmp_path)
    check_batch(config, 16, tiny_model(), 1)
    with pytest.raises(ValueError, match="rows of sequence_length 1000000000000 takes at least"):
        check_batch(config, 10**12, tiny_model(), 1)
    with pytest.raises(ValueError, match="batch_size 1000000000000 takes at least"):
        check_batch(settings(tmp_path, batch_size=10**12, accumulation=10**12), 16, SimpleNamespace(), 1)
    check_memory(2e9, "it takes", "less", memory=3e9)
    with pytest.raises(ValueError, match="it takes 4 GB, and there are 3 GB in all: less"):
        check_memory(4e9, "it takes", "less", memory=3e9)


def test_epochs_are_steps_and_many_are_said(tmp_path):
    data, told = tiny_data(), []
    made = with_epochs(recipe(tmp_path, epochs=2.0, batch_size=4, packing=False), data, told.append)
    assert made.max_steps == -(-2 * len(data) // 4) and "2" in told[0] and len(told) == 1
    with_epochs(recipe(tmp_path, max_steps=10**6, batch_size=4), data, told.append)
    assert "warning: max_steps 1000000 goes through the data" in told[-1]


def nothing_to_learn():
    tokens = np.arange(20, dtype=np.uint16)
    return Examples([Documents(tokens, np.array([0, 10, 20]), np.zeros(20, bool), None, 20)], 16)


def test_data_without_a_target_are_refused(tmp_path):
    """Fault: a run whose rows hold no target token reported loss 0.0000."""
    check_targets(tiny_data(), OBJECTIVES["diffusion"])
    with pytest.raises(ValueError, match="no token of 20 tokens in 2 examples carries loss"):
        check_targets(nothing_to_learn(), OBJECTIVES["diffusion"])
    single = Examples([Documents(np.arange(4, dtype=np.uint16), np.arange(5), np.ones(4, bool), None, 4)], 16)
    with pytest.raises(ValueError, match="carries loss"):  # a first token cannot be predicted from what is before it
        check_targets(single, OBJECTIVES["autoregressive"])


def test_a_step_without_a_target_has_no_loss(tmp_path, monkeypatch):
    """Fault: a step whose rows hold no target token was logged with loss 0.0."""
    from dlm.objectives import losses

    monkeypatch.setattr(losses.MaskedDiffusion, "targets", lambda self, batch: batch.target & (batch.epoch.max() > 9))
    monkeypatch.setattr("dlm.training.trainer.check_targets", lambda *_: None)
    told = []
    train(tmp_path, max_steps=1, report=told.append)
    [record] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert record["loss"] is None and "none of the tokens carried loss" in told[0]


def test_a_text_that_was_cut_does_not_end(tmp_path):
    """Fault: --random-length with --eos-padding longest trained end-of-text after an answer that was cut at random."""
    target = np.array([False, False, True, True, True, True])
    data = Examples([Documents(np.arange(6, dtype=np.uint16), np.array([0, 6]), target, None, 6)], 12)
    cut = whole = 0
    for epoch in range(40):
        batch = fetch(data, [[(epoch, 0)]], 22, random_length=0.7, seed=0, width=10, end_id=21)
        tokens = batch.tokens[0][batch.target[0]].tolist()
        assert (21 in tokens) == (tokens[:4] == [2, 3, 4, 5]), tokens
        whole, cut = whole + (21 in tokens), cut + (21 not in tokens)
    assert whole > 5 and cut > 5
