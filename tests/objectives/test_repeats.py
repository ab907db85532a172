"""A share of the loss on what the earlier rounds of repeated layers put out, against models of fewer rounds."""

import numpy as np
import pytest
import torch

from dlm.data.examples import Example, pack
from dlm.models.configuration import LLaDAConfig
from dlm.models.transformer import LLaDAModelLM
from dlm.objectives.losses import OBJECTIVES, objective
from dlm.objectives.noise import NoiseSettings, draw_noise
from dlm.training.config import TrainingConfig

VOCAB, MASK, SHARE = 20, 19, 0.6


def model_of(repeats, **changes):
    """The same weights, whatever the rounds."""
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=16, n_heads=2, n_layers=2, mlp_hidden_size=32, vocab_size=VOCAB, max_sequence_length=64,
        weight_tying=False, mask_token_id=MASK, eos_token_id=18, pad_token_id=18, init_fn="normal", init_std=0.3,
        layer_repeats=repeats, **changes,
    )  # fmt: skip
    return LLaDAModelLM(config).double()


def case(name):
    """A batch of three examples in two rows, and its noise under the objective."""
    random = np.random.default_rng(0)
    made = [(0, Example(random.integers(0, 18, n), np.arange(n) > 1, i)) for i, n in enumerate((6, 5, 9))]
    batch = pack([made[:2], made[2:]], 12, 18)
    return batch, draw_noise(batch, NoiseSettings(block_length=4 if name == "block_diffusion" else None), 1)


def gradient(model, loss):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss.total, list(model.parameters()))])


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("chunk", [None, 3])
def test_it_is_the_weighted_sum_of_the_losses_of_models_with_fewer_rounds(name, chunk):
    """Value, gradient, and the logged cross entropies, which are the last round's: the bound of the model."""
    batch, noise = case(name)
    deep = model_of(3)
    found = objective(name, SHARE).loss(deep, batch, noise, MASK, chunk)
    shares, parts = [SHARE / 2, SHARE / 2, 1 - SHARE], []
    for repeats in (1, 2, 3):
        model = model_of(repeats)
        loss = OBJECTIVES[name].loss(model, batch, noise, MASK)
        parts.append((loss, gradient(model, loss)))
    total = sum(share * float(loss.total.detach()) for share, (loss, _) in zip(shares, parts, strict=True))
    assert float(found.total.detach()) == pytest.approx(total)
    wanted = sum(share * one for share, (_, one) in zip(shares, parts, strict=True))
    assert (gradient(deep, found) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    last = parts[-1][0]
    assert torch.allclose(found.ce, last.ce) and torch.allclose(found.examples, last.examples)
    assert found.count == last.count and torch.equal(found.rate, last.rate)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_of_one_round_it_is_the_plain_loss(name):
    batch, noise = case(name)
    model = model_of(1)
    one, other = (objective(name, share).loss(model, batch, noise, MASK) for share in (0.0, SHARE))
    assert torch.equal(one.total, other.total) and torch.equal(gradient(model, one), gradient(model, other))


def test_logits_of_every_round_in_each_form_of_asking():
    """What `predict` gives of 2 rounds is what models of 1 and of 2 rounds give, one after the other."""
    tokens = torch.arange(10).view(2, 5)
    keep = torch.tensor([[True, False, True, False, False], [False, False, False, True, True]])
    forms = {"all": None, "bool": keep, "flat": torch.tensor([0, 2, 8, 9]), "rows": torch.tensor([[0, 2], [3, 4]])}
    for name, asked in forms.items():
        both = model_of(2).predict(tokens, logits_to_keep=asked, every_repeat=True)
        each = [model_of(repeats).predict(tokens, logits_to_keep=asked) for repeats in (1, 2)]
        assert torch.allclose(both, torch.cat(each)), name


def test_a_share_beyond_one_is_refused():
    with pytest.raises(ValueError, match="it must lie between 0 and 1"):
        TrainingConfig(output="x", max_steps=1, repeat_share=1.5)
