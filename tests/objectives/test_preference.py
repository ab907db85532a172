"""VRPO by hand: its loss against DPO on an enumerated toy, its gradient in chunks, the variance that sharing saves."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlm.data.examples import Example, pack
from dlm.models.attention import block_causal
from dlm.models.predictor import as_predictor
from dlm.objectives.noise import NoiseSettings
from dlm.objectives.preference import Preference, dpo
from dlm.objectives.reference import frozen
from tests.helpers.toys import MASK, tiny_model

PROMPT = [3, 4]


def batch_of(*pairs):
    """A batch of pairs of answers to one prompt, a pair a row."""
    rows = []
    for number, pair in enumerate(pairs):
        examples = []
        for which, answer in enumerate(pair):
            tokens = np.array([*PROMPT, *answer])
            target = np.arange(len(tokens)) >= len(PROMPT)
            examples.append((0, Example(tokens, target, 2 * number + which)))
        rows.append(examples)
    return pack(rows, max(sum(len(e.tokens) for _, e in row) for row in rows), 22)


def models(size=0.05):
    """A reference of random weights, and a policy so far from it."""
    policy, reference = tiny_model(), tiny_model()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return policy, frozen(reference)


def chain(model, answer):
    """log p of an answer under a model with blocks of one token: left to right, one token at a time, exactly."""
    total = 0.0
    for place, token in enumerate(answer):
        xt = torch.tensor([[*PROMPT, *answer[:place], MASK]])
        logits = as_predictor(model)(xt, visible=block_causal(1))
        total = total + F.log_softmax(logits[0, -1].double(), -1)[token]
    return total


def block_bound(model, answer, length):
    """The bound of an answer in blocks, enumerated: each block's given the clean ones before it, which see no later."""
    tokens, total = [*PROMPT, *answer], 0.0
    for start in range(0, len(tokens), length):
        block = [slot for slot in range(start, min(start + length, len(tokens))) if slot >= len(PROMPT)]
        for count in range(1, len(block) + 1):
            for subset in itertools.combinations(block, count):
                xt = torch.tensor([tokens[: start + length]])
                xt[0, list(subset)] = MASK
                logits = as_predictor(model)(xt, visible=block_causal(length))[0, list(subset)].double()
                ce = F.cross_entropy(logits, torch.tensor([tokens[slot] for slot in subset]), reduction="sum")
                total = total + ce / count / math.comb(len(block), count)
    return total


def exact_bound(model, answer):
    """The bound of an answer, enumerated: sum over l of (1/l) times the mean over l-subsets of the masked CE."""
    total, length = 0.0, len(answer)
    whole = torch.tensor([[*PROMPT, *answer]])
    for count in range(1, length + 1):
        for subset in itertools.combinations(range(len(PROMPT), len(PROMPT) + length), count):
            xt = whole.clone()
            xt[0, list(subset)] = MASK
            logits = as_predictor(model)(xt, torch.arange(xt.shape[1])[None])
            ce = F.cross_entropy(logits[0, list(subset)].double(), whole[0, list(subset)], reduction="sum")
            total = total + ce / count / math.comb(length, count)
    return total


def test_of_one_token_answers_it_is_exact_dpo():
    """A single masked token has its exact likelihood, so that the loss is DPO's, with its gradient."""
    policy, reference = models()
    pair, beta = ([7], [9]), 0.3
    objective, batch = Preference(reference, beta=beta, draws=3), batch_of(pair)
    loss = objective.loss(policy, batch, objective.noise(batch, NoiseSettings(), 0), MASK)
    xt = torch.tensor([[*PROMPT, MASK]])
    logp, logref = (F.log_softmax(as_predictor(m)(xt)[0, -1].double(), -1) for m in (policy, reference))
    expected = -F.logsigmoid(beta * ((logp[7] - logref[7]) - (logp[9] - logref[9])))
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), abs=1e-6) and loss.count == 1
    got = torch.autograd.grad(loss.total, policy.model.transformer.wte.weight)[0]
    wanted = torch.autograd.grad(expected, policy.model.transformer.wte.weight)[0]
    assert (got - wanted).abs().max() < 1e-6 * wanted.abs().max() + 1e-9
    assert float(loss.notes["variance_shared"]) == pytest.approx(0, abs=1e-12)


def test_delta_of_longer_answers_is_that_of_the_enumerated_bounds(measured):
    """The mean of delta over many draws, against bounds summed over every mask; sharing noise lowers its variance."""
    policy, reference = models(0.005)  # as after a few steps of training
    chosen, rejected = [7, 8, 5], [9, 2]
    bounds = [exact_bound(m, answer) for answer in (chosen, rejected) for m in (policy, reference)]
    bounds = [bound.detach() for bound in bounds]
    delta = float((bounds[1] - bounds[0]) - (bounds[3] - bounds[2]))
    _, check = dpo(torch.tensor([bounds[0], bounds[2]]), torch.tensor([bounds[1], bounds[3]]), 0.1)
    assert float(check) == pytest.approx(delta)
    batch, variances = batch_of((chosen, rejected)), {}
    for shared in (True, False):
        objective, draws = Preference(reference, beta=1.0, draws=400, shared=shared), 400
        with torch.no_grad():
            notes = objective.loss(policy, batch, objective.noise(batch, NoiseSettings(), 1), MASK).notes
        variances[shared] = float(notes["variance_shared"])
        error = math.sqrt(variances[shared])
        assert abs(float(notes["margin"]) - delta) < 4 * error, (shared, draws)
        if shared:
            assert float(notes["variance_apart"]) > 5 * variances[True]  # what it would be without sharing
    measured("variance of delta with shared noise, over that without", variances[True] / variances[False], 0.2)


@pytest.mark.parametrize("chunk", [None, 2])
def test_in_blocks_of_one_token_it_is_exact_dpo(chunk):
    """Answers of several tokens, two pairs of different lengths in a batch; value and gradient."""
    policy, reference = models()
    pairs, beta = [([7, 8, 5], [9, 2]), ([1], [2, 3, 4])], 0.3
    objective, batch = Preference(reference, beta=beta, draws=2), batch_of(*pairs)
    loss = objective.loss(policy, batch, objective.noise(batch, NoiseSettings(block_length=1), 0), MASK, chunk)
    expected = 0.0
    for chosen, rejected in pairs:
        gains = [chain(policy, answer) - chain(reference, answer).detach() for answer in (chosen, rejected)]
        expected = expected - F.logsigmoid(beta * (gains[0] - gains[1]))
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    got = torch.autograd.grad(loss.total, policy.model.transformer.wte.weight)[0]
    wanted = torch.autograd.grad(expected, policy.model.transformer.wte.weight)[0]
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_delta_in_blocks_is_that_of_the_enumerated_bounds():
    """Blocks of three, of which the prompt fills two places of the first."""
    policy, reference = models(0.02)
    chosen, rejected = [7, 8, 5, 11], [9, 2, 6]
    bounds = [float(block_bound(m, answer, 3)) for answer in (chosen, rejected) for m in (policy, reference)]
    delta = (bounds[1] - bounds[0]) - (bounds[3] - bounds[2])
    objective, batch = Preference(reference, beta=1.0, draws=600), batch_of((chosen, rejected))
    with torch.no_grad():
        notes = objective.loss(policy, batch, objective.noise(batch, NoiseSettings(block_length=3), 1), MASK).notes
    error = math.sqrt(float(notes["variance_shared"]))
    assert abs(float(notes["margin"]) - delta) < 4 * error < 0.5 * abs(delta)
    assert float(notes["variance_apart"]) > 5 * float(notes["variance_shared"])


def test_in_chunks_it_has_the_same_value_and_gradient():
    policy, reference = models()
    batch = batch_of(([7, 8, 5], [9, 2]), ([1], [2, 3, 4, 5]))
    found = []
    for chunk in (None, 2):
        objective = Preference(reference, beta=0.7, draws=4, sft=0.5)
        loss = objective.loss(policy, batch, objective.noise(batch, NoiseSettings(), 2), MASK, chunk)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss.total, list(policy.parameters()))])
        found.append((float(loss.total.detach()), gradient, loss.count))
    (value, gradient, count), (again, other, _) = found
    assert count == 2 and again == pytest.approx(value, rel=1e-6)
    assert (gradient - other).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("length", [None, 2])
def test_a_policy_that_is_its_reference_has_loss_log_two(length):
    policy, _ = models()
    objective, batch = Preference(frozen(policy), beta=0.5, draws=2), batch_of(([7, 8], [9, 2, 4]))
    loss = objective.loss(policy, batch, objective.noise(batch, NoiseSettings(block_length=length), 3), MASK)
    assert float(loss.total) == pytest.approx(math.log(2)) and float(loss.notes["chosen_gain"]) == 0
    assert len({Preference(m).identity for m in models() if isinstance(m, nn.Module)}) == 2


@pytest.mark.parametrize("changes", [{"beta": 0.0}, {"draws": 0}, {"sft": -1.0}])
def test_settings_that_cannot_be(changes):
    with pytest.raises(ValueError, match="give beta > 0, draws >= 1 and sft >= 0"):
        Preference(None, **changes)
