"""Certainty-forcing: the entropy of right predictions by hand, beside an unchanged bound."""

import math

import numpy as np
import pytest
import torch

from dlm.objectives import distillation
from dlm.objectives.config import NoiseSettings
from dlm.objectives.distillation import CertaintyForcing, entropy_where_right, latest
from dlm.objectives.losses import OBJECTIVES
from dlm.objectives.noise import draw_noise
from tests.objectives.test_losses import MASK, laid_out, tiny_model


def test_entropy_where_right_by_hand():
    half = torch.tensor([0.5, 0.25, 0.25]).log()
    logits = torch.stack([half, half, torch.tensor([0.0, 0.0, 100.0])])
    # right with entropy 1.5 ln 2; wrong; right and certain
    assert float(entropy_where_right(logits, torch.tensor([0, 1, 2]))) == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_its_gradient_makes_a_right_prediction_surer():
    logits = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    entropy_where_right(logits, torch.tensor([0])).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]


@pytest.mark.parametrize("block", [None, 4])
def test_the_bound_stays_and_the_entropy_is_added(block):
    batch, model = laid_out([[0, 1, 2, 3]]), tiny_model()
    noise = draw_noise(batch, NoiseSettings(block_length=block), seed=0)
    plain = OBJECTIVES["block_diffusion"].loss(model, batch, noise, MASK)
    found = {weight: CertaintyForcing(weight).loss(model, batch, noise, MASK) for weight in (0.0, 1.0, 2.0)}
    totals = {weight: loss.total.item() for weight, loss in found.items()}
    assert totals[0.0] == pytest.approx(plain.total.item(), rel=1e-6)
    assert totals[2.0] - totals[0.0] == pytest.approx(2 * (totals[1.0] - totals[0.0]), rel=1e-4)
    assert totals[1.0] >= totals[0.0] and torch.equal(found[2.0].ce, plain.ce)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="0 or more"):
        CertaintyForcing(-1.0)


def test_what_was_committed_last_is_masked():
    """Two units of three places; one place of the first is masked by the noise, two of the second."""
    masked = torch.tensor([True, False, False, True, True, False])
    weight = torch.tensor([3.0, 0, 0, 1.5, 1.5, 0])
    units, when = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([-1, 2, 1, 5, 3, 4])
    chosen, factor = latest(masked, units, when, weight)
    assert chosen.tolist() == [False, True, False, True, False, True]
    assert factor.tolist() == [0, 3.0, 0, 1.5, 0, 1.5]
    given, _ = latest(masked, units, torch.full((6,), -1), weight)  # ties: from the right
    assert given.tolist() == [False, False, True, False, True, True]


def test_written_examples_are_masked_in_their_order_and_the_others_by_chance():
    batch = laid_out([[0, 1]])
    settings = NoiseSettings(block_length=4)
    plain = CertaintyForcing(1.0).noise(batch, settings, seed=2)
    when = np.random.default_rng(0).permutation(int((batch.segments == 0).sum()))
    ordered = CertaintyForcing(1.0, [when], 1.0).noise(batch, settings, seed=2)
    first, second = (batch.segments == 0) & batch.target, (batch.segments == 1) & batch.target
    places, blocks = batch.positions[first], batch.positions[first] // 4
    assert not torch.equal(plain.masked[first], ordered.masked[first])
    for block in blocks.unique().tolist():
        own = places[blocks == block].tolist()
        count = int(plain.masked[first][blocks == block].sum())
        expected = sorted(own, key=lambda place: -when[place])[:count]
        assert set(places[ordered.masked[first] & (blocks == block)].tolist()) == set(expected)
    assert torch.equal(plain.masked[second], ordered.masked[second])
    assert float(ordered.weight.sum()) == pytest.approx(float(plain.weight.sum()))
    assert torch.equal(ordered.scored, ordered.masked)


def test_the_entropy_of_written_texts_alone_counts(monkeypatch):
    """Of places that are all right: each example's scored places where it is written, none of an empty list."""
    batch, model = laid_out([[0, 1]]), tiny_model()
    noise = draw_noise(batch, NoiseSettings(block_length=4), seed=0)
    monkeypatch.setattr(distillation, "entropy_where_right", lambda logits, truth: logits.new_tensor(float(len(truth))))
    scored = [int((noise.scored & (batch.segments == example)).sum()) for example in (0, 1)]
    plain = OBJECTIVES["block_diffusion"].loss(model, batch, noise, MASK).total.item()
    for passes, places in (
        ([], 0),
        ([np.arange(5)], scored[0]),
        ([np.arange(5)] * 2, sum(scored)),
        (None, sum(scored)),
    ):
        found = CertaintyForcing(2.0, passes).loss(model, batch, noise, MASK).total.item()
        assert found - plain == pytest.approx(2.0 * places, abs=1e-6)
