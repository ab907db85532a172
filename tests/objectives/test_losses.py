"""Objectives: by hand on a toy, and the same loss and gradients however examples are laid out."""

import math

import numpy as np
import pytest
import torch

from dlm.data.examples import Example, pack
from dlm.models.configuration import LLaDAConfig
from dlm.models.transformer import LLaDAModelLM
from dlm.objectives.losses import OBJECTIVES, autoregressive, masked_diffusion
from dlm.objectives.noise import Noise, draw_noise

VOCAB, MASK = 20, 19


def tiny_model():
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=16, n_heads=2, n_layers=2, mlp_hidden_size=32, vocab_size=VOCAB, max_sequence_length=64,
        weight_tying=True, mask_token_id=MASK, eos_token_id=18, pad_token_id=18, init_fn="normal", init_std=0.3,
    )  # fmt: skip
    return LLaDAModelLM(config).double()


def examples(sizes=(5, 7, 3, 9)):
    random = np.random.default_rng(0)
    return [Example(random.integers(0, 18, n), np.arange(n) > 0, i) for i, n in enumerate(sizes)]


def laid_out(rows, length=24):
    made = examples()
    return pack([[(0, made[i]) for i in row] for row in rows], length, 18)


def gradients(objective, batches):
    model = tiny_model()
    count = sum(int(OBJECTIVES[objective].targets(batch).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = OBJECTIVES[objective].loss(model, batch, draw_noise(batch, "count", seed=1), MASK)
        (loss.total / count).backward()
        total += float(loss.total.detach())
    return total / count, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_packed_equals_padded_equals_accumulated(objective):
    packed = gradients(objective, [laid_out([[0, 1, 2, 3]])])
    padded = gradients(objective, [laid_out([[0], [1], [2], [3]])])
    shuffled = gradients(objective, [laid_out([[3, 0], [2, 1]])])
    accumulated = gradients(objective, [laid_out([[i]]) for i in range(4)])
    for other in (padded, shuffled, accumulated):
        assert other[0] == pytest.approx(packed[0], abs=1e-6)
        assert (other[1] - packed[1]).abs().max() < 1e-6
    assert packed[1].abs().max() > 1e-3


def constant_model(row):
    """A predictor that gives the same logits everywhere."""

    def model(tokens, positions=None, *, visible=None, cache=None, valid=None, logits_to_keep=None):
        return row.expand(int(logits_to_keep.sum()), -1)

    return model


def test_weighted_sum_by_hand():
    row = torch.log(torch.tensor([0.5, 0.25, 0.25]))
    batch = pack([[(0, Example(np.array([0, 1, 0, 2]), np.ones(4, bool), 0))]], 5, 0)
    masked = torch.tensor([[False, True, True, False, False]])
    noise = Noise(masked, masked * 2.0, torch.tensor([0.5]))  # l = 2 of L = 4: weight 2
    loss = masked_diffusion(constant_model(row), batch, noise, mask_id=2)
    assert float(loss.total) == pytest.approx(2 * (math.log(4) + math.log(2)))
    assert loss.count == 4 and loss.lengths.tolist() == [4]
    assert loss.examples.tolist() == pytest.approx([float(loss.total)])
    assert loss.ce.tolist() == pytest.approx([math.log(4), math.log(2)]) and loss.rate.tolist() == [0.5, 0.5]


def test_the_model_sees_masks_and_not_the_hidden_tokens():
    batch = laid_out([[0, 1]])
    noise = draw_noise(batch, "count", seed=0)
    seen = []

    def model(tokens, positions=None, *, visible=None, cache=None, valid=None, logits_to_keep=None):
        seen.append(tokens)
        return torch.zeros(int(logits_to_keep.sum()), VOCAB)

    masked_diffusion(model, batch, noise, MASK)
    assert (seen[0][noise.masked] == MASK).all() and (seen[0][~noise.masked] == batch.tokens[~noise.masked]).all()


def test_no_masks_is_no_loss():
    batch = laid_out([[0, 1]])
    nothing = torch.zeros(batch.tokens.shape)
    model = tiny_model()
    loss = masked_diffusion(model, batch, Noise(nothing.bool(), nothing, torch.zeros(2)), MASK)
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0 and loss.count == 10
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_autoregressive_predicts_the_next_token_of_the_same_example():
    made = [
        Example(np.array([3, 4, 5]), np.array([False, True, True]), 0),
        Example(np.array([6, 7]), np.ones(2, bool), 1),
    ]
    batch = pack([[(0, example) for example in made]], 6, 18)
    asked = []

    def model(tokens, positions=None, *, visible=None, cache=None, valid=None, logits_to_keep=None):
        asked.append(logits_to_keep)
        slots = torch.arange(6)
        rule = visible(torch.zeros(1, dtype=torch.long), slots[:, None], slots[None, :])
        assert not rule[0, 1:].any() and not rule[3, :3].any() and rule[2, :3].all()
        return torch.zeros(int(logits_to_keep.sum()), VOCAB)

    loss = autoregressive(model, batch)
    assert asked[0].tolist() == [[True, True, False, True, False, False]]
    assert loss.count == 3 and float(loss.total) == pytest.approx(3 * math.log(VOCAB))
