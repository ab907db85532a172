"""One model on two processes (gloo, on a CPU): the tokens of one process, printed once."""

import os
import subprocess
import sys

import pytest

import dlm
from dlm.kernels.tensor_parallel import shared_out
from dlm.models.configuration import LLaDAConfig
from tests.helpers import commandline
from tests.helpers.commandline import ENVIRONMENT

tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures

SCRIPT = """
import sys
import torch
import dlm
torch.set_num_threads(1)
model, _ = dlm.load(sys.argv[1], tensor_parallel=True)
weight = model.model.transformer.blocks[0].ff_proj.weight
found = [list(weight.to_local().shape), list(weight.shape)]
for method in ("none", "prefix", "dual", "c2f"):
    config = dlm.SamplingConfig(gen_length=12, block_length=4, steps=12, method=method)
    found.append(dlm.generate(model, [[1, 2, 3], [4]], config).sequences.tolist())
if torch.distributed.get_rank() == 0:
    print(found)
"""


def launch(*words, processes=2):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    return done.returncode, done.stdout, done.stderr


def test_tokens_are_those_of_one_process(checkpoint, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    code, out, error = launch(str(tmp_path / "script.py"), str(checkpoint))
    assert code == 0, error
    local, whole, *got = eval(out)
    assert local == [whole[0] // 2, whole[1]]  # each holds half of the layer
    model, _ = dlm.load(checkpoint)
    for method, tokens in zip(("none", "prefix", "dual", "c2f"), got, strict=True):
        config = dlm.SamplingConfig(gen_length=12, block_length=4, steps=12, method=method)
        assert dlm.generate(model, [[1, 2, 3], [4]], config).sequences.tolist() == tokens, method


def test_on_the_command_line_the_first_process_speaks(checkpoint, run):
    words = ["generate", "Once upon a time", "--gen-length", "8", "--steps", "4"]
    code, out, error = launch("-m", "dlm", *words, "--model", str(checkpoint), "--tensor-parallel")
    assert code == 0, error
    assert out == run(*words)[1]


def test_refusals(run, monkeypatch):
    code, _, error = run("generate", "Once", "--tensor-parallel")
    assert code == 2 and "needs the processes of torchrun" in error and error.count("\n") == 1
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "0", "WORLD_SIZE": "3"})
    config = {"d_model": 32, "n_heads": 4, "mlp_hidden_size": 48}
    with pytest.raises(ValueError, match="3 processes cannot share 4 key heads and an MLP of 48"):
        shared_out(LLaDAConfig(**config), "auto")
    with pytest.raises(ValueError, match="dtype is int8, whose layers cannot be shared out"):
        shared_out(LLaDAConfig(**config), "int8")
    with pytest.raises(ValueError, match="norms its heads together"):
        shared_out(LLaDAConfig(**config, attention_layer_norm=True), "auto")
