"""Several processes (gloo, on a CPU) and processes that are killed: the run is the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import dlm
from dlm.cli import main
from dlm.models.transformer import LLaDAModelLM
from dlm.training.sharding import check_sharding, keep_sums_exact
from dlm.training.state import checkpoints, read_state
from tests.helpers.ranks import ROOT, two
from tests.helpers.recipes import STORIES, assert_same_run, fresh, options, records, weights  # noqa: F401
from train import pretrain, sft

CONFIGS = ROOT / "train" / "configs" / "accelerate"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fsdp2_trains_resumes_and_exports_the_same_model(tmp_path, measured, tied):
    """Two sharded processes, loss in chunks; with tied weights also resumed, without; what they export generates."""
    one, two_parts = tmp_path / "one", tmp_path / "two"
    assert pretrain.main(options(tmp_path, "one", weight_tying=tied)) == 0
    script = Path(__file__).parents[1] / "helpers" / "sharded.py"
    two(
        [script, "pretrain", *options(tmp_path, "two", weight_tying=tied, tracker="auto", accumulation=2, loss_chunk=7)]
    )
    assert_same_run(one, two_parts, measured, f"1 process and 2 under FSDP2, {'tied' if tied else 'untied'}")
    if not tied:
        return
    [_, (_, last)] = checkpoints(two_parts)
    shutil.rmtree(last)  # as if killed after step 2
    two([script, "pretrain", *options(tmp_path, "two", resume=True)])
    assert_same_run(one, two_parts, measured, "1 process and 2 under FSDP2, resumed")
    assert main.main(["generate", "The cat", "--model", str(two_parts / "model"), "--gen-length", "8"]) == 0


LEAVING = """
import os, time, torch
from accelerate import PartialState
from dlm.utils.distributed import leave_processes
PartialState(cpu=True)
time.sleep(float(os.environ["RANK"]))
torch.distributed.all_reduce(torch.ones(3), async_op=True)  # in the first process it ends a second later
leave_processes()
leave_processes()
assert not PartialState._shared_state
"""


def test_a_process_leaves_with_a_sum_under_way():
    """Without leaving, Gloo's thread drops the tensor in an interpreter that is gone, and the process aborts."""
    two(["-c", LEAVING])


@pytest.mark.parametrize(
    ("kind", "version", "optimizers", "message"),
    [
        ("DEEPSPEED", 2, 2, "use optimizer adamw"),
        ("FSDP", 1, 1, "set fsdp_version to 2"),
        ("FSDP", 2, 2, "use optimizer adamw"),
    ],
)
def test_what_sharding_cannot_do_is_refused(kind, version, optimizers, message):
    accelerator = SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=version == 2)
    with pytest.raises(ValueError, match=message):
        check_sharding(accelerator, [None] * optimizers)
    accelerator.distributed_type = DistributedType.MULTI_GPU
    check_sharding(accelerator, [None, None])


@pytest.mark.parametrize(("precision", "reduced"), [("bf16", torch.float32), ("no", None)])
def test_gradients_are_summed_in_fp32_under_fsdp2(precision, reduced):
    plugin = SimpleNamespace(mixed_precision_policy=None)
    state = SimpleNamespace(fsdp_plugin=plugin)
    keep_sums_exact(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state), precision)
    assert getattr(plugin.mixed_precision_policy, "reduce_dtype", None) == reduced


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_understands_its_configurations(path):
    """Every key is one that Accelerate knows, and so are those of FSDP, which become options of the same name."""
    found = load_config_from_file(str(path))
    assert found.num_processes >= 1 and found.mixed_precision in ("no", "bf16")
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert all(f"--{key}" in known for key in [*found.fsdp_config, *found.deepspeed_config])
    if found.distributed_type == DistributedType.FSDP:
        assert found.fsdp_config["fsdp_version"] == 2 and found.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in (
            LLaDAModelLM._no_split_modules
        )


@pytest.mark.parametrize("config", ["cpu", "cpu_processes"])
def test_accelerate_launch_runs_a_recipe_from_another_folder(tmp_path, measured, config):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
    command = [*launch, ROOT / "train" / "pretrain.py"]
    done = subprocess.run(
        [*map(str, command), *options(tmp_path, "run")], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert pretrain.main(options(tmp_path, "here")) == 0
    assert_same_run(tmp_path / "here", tmp_path / "run", measured, f"here and accelerate launch {config}.yaml")
    [_, (_, last)] = checkpoints(tmp_path / "run")
    assert read_state(last)["processes"] == (2 if config == "cpu_processes" else 1)


def test_two_processes_fine_tune_as_one(tmp_path, measured):
    """Examples as long as the longest of the step, whichever process has it; prompts dropped; a tracker on."""
    assert pretrain.main(options(tmp_path, "base")) == 0
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}?", "response": "one " * (n % 4)}) + "\n" for n in range(1, 17)))

    def command(output):
        return [
            "--model", tmp_path / "base" / "model", "--data", data, "--valid", data, "--output", tmp_path / output,
            "--format", "plain", "--no-packing", "--eos-padding", "longest", "--dropout-prompt", "0.3", "--precision",
            "no", "--max-steps", "3", "--batch-size", "4", "--valid-every", "3", "--log-every", "1",
        ]  # fmt: skip

    AcceleratorState._reset_state(reset_partial_state=True)
    assert sft.main([str(word) for word in command("one")]) == 0
    two(["-m", "train.sft", *command("two")])
    assert_same_run(tmp_path / "one", tmp_path / "two", measured, "1 process and 2, fine-tuned")


def test_sharded_processes_export_merged_adapters(tmp_path, measured):
    """A regression test: under FSDP2 the first process merged adapters of which it held a part."""
    assert pretrain.main(options(tmp_path, "base")) == 0
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}?", "response": "one " * (n % 4)}) + "\n" for n in range(1, 17)))
    common = ["--model", tmp_path / "base" / "model", "--data", data, "--format", "plain", "--precision", "no",
              "--max-steps", "3", "--batch-size", "4", "--lora", "2", "--learning-rate", "1e-2", "--warmup-steps", "1",
              "--ema", "0.5", "--sequence-length", "24"]  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    assert sft.main([*map(str, common), f"--output={tmp_path / 'one'}"]) == 0
    script = Path(__file__).parents[1] / "helpers" / "sharded.py"
    two([script, "sft", *common, f"--output={tmp_path / 'two'}"])
    one, other = (weights(tmp_path / name / "model") for name in ("one", "two"))
    measured("weights, 1 process and 2 under FSDP2, merged adapters", (one - other).abs().max(), 1e-5)
    assert not torch.equal(one, weights(tmp_path / "base" / "model"))


def test_a_conversion_to_block_diffusion_goes_on_with_two_processes(tmp_path, measured):
    """A full-attention checkpoint trained block by block under clipped rates; the second half on two processes."""
    assert pretrain.main(options(tmp_path, "full")) == 0
    full = tmp_path / "full" / "model"
    changes = {
        "model": full, "objective": "block_diffusion", "block_length": 4, "estimator": "uniform", "lowest_rate": 0.3,
        "highest_rate": 0.8,
    }  # fmt: skip
    for name in ("one", "two"):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert pretrain.main(options(tmp_path, name, **changes)) == 0
    assert not torch.equal(weights(full), weights(tmp_path / "one" / "model"))
    [_, (_, last)] = checkpoints(tmp_path / "two")
    shutil.rmtree(last)  # as if killed after step 2
    two(["-m", "train.pretrain", *options(tmp_path, "two", **changes, resume=True)])
    assert_same_run(tmp_path / "one", tmp_path / "two", measured, "block diffusion, from step 3 on 2 processes")
    for name in ("one", "two"):
        assert dlm.load(tmp_path / name / "model", device="cpu")[0].config.block_length == 4
