"""Certainty-forcing: the entropy of right predictions by hand, beside an unchanged bound."""

import math

import pytest
import torch

from dlm.objectives.config import NoiseSettings
from dlm.objectives.distillation import CertaintyForcing, entropy_where_right
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
