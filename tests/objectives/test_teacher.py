"""Teachers by hand: SDTT's loss of equal steps, its targets after two passes, rounds, consistency, a moving average."""

import math

import pytest
import torch

from dlm.objectives.config import NoiseSettings
from dlm.objectives.losses import OBJECTIVES
from dlm.objectives.reference import check_same_shape, frozen
from dlm.objectives.teacher import Consistency, Drawn, StepDistillation, predictions
from tests.helpers.toys import MASK, tiny_model
from tests.objectives.test_preference import batch_of

COUNT = NoiseSettings()


def drawn(objective, batch, seed=0):
    return objective.noise(batch, COUNT, seed)


def test_at_equal_steps_a_student_that_is_its_teacher_has_no_loss():
    model, batch = tiny_model(), batch_of(([7, 8, 5], [9, 2, 4, 4]))
    same = StepDistillation(frozen(model), steps=8, passes=1)
    loss = same.loss(model, batch, drawn(same, batch), MASK)
    assert float(loss.total.detach()) == pytest.approx(0, abs=1e-6) and len(loss.ce) > 0
    gradient = torch.autograd.grad(loss.total, list(model.parameters()))
    assert max(float(g.abs().max()) for g in gradient) < 1e-6
    two = StepDistillation(frozen(model), steps=1, passes=2)
    noise = drawn(two, batch)
    noise.uniform[0, 0] = 1.0
    row, place = noise.noise.masked.nonzero()[-1]
    noise.uniform[0, 0, row, place] = 0.0  # one token is revealed, and the others' targets change
    assert float(two.loss(model, batch, noise, MASK).total.detach()) > 1e-3


def test_the_target_is_of_the_last_pass_before_a_place_was_revealed():
    """All four tokens masked, the time 1, one step of the student in all: a place is revealed with chance 1/2."""
    model, batch = tiny_model(), batch_of(([7, 8, 5, 6], [9]))
    objective = StepDistillation(frozen(tiny_model(1)), steps=1, passes=2)
    noise = drawn(objective, batch)
    noise.noise.masked[:] = batch.target & (batch.segments == 0)
    noise.noise.rate[:] = 1.0
    noise.uniform[0, 0], noise.uniform[0, 1] = 0.9, 0.25
    noise.uniform[0, 0, 0, [2, 4]] = 0.1  # two of the four places
    masked = noise.noise.masked
    xt = batch.tokens.masked_fill(masked, MASK)
    first = predictions(objective.teacher, xt, batch, masked).detach()
    p = first.exp()
    p[:, MASK] = 0
    tokens = ((p / p.sum(1, keepdim=True)).cumsum(1) < 0.25).sum(1)
    later = xt.clone()
    later[0, [2, 4]] = tokens[[0, 2]]
    left = masked.clone()
    left[0, [2, 4]] = False
    second = predictions(objective.teacher, later, batch, left).detach()
    target = objective.targets_of(batch, noise, xt, MASK)
    assert torch.equal(target[[0, 2]], first[[0, 2]]) and torch.allclose(target[[1, 3]], second, atol=1e-6)
    assert not torch.allclose(target[[1, 3]], first[[1, 3]], atol=1e-3)
    mine = predictions(model, xt, batch, masked)
    wanted = (target.exp() * (target - mine)).sum()
    got = objective.loss(model, batch, noise, MASK).total
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)


def test_rounds_take_the_student_over_and_halve_the_steps():
    model, start = tiny_model(), frozen(tiny_model(1))
    objective = StepDistillation(start, steps=8, round_steps=3)
    before = objective.identity
    objective.after_step(model, 1)
    assert objective.round == 0 and objective.teacher is start
    objective.after_step(model, 3)
    assert objective.round == 1 and objective.identity == before  # of how it began, for a resume
    pairs = zip(start.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(mine, its) for mine, its in pairs)
    again = StepDistillation(frozen(tiny_model(1)), steps=8, round_steps=3)
    again.load_state(objective.state())
    assert again.round == 1 and torch.equal(next(again.teacher.parameters()), next(model.parameters()))
    assert StepDistillation(start, steps=8).state() == {}


def test_consistency_by_hand():
    """The bound alone where its weight is 0; with a weight the divergence at the places that stay masked."""
    model, other = tiny_model(), frozen(tiny_model(1))
    batch = batch_of(([7, 8, 5, 6], [9, 2, 4]))
    plain = Consistency(other, weight=0.0)
    noise = drawn(plain, batch)
    bound = OBJECTIVES["diffusion"].loss(model, batch, noise.noise, MASK)
    none = plain.loss(model, batch, noise, MASK)
    assert float(none.total.detach()) == pytest.approx(float(bound.total.detach()), rel=1e-5)
    noise = Drawn(noise.noise, noise.uniform.clone())
    noise.uniform[0, 0], noise.uniform[0, 1] = 0.9, 0.5  # every place is revealed but
    place = noise.noise.masked.nonzero()[0]
    noise.uniform[0, 0, place[0], place[1]] = 0.1
    xt = batch.tokens.masked_fill(noise.noise.masked, MASK)
    kept = torch.zeros_like(noise.noise.masked)
    kept[place[0], place[1]] = True
    later = torch.where(kept, MASK, batch.tokens)
    mine, its = (predictions(m, x, batch, kept)[0] for m, x in ((model, xt), (other, later)))
    apart = (its.exp() * (its - mine)).sum()
    got = Consistency(other, weight=3.0).loss(model, batch, noise, MASK)
    assert float((got.total - none.total).detach()) == pytest.approx(3 * float(apart.detach()), rel=1e-4)


def test_a_teacher_that_follows():
    model, teacher = tiny_model(), frozen(tiny_model(1))
    mine, its = next(model.parameters()).detach(), next(teacher.parameters()).clone()
    objective = Consistency(teacher, weight=1.0, decay=0.75)
    objective.after_step(model, 1)
    assert torch.allclose(next(teacher.parameters()), 0.75 * its + 0.25 * mine)
    assert len(objective.state()) == len(list(model.parameters())) + 1


def test_what_cannot_be():
    model = frozen(tiny_model())
    for bad in ({"steps": 0}, {"steps": 2, "passes": 0}):
        with pytest.raises(ValueError, match="give 1"):
            StepDistillation(model, **bad)
    for bad in ({"weight": -1.0}, {"weight": math.nan}, {"weight": 1.0, "decay": 1.0}):
        with pytest.raises(ValueError, match=r"consistency is|a decay below 1"):
            Consistency(model, **bad)
    with pytest.raises(ValueError, match="of another shape or family"):
        check_same_shape(model, tiny_model(mlp_hidden_size=24), "other")
