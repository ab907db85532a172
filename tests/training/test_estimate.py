"""Time and memory: operations and weights counted on a model, a published cost, what a tracker and a log are given."""

import importlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from dlm.cli.main import main as dlm_main
from dlm.models.configuration import LLaDAConfig
from dlm.models.flops import PEAKS, block_parameters, parameters, peak_flops, training_flops
from dlm.models.transformer import LLaDAModelLM
from dlm.training import logging, state
from dlm.training.accelerator import checkpoint_activations
from dlm.training.estimate import LLADA_8B, Work, activation_bytes, adapter_parameters, estimate, work_of
from dlm.training.logging import Display, start_tracker, tracker_of
from dlm.training.lora import TARGETS, add_lora
from dlm.training.state import checkpoints
from dlm.utils.progress import duration
from tests.helpers.ranks import settings, tiny_data
from tests.helpers.training import fresh_accelerate, train, weights

CONFIGS = Path("train/configs")
FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
assert fresh_accelerate  # a fixture for every test here


def model_of(tying=False, **changes):
    torch.manual_seed(0)
    shape = {"d_model": 64, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 128, "vocab_size": 96, **changes}
    config = LLaDAConfig(
        **shape, weight_tying=tying, mask_token_id=1, eos_token_id=2, pad_token_id=2, max_sequence_length=128,
        init_fn="normal",
    )  # fmt: skip
    return LLaDAModelLM(config)


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"attention_layer_norm": True, "n_layers": 3}])
def test_weights_are_counted_exactly(tying, changes):
    model = model_of(tying, **changes)
    assert parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_that_torch_counts(frozen):
    model = model_of(n_kv_heads=2)
    model.config._attn_implementation = "eager"  # products that the counter knows on a CPU
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not frozen or "wte" in name  # gradients must still flow through all layers
    tokens, keep = torch.randint(3, 96, (2, 32)), torch.zeros(2, 32, dtype=torch.bool)
    keep[:, ::2] = True
    with FlopCounterMode(display=False) as counter:
        model.predict(tokens, logits_to_keep=keep).sum().backward()
    assert counter.get_total_flops() == training_flops(model.config, 64, 32, 32, frozen=frozen)


def test_the_work_of_post_training_by_hand():
    """Preference: draws of policy and reference. GRPO: the sampler's passes, what is learned from, the reference."""
    assert work_of("sft") == Work(1, 0, 0)
    assert work_of("preference", draws=4) == Work(4, 4, 1, 4) and work_of("preference", draws=4, lora=True).copies == 0
    assert work_of("grpo", steps=16, passes=4, inner=2) == Work(8, 16 + 8 + 8, 1)
    assert work_of("grpo", steps=16, kl=False) == Work(1, 16, 0)
    assert work_of("distill", teacher_passes=2) == Work(1, 2, 1)
    config = model_of().config
    asked = {"tokens": 1000, "gpus": 1, "peak": 1e12, "mfu": 1.0, "width": 100, "rows": 2}
    plain, tuned = estimate(config, **asked), estimate(config, **asked, work=Work(2, 3, 1), lora=4)
    assert tuned.copies == 6 * parameters(config) and tuned.gradients < plain.gradients
    forward = training_flops(config, 1000, 100, 500) / 3
    wanted = 2 * training_flops(config, 1000, 100, 500, frozen=True) + 3 * forward
    assert tuned.flops == pytest.approx(wanted)


def test_adapters_are_counted_exactly():
    model = model_of(n_kv_heads=2)
    adapted = add_lora(model, 4, 8.0, TARGETS, 0)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert adapter_parameters(model.config, 4) == trained


def saved_bytes(layers, checkpointing=False, width=64):
    """Bytes a token that autograd keeps, without the weights and the bf16 copies that autocast makes of them."""
    model = model_of(n_layers=layers, d_model=128, mlp_hidden_size=256).train()
    if checkpointing:
        checkpoint_activations(model)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    held, sizes = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(tensor)  # so that no address is used twice
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.predict(torch.randint(3, 96, (1, width)))
    copies = 0 if checkpointing else 2 * block_parameters(model.config)
    return (sum(sizes.values()) - copies) / width


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_layer_are_what_autograd_keeps(checkpointing):
    counted = [
        activation_bytes(
            model_of(d_model=128, mlp_hidden_size=256, n_layers=n).config, 1, 0, checkpointing=checkpointing
        )
        for n in (3, 4)
    ]
    seen = saved_bytes(4, checkpointing) - saved_bytes(3, checkpointing)
    assert counted[1] - counted[0] == pytest.approx(seen, rel=0.05)


def test_logits_of_a_large_vocabulary_are_held_for_a_chunk_of_places():
    config = LLaDAConfig(**LLADA_8B)
    base = activation_bytes(config, 4096, 0, checkpointing=False)
    assert activation_bytes(config, 4096, 2048, checkpointing=False) - base == 2048 * 126_464 * 10
    assert activation_bytes(config, 4096, 2048, checkpointing=False, chunk=1061) - base == 1061 * 126_464 * 6
    found = estimate(config, tokens=1e9, gpus=1, peak=1e15, mfu=0.3, width=4096, rows=1)
    assert found.activations - base == 1061 * 126_464 * 6


def test_llada_8b_costs_what_was_published():
    """2.3T tokens in 0.13 million H800 hours (arXiv:2502.09992, section 3.1), within a quarter."""
    config = LLaDAConfig(**LLADA_8B)
    found = estimate(config, tokens=2.3e12, gpus=256, peak=PEAKS["H800"], mfu=0.3, width=4096, rows=1)
    assert found.parameters == pytest.approx(8.02e9, rel=0.001)
    assert found.gpu_hours == pytest.approx(0.13e6, rel=0.25)
    assert found.tokens_per_second * found.seconds == pytest.approx(2.3e12)


ROWS = "--gpu H100 --gpus 8 --sequence-length 1024 --rows 4 --activation-checkpointing --no-ema"


def test_the_tables_of_the_guide_are_what_the_command_says(capsys):
    """train/SCALING.md: memory in whole GB and tokens a second to three digits, of every recipe and of pretraining."""

    def said(options):
        assert dlm_main(["train", "--estimate", *options.split(), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return f"{found['memory'] / 1e9:.0f} GB", float(f"{found['tokens_per_second']:.3g}"), found["gpu_hours"]

    def number(cell):
        return float(cell.replace(",", ""))

    lines = Path("train/SCALING.md").read_text(encoding="utf-8").splitlines()
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    checked = 0
    for row in tables:
        if len(row) == 6 and row[0].startswith("LLaDA-8B"):
            more = " --objective block_diffusion" if "block" in row[0] else ""
            kind = f"--gpu {row[1].split()[-1]} --gpus 8 --tokens 1e9 {row[2].strip('`')}{more}"
            memory, speed, hours = said(kind)
            assert (row[3], row[5]) == (memory, f"{hours:.0f}") and number(row[4]) == pytest.approx(speed, rel=0.02)
            checked += 1
        elif len(row) == 5 and row[0].startswith("`") and row[0] != "`--recipe`":
            recipe = "--recipe " + row[0].split("`")[1] + (" --draws 8" if "8 draws" in row[0] else "")
            memory, speed, _ = said(f"{ROWS} {recipe} --sharding fsdp")
            assert (row[1].split(",")[0], number(row[3])) == (memory, speed)
            if "no-kl" in row[1]:
                assert said(f"{ROWS} {recipe} --sharding fsdp --no-kl")[0].split()[0] in row[1]
            if row[4]:
                memory, speed, _ = said(f"{ROWS} {recipe} --lora 32")
                assert (row[2], number(row[4])) == (memory, speed)
            checked += 1
    assert checked == 9


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_reads_its_yaml(path):
    """The command in a YAML's comment names the recipe whose settings it holds."""
    command = rf"(?:dlm train |train[/.])(\w+?)(?:\.py)? (?:\\\n#\s+)?--config train/configs/{path.name}"
    name = re.search(command, path.read_text(encoding="utf-8"))[1]
    assert importlib.import_module(f"train.{name}").parse(["--config", str(path)]).output


def test_sharding_and_checkpointing_save_what_they_should():
    config = LLaDAConfig(**LLADA_8B)

    def memory(**changes):
        return estimate(config, tokens=1e9, gpus=8, peak=1e15, mfu=0.3, width=4096, rows=1, **changes)

    plain, zero2, fsdp = memory(), memory(sharding="zero2"), memory(sharding="fsdp")
    size = plain.parameters
    assert (plain.weights, plain.gradients, plain.optimizer, plain.average) == (6 * size, 4 * size, 8 * size, 4 * size)
    assert zero2.weights == plain.weights and zero2.optimizer == plain.optimizer / 8 == fsdp.optimizer
    assert fsdp.weights == plain.weights / 8 and memory(ema=False).average == 0
    assert memory(optimizer="muon").optimizer == 4 * size
    assert memory(checkpointing=True).activations < 0.25 * plain.activations
    assert memory(blocks=1.0).flops > 2 * plain.flops * 0.9


def test_preferences_in_blocks_count_every_row_twice_and_every_draw(tmp_path, capsys):
    """Was: the model's blocks were not looked at, and the activations were those of one draw of the eight that one
    forward pass computes."""
    asked = {"tokens": 1000, "gpus": 1, "peak": 1e12, "mfu": 1.0, "width": 100, "rows": 2}
    config = model_of().config
    plain, blocks, both = (
        estimate(config, **asked, work=work_of("preference", draws=4), blocks=share) for share in (0.0, 1.0, 0.5)
    )
    one, two = (4 * (training_flops(config, t, w, 500) * 4 / 3) for t, w in ((1000, 100), (2000, 200)))
    assert (plain.flops, blocks.flops, both.flops) == pytest.approx((one, two, (one + two) / 2))
    assert plain.activations == activation_bytes(config, 4 * 2 * 100, 4 * 100, checkpointing=False)
    assert blocks.activations == activation_bytes(config, 2 * 4 * 2 * 100, 4 * 100, checkpointing=False)
    assert both.activations < blocks.activations
    model_of(block_length=4).config.save_pretrained(tmp_path)
    said = []
    for more in ([], ["--objective", "block_diffusion"], ["--objective", "diffusion"]):
        assert (
            dlm_main(["train", "--estimate", "--model", str(tmp_path), "--recipe", "preference", "--json", *more]) == 0
        )
        said.append(json.loads(capsys.readouterr().out)["flops"])
    assert said[0] == said[1] > 1.9 * said[2]


def test_the_command_prints_a_table_or_json(capsys, tmp_path):
    assert dlm_main(["train", "--estimate", "--gpu", "H800", "--gpus", "256", "--sharding", "fsdp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 97_500 < found["gpu_hours"] < 162_500 and found["memory"] < 80e9
    model_of().config.save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--tokens", "1e6", "--sequence-length", "64", "--n-layers", "3"]
    assert dlm_main(["train", "--estimate", *options]) == 0
    told = capsys.readouterr().out
    assert "GPU hours" in told and "memory on each GPU" in told


@pytest.mark.parametrize("family", sorted(path.name for path in FAMILIES.iterdir()))
def test_every_family_is_estimated_from_its_own_configuration(family, capsys):
    """A regression test: every config.json was read as LLaDA's, so that SDAR, LLaDA2 and converted models ended in a
    traceback and a mixture of experts was estimated as a dense model."""
    assert dlm_main(["train", "--estimate", "--model", str(FAMILIES / family), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with safe_open(FAMILIES / family / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if not name.endswith("bias")]  # noqa: SIM118
    assert found["parameters"] == sum(math.prod(shape) for shape in shapes)
    assert dlm_main(["train", "--estimate", "--model", str(FAMILIES / family), "--n-layers", "3"]) == 2
    assert "edit a copy of its config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "H10"], "is not known: one of"),
        (["--tokenz", "2"], "did you mean --tokens"),
        (["--gpus", "0"], "--gpus is 0: it must be above 0"),
        (["--mfu", "40"], "a share, above 0 and at most 1"),
        (["--model", "nowhere"], "nowhere is no folder with a config.json: give one"),
        (["--tokens", "nan"], "--tokens is nan: it must be above 0"),
        (["--rows", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_options_are_one_line(capsys, options, message):
    assert dlm_main(["train", "--estimate", *options]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


def test_devices_are_told_apart_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("Some Accelerator 9000") is None and peak_flops("NVIDIA H20") == 148e12


def test_mfu_is_the_share_of_the_peak():
    lines = []
    display = Display(lines.append, 0, 4, log_every=2, log_seconds=0.0, peak=1e12)
    assert display.add(1, 2.0, 10, 1.0, 2.0, [1e-3], 10, 1e12) is None
    record = display.add(2, 2.0, 10, 1.0, 2.0, [1e-3], 20, 1e12)
    assert record["mfu"] == pytest.approx(0.5) and "(50.0% MFU)" in lines[0]
    assert "mfu" not in Display(lines.append, 0, 1, log_every=1, log_seconds=0.0).add(1, 1.0, 1, 1.0, 1.0, [1.0], 1)


def test_the_time_left_of_a_resumed_run_is_what_its_own_pace_says(monkeypatch):
    """It once divided the seconds since the resume by the share of all seconds, and promised a quarter of the time."""
    clock, lines = iter(range(0, 1000, 10)), []
    monkeypatch.setattr(logging.time, "perf_counter", lambda: next(clock))
    display = Display(lines.append, 100, 10_000, log_every=1, log_seconds=0.0, unit="answers")
    for step in range(101, 104):  # ten seconds of a time of a thousand are 1%; a clock read more than once a step
        record = display.add(step, 1.0, 8, 1.0, 4.0, [1.0], 8 * step, time_share=0.5 + 0.01 * (step - 101))
    took = (display.first_share[0], record["seconds"])
    pace = (took[1] - took[0]) / 0.02
    assert lines[-1].endswith(f"left {duration(pace * 0.48)}") and pace * 0.48 > 900
    assert "2.0 answers/s" in lines[-1] and record["answers_per_s"] == 2 and record["answers"] == 824


def test_tensorboard_gets_what_the_log_gets(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, tracker="auto", valid=tiny_data(seed=1), valid_every=3, valid_rows=2)
    events = EventAccumulator(str(tmp_path / "dlm"))
    events.Reload()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    assert [event.step for event in events.Scalars("valid/bound")] == [3, 6]


def test_a_tracker_that_is_missing_is_left_out_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tracker_of(settings(tmp_path, tracker="auto")) is None
    with pytest.raises(ValueError, match="tracker is 'wandb', which is not installed"):
        tracker_of(settings(tmp_path, tracker="wandb"))
    with pytest.raises(ValueError, match="did you mean 'wandb'"):
        settings(tmp_path, tracker="wandbb")


def test_wandb_is_handed_to_accelerate(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    config = settings(tmp_path, tracker="wandb")
    assert tracker_of(config) == "wandb"
    seen = {}

    class Accelerator:
        log_with = ["wandb"]

        def init_trackers(self, name, config):
            seen.update(config, project=name)

    start_tracker(Accelerator(), config)
    assert seen["project"] == "dlm" and seen["max_steps"] == 6 and seen["block_length"] == "None"


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    save = state.save_file

    def full(tensors, path):
        if "00000004" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(ValueError, match=r"step 4 cannot be written.*No space left.*step-00000002.*--resume"):
        train(tmp_path)
    assert [step for step, _ in checkpoints(tmp_path)] == [2]
    assert not list((tmp_path / "checkpoints").glob(".step*"))
    monkeypatch.setattr(state, "save_file", save)
    _, result = train(tmp_path, resume=True)
    assert result.step == 6 and math.isfinite(result.seconds)


def test_fp16_trains_like_fp32_and_resumes_with_its_loss_scale(tmp_path):
    """The first steps overflow and are skipped until the scale fits, so the curves are compared by where they end."""
    fp16 = {"precision": "fp16", "optimizer": "adamw", "max_steps": 60, "checkpoint_every": 20, "batch_size": 2}
    half, _ = train(tmp_path / "half", **fp16)
    train(tmp_path / "parts", **fp16)
    for step, folder in checkpoints(tmp_path / "parts"):
        if step > 40:
            shutil.rmtree(folder)
    again, _ = train(tmp_path / "parts", **fp16, resume=True)
    assert torch.equal(weights(half), weights(again))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tmp_path / "whole", **{**fp16, "precision": "no"})
    last = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()][-10:]
        for name in ("half", "whole")
    ]
    assert sum(last[0]) == pytest.approx(sum(last[1]), rel=0.02) and math.isfinite(sum(last[0]))
    with pytest.raises(ValueError, match="muon is two"):
        settings(tmp_path, precision="fp16")
