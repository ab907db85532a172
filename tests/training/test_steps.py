"""A step is the same however it is cut up and wherever it goes on: strata, cropping, blocks, saved activations."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dlm.data.examples import Example, crop, fetch
from dlm.objectives.losses import OBJECTIVES
from dlm.objectives.noise import NoiseSettings, deal_strata, draw_noise
from dlm.training import batches
from dlm.training.accelerator import checkpoint_activations
from dlm.training.state import checkpoints
from tests.helpers import ranks
from tests.helpers.ranks import KINDS, MASK, one_step, settings, tiny_data, tiny_model, two
from tests.helpers.training import fresh_accelerate, train, weights

assert fresh_accelerate  # a fixture for every test here


def difference(one, other) -> float:
    """Greatest difference of two gradients, in parts of the greatest entry."""
    assert one.shape == other.shape and one.abs().max() > 0
    return float((one - other).abs().max() / one.abs().max())


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A step of each kind on one process."""
    return {name: one_step(tmp_path_factory.mktemp("single"), **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    """The same steps on two processes: what each of them saw."""
    folder = tmp_path_factory.mktemp("double")
    two([Path(ranks.__file__), folder])
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_has_the_same_gradient(tmp_path, single, measured, kind):
    four = one_step(tmp_path, accumulation=4, **KINDS[kind])
    measured(f"gradient, accumulation 1 and 4: {kind}", difference(single[kind]["gradient"], four["gradient"]), 1e-5)
    assert four["noise"] == single[kind]["noise"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_same_gradient(single, double, measured, kind):
    one, (first, second) = single[kind], [rank[kind] for rank in double]
    assert torch.equal(first["gradient"], second["gradient"])
    measured(f"gradient, 1 and 2 processes: {kind}", difference(one["gradient"], first["gradient"]), 1e-5)
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-6)


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "autoregressive"])
def test_ranks_never_share_noise(single, double, measured, kind):
    """Each example is on one rank, with the noise that it has in a single process; no two of a step have the same."""
    first, second = (rank[kind]["noise"] for rank in double)
    assert first and second and not first.keys() & second.keys()
    assert {**first, **second} == single[kind]["noise"]
    drawn = [tuple(weight) for _, weight in {**first, **second}.values() if len(weight) > 6]
    measured(f"pairs of examples with the same noise: {kind}", len(drawn) - len(set(drawn)), 0)


def test_strata_are_dealt_anew_in_every_step(tmp_path, monkeypatch):
    deal, dealt = deal_strata, []

    def watched(keys, seed, step):
        dealt.append((list(keys), step))
        return deal(dealt[-1][0], seed, step)

    monkeypatch.setattr(batches, "deal_strata", watched)
    train(tmp_path, estimator="stratified", optimizer="adamw", max_steps=3)
    assert [step for _, step in dealt] == [0, 1, 2]
    assert all(len(keys) >= 4 for keys, _ in dealt)  # of the whole step


def objective_gradient(objective, rows, length, checkpointing=False):
    """(gradient of the sum over rows of (epoch, index), how often the first layer was computed)."""
    model = tiny_model().train()
    if checkpointing:
        checkpoint_activations(model)
    calls = []
    hook = model.model.transformer.blocks[0].ff_norm.register_forward_hook(lambda *_: calls.append(1))
    block = 4 if objective == "block_diffusion" else None
    batch = fetch(tiny_data(), rows, 22, width=length)
    noise = draw_noise(batch, NoiseSettings(block_length=block), seed=0)
    OBJECTIVES[objective].loss(model, batch, noise, MASK).total.backward()
    hook.remove()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), len(calls)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_rows_have_the_gradient_of_padded_ones(measured, objective):
    keys = [(0, index) for index in range(9)]
    packed, _ = objective_gradient(objective, [keys[:5], keys[5:]], 64)
    padded, _ = objective_gradient(objective, [[key] for key in keys], 16)
    measured(f"gradient, packed and padded: {objective}", difference(padded, packed), 1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_activation_checkpointing_has_the_same_gradient(measured, objective):
    plain, once = objective_gradient(objective, [[(0, 3)], [(0, 1)]], 16)
    again, twice = objective_gradient(objective, [[(0, 3)], [(0, 1)]], 16, checkpointing=True)
    assert (once, twice) == (1, 2)  # it did compute the layer again
    measured(f"gradient, activation checkpointing off and on: {objective}", difference(plain, again), 0)


def test_a_run_with_activation_checkpointing_has_the_same_weights(tmp_path):
    plain, _ = train(tmp_path / "plain")
    less, _ = train(tmp_path / "less", activation_checkpointing=True)
    assert less.model.transformer.blocks[0].gradient_checkpointing and torch.equal(weights(plain), weights(less))


@pytest.mark.parametrize("kind", ["stratified, cosine", "uniform, cropped", "block diffusion", "d3pm"])
def test_a_resumed_run_is_bitwise_the_same(tmp_path, kind):
    changes = {**KINDS[kind], "optimizer": "adamw"}
    whole, _ = train(tmp_path / "whole", **changes)
    train(tmp_path / "parts", **changes)
    for step, folder in checkpoints(tmp_path / "parts"):
        if step > 4:  # as if killed after step 4
            shutil.rmtree(folder)
    again, _ = train(tmp_path / "parts", **changes, resume=True)
    assert torch.equal(weights(whole), weights(again))
    assert (weights(whole) - weights(tiny_model())).abs().max() > 1e-3


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
