"""Which token is proposed, and with which confidence, by hand on predictors whose probabilities are written down."""

import math

import pytest
import torch

import dlm
from dlm.sampling.propose import draw, propose
from tests.helpers.tables import MASK, best, run, steps, table
from tests.helpers.toys import Probabilities, Table

# --- confidence --------------------------------------------------------------------------------------------------

#                 p1    p1 - p2   H
# [.6  .4  0  0]  .6    .2        .6730
# [.5  .1 .2 .2]  .5    .3       1.2206
# [.61 .2 .1 .09] .61   .41      1.0704
ROWS = ([0.6, 0.4, 0, 0], [0.5, 0.1, 0.2, 0.2], [0.61, 0.2, 0.1, 0.09])


@pytest.mark.parametrize(
    ("confidence", "want", "values"),
    [
        ("probability", [2, 3, 1], [0.6, 0.5, 0.61]),
        ("margin", [3, 2, 1], [0.2, 0.3, 0.41]),
        ("entropy", [1, 3, 2], [-0.6730, -1.2206, -1.0704]),
    ],
)
def test_confidence(confidence, want, values):
    states, got, _ = run(table(*ROWS), 3, confidence=confidence)
    assert got == want
    for state in states:
        assert (state.confidence[~state.committed] == 0).all()
    reported = sum(state.confidence for state in states)[0, 1:]
    assert reported.tolist() == pytest.approx(values, abs=1e-4)


def test_random_confidence_is_uniform_and_reproducible():
    model = best(*[0.9 - 0.1 * i for i in range(4)])
    first = torch.zeros(4)
    for seed in range(400):
        got = steps(model, 4, confidence="random", seed=seed)
        assert sorted(got) == [1, 2, 3, 4]
        first[got.index(1)] += 1
    assert steps(model, 4, confidence="random", seed=7) == steps(model, 4, confidence="random", seed=7)
    # 400 draws of 1/4: 100 each, standard deviation 8.7
    assert (first - 100).abs().max() < 35


def test_random_confidence_does_not_change_the_tokens():
    model = table(*ROWS)
    assert run(model, 3, confidence="random", seed=3)[2] == run(model, 3)[2] == [0, 0, 0]


# --- proposals ---------------------------------------------------------------------------------------------------

FOUR = [0.5, 0.3, 0.15, 0.05]
MANY = 4000


def draws(probabilities=FOUR, **options):
    """Frequencies of the tokens drawn in MANY rows of one token."""
    config = dlm.SamplingConfig(gen_length=1, block_length=1, **options)
    out = dlm.generate(table(probabilities), dlm.Canvas.from_prompts([[0]] * MANY, 1, MASK), config)
    return torch.bincount(out.sequences.flatten(), minlength=5).double() / MANY


def expected(probabilities, temperature):
    p = torch.tensor(probabilities, dtype=torch.float64) ** (1 / temperature)
    return torch.cat([p / p.sum(), torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0, 2.0])
def test_temperature_draws_from_the_tempered_softmax(temperature):
    p = expected(FOUR, temperature)
    error = (draws(temperature=temperature) - p).abs()
    assert (error <= 4 * (p * (1 - p) / MANY).sqrt() + 1e-12).all()


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 200, 4097])
def test_a_draw_is_where_the_cumulative_distribution_passes(size):
    """Against one search through all of it, and at its edges, where a token without probability must not come."""
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(50, size, generator=generator, dtype=torch.float64) * 4
    scores[torch.rand(50, size, generator=generator) < 0.4] = -torch.inf
    scores[:, size // 2] = 5.0
    scores -= scores.amax(dim=-1, keepdim=True)
    total = scores.softmax(dim=-1).cumsum(dim=-1)
    for uniform in (torch.rand(50, generator=generator, dtype=torch.float64), torch.zeros(50, dtype=torch.float64),
                    torch.full((50,), 1 - 2**-53, dtype=torch.float64)):  # fmt: skip
        token = draw(scores, uniform)
        assert (scores.gather(-1, token[:, None]) > -torch.inf).all()
        wanted = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True).clamp_max(size - 1)[:, 0]
        if uniform[0] < 0.9999:
            assert (token == wanted).all()
    last = (scores > -torch.inf).int().cumsum(dim=-1).argmax(dim=-1)
    assert (draw(scores, torch.full((50,), 1.0, dtype=torch.float64)) == last).all()


def test_a_draw_by_hand():
    scores = torch.tensor([0.0, -torch.inf, math.log(0.5), math.log(0.5)]).expand(6, 4)  # 1/2, 0, 1/4, 1/4
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.99], dtype=torch.float64)
    assert draw(scores, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_a_place_takes_one_number_of_its_rows_generator():
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    propose(torch.zeros(2, 3, 500), generators, counts=[3, 1], temperature=1.0)
    for seed, count, generator in ((0, 3, generators[0]), (1, 1, generators[1])):
        wanted = torch.Generator().manual_seed(seed)
        torch.rand(count, dtype=torch.float64, generator=wanted)
        assert torch.equal(generator.get_state(), wanted.get_state())


def test_temperature_zero_is_the_best():
    assert draws(temperature=0.0)[0] == 1


def test_places_of_one_row_are_drawn_independently():
    config = dlm.SamplingConfig(gen_length=MANY, block_length=MANY, steps=1, temperature=1.0)
    out = dlm.generate(Table(torch.tensor([[*FOUR, 0.0]]).log()), dlm.Canvas.from_prompts([[0]], MANY, MASK), config)
    p = expected(FOUR, 1.0)
    error = (torch.bincount(out.sequences[0], minlength=5) / MANY - p).abs()
    assert (error <= 4 * (p * (1 - p) / MANY).sqrt() + 1e-12).all()
    pairs = torch.bincount(out.sequences[0, ::2] * 4 + out.sequences[0, 1::2], minlength=16).double() / (MANY / 2)
    both = (p[:4, None] * p[None, :4]).flatten()
    assert ((pairs - both).abs() <= 4.5 * (both * (1 - both) / (MANY / 2)).sqrt()).all()


def test_top_k():
    assert draws(temperature=5.0, top_k=1)[0] == 1
    two = draws(temperature=1.0, top_k=2)
    assert two[2:].sum() == 0
    assert two[0].item() == pytest.approx(0.625, abs=0.035)  # .5 / (.5 + .3)
    assert (draws(temperature=1.0, top_k=100) > 0)[:4].all()
    tied = draws([0.25, 0.25, 0.25, 0.25], temperature=1.0, top_k=2)  # the lowest ids
    assert (tied > 0).tolist() == [True, True, False, False, False]


def test_top_p_filters_before_the_temperature():
    """.5 + .3 reach .7; at temperature 10 the tempered probabilities are nearly even, and would need three tokens."""
    assert draws(temperature=10.0, top_p=1e-60)[0] == 1  # 0 in fp32: no token was left
    got = draws(temperature=10.0, top_p=0.7)
    assert got[2:].sum() == 0
    assert got[1] > 0.4
    assert draws(temperature=10.0, top_p=0.45)[0] == 1  # the best is always kept
    assert draws(temperature=10.0, top_p=1e-9)[0] == 1
    assert (draws(temperature=1.0, top_p=1.0)[:4] > 0).all()
    got = draws(temperature=10.0, top_p=0.85)  # .5 .3 .15
    assert got[3] == 0
    assert got[2] > 0.2


def test_top_p_and_top_k_together():
    got = draws(temperature=10.0, top_p=0.85, top_k=2)
    assert got[2:].sum() == 0
    assert got[1] > 0.4


@pytest.mark.parametrize("tempered", [False, True])
def test_confidence_of_the_token_drawn_is_tempered_or_not(tempered):
    states, _, tokens = run(table(FOUR), 1, temperature=2.0, tempered_confidence=tempered, seed=5)
    p = expected(FOUR, 2.0 if tempered else 1.0)[tokens[0]]
    assert states[0].confidence[0, 1].item() == pytest.approx(p.item(), abs=1e-5)
    # .5 ** 20 and .3 ** 20: certain
    states, _, _ = run(table(FOUR), 1, temperature=0.05, tempered_confidence=tempered)
    assert states[0].confidence[0, 1].item() == pytest.approx(1.0 if tempered else 0.5, abs=1e-3)


def test_mask_and_what_is_past_the_vocabulary_are_never_proposed():
    # The mask 4 has .6; 5 and 6 are padding of the embedding and have .3; of the real ones 2 is best.
    row = [0.02, 0.01, 0.05, 0.02, 0.6, 0.2, 0.1]
    model = Probabilities([row] * 3)
    canvas = dlm.Canvas.from_prompts([[0]], 2, MASK)
    for temperature in (0.0, 1.0, 100.0):
        config = dlm.SamplingConfig(gen_length=2, block_length=2, temperature=temperature)
        tokens = torch.cat(
            [list(dlm.denoise(model, canvas, dlm.SamplingConfig(**vars(config) | {"seed": seed}), vocab_size=5))[-1]
             .canvas.tokens[0, 1:] for seed in range(40)]
        )  # fmt: skip
        assert tokens.max() < 4
        assert temperature > 0 or (tokens == 2).all()
    # Without a vocabulary size, only the mask is kept out.
    assert run(model, 2)[2] == [5, 5]
