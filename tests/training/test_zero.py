"""DeepSpeed's ZeRO on two CPU processes (skipped without DeepSpeed): the same run as one process, resumed too."""

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

import dlm
from dlm.training import zero
from dlm.training.sharding import check_processes
from dlm.training.state import checkpoints
from tests.helpers.ranks import two
from tests.helpers.recipes import assert_same_run, fresh, options
from train import pretrain

assert fresh  # a fixture for every test here


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_resumes_and_exports_the_same_model(tmp_path, measured, monkeypatch, stage):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ZERO_STAGE", str(stage))
    one, parts = tmp_path / "one", tmp_path / "two"
    script = Path(__file__).parents[1] / "helpers" / "zero_ranks.py"
    changes = {"sample_every": 2, "sample_length": 4, "clip": 0.5, "activation_checkpointing": True}
    assert pretrain.main(options(tmp_path, "one", **changes)) == 0
    two([script, *options(tmp_path, "two", **changes, accumulation=2)])
    assert_same_run(one, parts, measured, f"1 process and 2 under ZeRO-{stage}")
    [_, (_, last)] = checkpoints(parts)
    assert list(last.glob("pytorch_model/zero_pp_rank_1_*"))  # DeepSpeed's own file of the second process
    shutil.rmtree(last)  # as if killed after step 2
    two([script, *options(tmp_path, "two", **changes, accumulation=2, resume=True)])
    assert_same_run(one, parts, measured, f"1 process and 2 under ZeRO-{stage}, resumed")
    model, tokenizer = dlm.load(parts / "model", device="cpu")
    assert dlm.generate(model, ["The cat"], dlm.SamplingConfig(gen_length=8), tokenizer=tokenizer).nfe > 0


def test_what_deepspeed_cannot_do_is_refused():
    plugin = SimpleNamespace(zero_stage=1)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, num_processes=2, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    with pytest.raises(ValueError, match="zero_stage is 1: use 2 or 3"):
        zero.configure(accelerator, SimpleNamespace(precision="bf16"))
    plugin.zero_stage = 3
    with pytest.raises(ValueError, match="use precision bf16"):
        zero.configure(accelerator, SimpleNamespace(precision="fp16"))
    with pytest.raises(ValueError, match="made by 4 processes, now there are 2"):
        check_processes(accelerator, 4, "step-1")
    accelerator.distributed_type = DistributedType.MULTI_GPU
    check_processes(accelerator, 4, "step-1")
