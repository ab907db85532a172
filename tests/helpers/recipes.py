"""What tests of the recipes share: the command line of a tiny pretraining run, and whether two runs are the same."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

import dlm

STORIES = [f"The {animal} saw {n} red stars and went home." for animal in ("cat", "dog") for n in range(12)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))


def options(folder, output, **changes):
    """The command line of a tiny pretraining run."""
    text = folder / "stories.txt"
    text.write_text("\n<|endoftext|>\n".join(STORIES))
    settings = {
        "data": text, "valid": text, "output": folder / output, "vocab_size": 270, "sequence_length": 24, "d_model": 16,
        "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 32, "max_steps": 4, "batch_size": 4, "warmup_steps": 1,
        "valid_every": 2, "valid_rows": 3, "sample_every": 0, "checkpoint_every": 2, "precision": "no", "log_every": 1,
        "optimizer": "adamw", **changes,
    }  # fmt: skip
    if "model" in changes:  # which has its shape and vocabulary already
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "mlp_hidden_size"):
            del settings[name]
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if not isinstance(value, bool)]
    return argv + [f"--{'' if v else 'no-'}{k.replace('_', '-')}" for k, v in settings.items() if isinstance(v, bool)]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    model, _ = dlm.load(folder, device="cpu", dtype="float32")
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def assert_same_run(one, other, measured, what):
    """Every logged number the same but for the last digits of a sum; the weights too."""
    first, second = records(one), records(other)
    assert [(r["kind"], r["step"]) for r in first] == [(r["kind"], r["step"]) for r in second]
    names = ("loss", "grad_norm", "bound", "error", "raw_bound")
    pairs = [(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in names if name in a]
    measured(f"losses, bounds and norms, {what}", max(abs(a - b) / abs(a) for a, b in pairs), 1e-4)
    measured(f"weights, {what}", (weights(one / "model") - weights(other / "model")).abs().max(), 1e-5)
