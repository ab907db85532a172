"""A step is the same however it is cut up and wherever it goes on: strata, cropping, blocks, saved activations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import MASK, ROOT, fresh_accelerate, settings, tiny_data, tiny_model, train, weights

from dlm import checkpoint
from dlm.data import Example, crop, fetch
from dlm.diffusion import NoiseSettings, draw_noise
from dlm.objective import OBJECTIVES
from dlm.runtime import checkpoint_activations

assert fresh_accelerate  # a fixture for every test here

KINDS = [
    {"estimator": "stratified", "noise_schedule": "cosine"},
    {"estimator": "uniform", "random_length": 0.5},
    {"objective": "block_diffusion", "block_length": 4, "estimator": "stratified"},
    {"estimator": "d3pm", "diffusion_steps": 8},
]


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_and_resume_change_nothing(tmp_path, kind):
    whole, _ = train(tmp_path / "whole", **kind, optimizer="adamw")
    four, _ = train(tmp_path / "four", **kind, optimizer="adamw", accumulation=4)
    assert (weights(whole) - weights(four)).abs().max() < 1e-5
    assert (weights(whole) - weights(tiny_model())).abs().max() > 1e-3
    train(tmp_path / "parts", **kind, optimizer="adamw")
    for step, folder in checkpoint.checkpoints(tmp_path / "parts"):
        if step > 4:  # as if killed after step 4
            (folder / checkpoint.STATE_FILE).unlink()
    again, _ = train(tmp_path / "parts", **kind, optimizer="adamw", resume=True)
    assert torch.equal(weights(whole), weights(again))


def test_two_processes_share_the_strata_of_a_step(tmp_path):
    """Losses of 1 and 2 processes (gloo) are those of the same run, and no rank has another's noise."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import test_training as t;"
        "t.train(sys.argv[3], optimizer='adamw', max_steps=3, estimator='stratified', random_length=0.3)"
    )
    changes = {"optimizer": "adamw", "max_steps": 3, "estimator": "stratified", "random_length": 0.3}
    train(tmp_path / "one", **changes)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(21000 + os.getpid() % 20000), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(ROOT), str(tmp_path / "two")]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [r["tokens"] for r in one] == [r["tokens"] for r in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def gradient(objective, checkpointing):
    model = tiny_model().train()
    if checkpointing:
        checkpoint_activations(model)
    calls = []
    hook = model.model.transformer.blocks[0].ff_norm.register_forward_hook(lambda *_: calls.append(1))
    block = 4 if objective == "block_diffusion" else None
    batch = fetch(tiny_data(), [[(0, 3)], [(0, 1)]], 22)
    noise = draw_noise(batch, NoiseSettings(block_length=block), seed=0)
    OBJECTIVES[objective].loss(model, batch, noise, MASK).total.backward()
    hook.remove()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), len(calls)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_activation_checkpointing_has_the_same_gradient(objective):
    plain, once = gradient(objective, False)
    again, twice = gradient(objective, True)
    assert (once, twice) == (1, 2)  # it did compute the layer again
    assert torch.equal(plain, again) and plain.abs().max() > 0


def test_a_run_with_activation_checkpointing_has_the_same_weights(tmp_path):
    plain, _ = train(tmp_path / "plain")
    less, _ = train(tmp_path / "less", activation_checkpointing=True)
    assert less.model.transformer.blocks[0].gradient_checkpointing and torch.equal(weights(plain), weights(less))


def test_cropping_belongs_to_the_example():
    example = Example(np.arange(50), np.arange(50) > 0, 6)
    assert crop(example, 0, 0.0, 3) is example
    kept = [crop(example, epoch, 0.25, 3) for epoch in range(400)]
    short = [len(one.tokens) for one in kept if one is not example]
    assert 70 < len(short) < 130  # a quarter
    assert min(short) <= 2 and max(short) == 50 and 20 < np.mean(short) < 31
    assert all((one.tokens == np.arange(len(one.tokens))).all() for one in kept)
    assert [len(one.tokens) for one in kept] == [len(crop(example, epoch, 0.25, 3).tokens) for epoch in range(400)]
    rows = [[(0, 0)], [(0, 1)]]
    batch = fetch(tiny_data(), rows, 22, random_length=1.0, seed=1)
    whole = fetch(tiny_data(), rows, 22)
    assert (batch.segments >= 0).sum() < (whole.segments >= 0).sum() and len(batch.index) == 2


def test_resume_needs_the_same_noise(tmp_path):
    train(tmp_path, estimator="uniform")
    with pytest.raises(ValueError, match="made with noise_schedule linear, now it is cosine"):
        train(tmp_path, resume=True, estimator="uniform", noise_schedule="cosine")
    with pytest.raises(ValueError, match="changes nothing under estimator count"):
        settings(tmp_path, noise_schedule="cosine")
