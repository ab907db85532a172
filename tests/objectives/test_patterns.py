"""Decoding-like noise, Beta rates, complementary masks, blocks at once: by hand, and bounds that stay bounds."""

import math

import numpy as np
import pytest
import torch

from dlm.data.examples import Example, pack
from dlm.objectives.config import NoiseSettings
from dlm.objectives.losses import OBJECTIVES
from dlm.objectives.noise import complement, count_shares, decoding_noise, draw_block_counts, draw_count, draw_noise
from dlm.utils.random import example_generator
from tests.objectives.test_losses import MASK, laid_out, tiny_model


def test_beta_rates_by_hand():
    # L = 2, Beta(2, 1): the density at 1/4 and 3/4 is 2 r, so that p = (1/4, 3/4) and the weights are 1 / (l p(l))
    assert count_shares(2, 1, 2, (2.0, 1.0)).tolist() == pytest.approx([0.25, 0.75])
    sharp = count_shares(9, 1, 9, (1e6, 1e6))  # its density underflows everywhere: the shares were 0 / 0
    assert sharp.tolist() == pytest.approx([0.0] * 4 + [1.0] + [0.0] * 4)
    low = draw_count(2, example_generator(0, 0, 0), u=0.1, beta=(2.0, 1.0))
    high = draw_count(2, example_generator(0, 0, 0), u=0.9, beta=(2.0, 1.0))
    assert (low[0].sum(), low[1], low[2]) == (1, pytest.approx(4.0), 0.5)
    assert (high[0].sum(), high[1], high[2]) == (2, pytest.approx(2 / 3), 1.0)


def test_beta_1_1_draws_what_no_beta_draws():
    plain, beta = (draw_count(7, example_generator(3, 0, 5), beta=b) for b in ((1.0, 1.0), (1, 1)))
    assert (plain[0] == beta[0]).all() and plain[1:] == beta[1:]


def many(length, number):
    """`number` examples of the same length in one batch."""
    made = [Example(np.zeros(length, np.int64), np.ones(length, bool), i) for i in range(number)]
    return pack([[(0, example)] for example in made], length, 0)


def cost(noise):
    """(E,) the weighted sum of a cross entropy that depends on how much is masked: l^2 each where l places are."""
    return (noise.weight * noise.masked.sum(1, keepdim=True) ** 2).sum(1)


BOUND = 1 + 4 + 9  # the sum over l of (1 / l) times l places times l^2, for L = 3


@pytest.mark.parametrize("settings", [NoiseSettings(), NoiseSettings(rate_alpha=2.0), NoiseSettings(rate_beta=0.5)])
def test_the_mean_is_the_bound(settings):
    values = cost(draw_noise(many(3, 4000), settings, seed=0))
    assert float(values.mean()) == pytest.approx(BOUND, abs=4 * float(values.std()) / 4000**0.5)


def test_halves_mask_every_token_once_and_their_mean_is_the_bound():
    batch = many(3, 4000)
    first = draw_noise(batch, NoiseSettings(complementary=True), seed=0)
    second = complement(batch, first)
    assert torch.equal(first.masked, ~second.masked)
    assert sorted(set(first.masked.sum(1).tolist())) == [0, 1, 2, 3]
    values = (cost(first) + cost(second)) / 2
    assert float(values.mean()) == pytest.approx(BOUND, abs=4 * float(values.std()) / 4000**0.5)
    one = first.masked.sum(1) == 1  # L = 3, l = 1: weights (L + 1) / 1 and (L + 1) / 2
    assert set(first.weight[one].unique().tolist()) == {0.0, 4.0}
    assert set(second.weight[one].unique().tolist()) == {0.0, 2.0}


def test_halves_of_blocks():
    batch = many(6, 50)
    first = draw_noise(batch, NoiseSettings(complementary=True, block_length=2), seed=1)
    second = complement(batch, first)
    assert torch.equal(first.masked, ~second.masked) and second.block_length == 2
    pairs = torch.stack([first.masked, second.masked]).view(2, -1, 2).sum(-1)
    weights = torch.stack([first.weight, second.weight]).view(2, -1, 2).amax(-1)
    assert torch.equal(weights[pairs > 0], 3 / pairs[pairs > 0])  # (K + 1) / l


def test_decoding_noise_by_hand():
    seen = set()
    for seed in range(200):
        masked, weight, rate = decoding_noise(10, example_generator(seed, 0, 0), 4)
        scored = np.flatnonzero(weight)
        block = scored[0] // 4
        end = min(10, 4 * block + 4)
        size = end - 4 * block
        assert (scored // 4 == block).all() and masked[scored].all()
        assert not masked[: 4 * block].any() and masked[end:].all() and not weight[end:].any()
        assert masked[4 * block : end].sum() == len(scored)  # what is masked of the block is scored
        assert weight[scored] == pytest.approx([3 * size / len(scored)] * len(scored))  # n K / l
        assert rate == len(scored) / size
        seen.add((int(block), len(scored)))
    assert seen == {(b, n) for b in (0, 1) for n in (1, 2, 3, 4)} | {(2, 1), (2, 2)}


def test_decoding_share_is_of_the_examples_and_the_rest_is_independent():
    batch = many(16, 600)
    noise = draw_noise(batch, NoiseSettings(decoding_share=0.25), seed=0)
    like_decoding = (noise.masked & (noise.weight == 0)).any(1)
    assert 0.15 < float(like_decoding.float().mean()) < 0.3  # of the last block nothing is masked unscored
    assert torch.equal(noise.scored[~like_decoding], noise.masked[~like_decoding])


def test_the_weights_of_decoding_noise_have_the_mean_of_a_bound():
    noise = draw_noise(many(10, 4000), NoiseSettings(decoding_share=1.0), seed=0)
    total = noise.weight.sum(1)  # a cross entropy of 1 everywhere: the bound is L
    assert float(total.mean()) == pytest.approx(10, abs=4 * float(total.std()) / 4000**0.5)


def test_blocks_at_once_are_uniform():
    sizes = np.array([4] * 6000 + [1])
    masked, weight, rate = draw_block_counts(sizes, example_generator(0, 0, 0))
    blocks = masked[:-1].reshape(-1, 4)
    counts = blocks.sum(1)
    assert np.bincount(counts, minlength=5)[1:] == pytest.approx([1500] * 4, abs=150)
    assert blocks.mean(0) == pytest.approx([0.625] * 4, abs=0.03)
    assert (weight[:-1] == 4 / counts).all() and (rate[:-1] == counts / 4).all()
    assert masked[-1] and weight[-1] == 1 and rate[-1] == 1


def test_blocks_at_once_keep_to_the_rates():
    counts = draw_block_counts(np.array([8] * 500), example_generator(0, 0, 1), 0.25, 0.5)[2] * 8
    assert set(counts.tolist()) == {2, 3, 4}


def test_what_is_not_scored_has_no_loss():
    """The places after the block are masked for the model and nothing is computed at them."""
    batch, asked = laid_out([[0, 1, 2, 3]]), []
    model = tiny_model()
    forward = model.forward

    def watched(*, call):
        asked.append(call.logits_to_keep)
        return forward(call=call)

    model.forward = watched
    noise = draw_noise(batch, NoiseSettings(decoding_share=1.0, decoding_block=2), seed=0)
    loss = OBJECTIVES["diffusion"].loss(model, batch, noise, MASK)
    assert torch.equal(asked[0], noise.weight > 0) and int(noise.masked.sum()) > int(asked[0].sum())
    assert len(loss.ce) == int(asked[0].sum())


def test_rows_without_blocks_are_trained_under_full_attention():
    batch, model = laid_out([[0, 1, 2, 3]]), tiny_model()
    noise = draw_noise(batch, "count", seed=0)
    both, plain = (OBJECTIVES[name].loss(model, batch, noise, MASK).total for name in ("block_diffusion", "diffusion"))
    assert both.item() == plain.item()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rate_alpha": 0.0}, "above 0"),
        ({"rate_alpha": math.nan}, "above 0"),  # every weight was no number
        ({"rate_beta": math.inf}, "above 0"),
        ({"noise_exponent": math.nan}, "above 0"),
        ({"block_length": 2.5}, "a whole number of tokens"),
        ({"rate_alpha": 2.0, "estimator": "uniform"}, "estimator count"),
        ({"complementary": True, "highest_rate": 0.5}, "complementary"),
        ({"complementary": True, "decoding_share": 0.5}, "complementary"),
        ({"decoding_share": 1.5}, "from 0 to 1"),
        ({"decoding_share": 0.5, "block_length": 4}, "full attention"),
        ({"decoding_block": 0}, "at least one token"),
    ],
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(ValueError, match=words):
        NoiseSettings(**settings)


def test_in_a_range_of_rates_beta_has_the_mean_without_it():
    """A regression test: with a range of rates the loss under a Beta was smaller by the share of counts."""
    plain, beta = NoiseSettings(lowest_rate=0.5), NoiseSettings(lowest_rate=0.5, rate_alpha=2.0)
    means = [float(cost(draw_noise(many(4, 4000), settings, seed=0)).mean()) for settings in (plain, beta)]
    wanted = 4 / 3 * (4 + 9 + 16)  # counts 2, 3, 4: L / n times the sum over l of (1 / l) times l^3
    assert means == [pytest.approx(wanted, rel=0.03)] * 2
