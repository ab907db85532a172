"""Which token is proposed and which places are committed, by hand, on predictors whose probabilities are written down.

One prompt token (slot 0), then the region. V = 5 with the mask 4, so tokens are 0 to 3. `Probabilities` gives the
probabilities of each slot whatever the canvas holds, so what is committed in each pass follows by hand.
"""

import math

import pytest
import torch

import dlm
from dlm import SamplingConfig, generate
from dlm.sampling.commit import Step, by_quota, choose
from dlm.sampling.propose import draw, propose
from tests.helpers.toys import Probabilities, Table, tiny_model, trace

MASK = 4


def best(*confidences, token=0):
    """A table where slot i+1 proposes `token` with this probability and the rest goes to the next token."""
    rows = [[0.2] * 5]
    for c in confidences:
        row = [0.0] * 5
        row[token], row[token + 1] = c, 1 - c
        rows.append(row)
    return Probabilities(rows)


def table(*rows):
    return Probabilities([[0.2] * 5, *[[*row, 0.0] for row in rows]])


def run(model, length, **options):
    config = dlm.SamplingConfig(gen_length=length, **({"block_length": length} | options))
    canvas = dlm.Canvas.from_prompts([[0]], length, MASK)
    states, steps = trace(model, canvas, config)
    return states, steps[0, 1:].tolist(), states[-1].canvas.tokens[0, 1:].tolist()


def steps(model, length, **options):
    return run(model, length, **options)[1]


SIX = best(0.55, 0.9, 0.51, 0.8, 0.7, 0.6)  # best first: slots 1, 3, 4, 5, 0, 2 of the region


# --- spacing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"steps": 3, "spacing": 1}, [2, 1, 3, 1, 2, 3]),  # 1 and 3; 4 and 0, for 5 is beside 4; 5 and 2
        ({"steps": 3, "spacing": 2}, [2, 1, 3, 2, 1, 3]),  # 1 and 4, for 3 is two slots from 1
        ({"steps": 2, "spacing": 3}, [2, 1, 2, 1, 2, 1]),  # 1 and 5, and the best near one where no other is left
        ({"steps": 2, "spacing": 3, "spacing_threshold": 0.8}, [2, 1, 2, 1, 1, 2]),  # 1, 3: both sure; 4 is left
        ({"commit": "threshold", "threshold": 0.55}, [1, 1, 2, 1, 1, 1]),
        ({"commit": "threshold", "threshold": 0.55, "spacing": 1}, [2, 1, 3, 1, 2, 1]),  # none is filled up
        ({"commit": "threshold", "threshold": 0.55, "spacing": 1, "spacing_threshold": 0.7}, [2, 1, 3, 1, 1, 2]),
        ({"commit": "threshold", "threshold": 0.99, "spacing": 5}, [5, 1, 6, 2, 3, 4]),  # the best, where none is sure
        ({"steps": 6, "spacing": 5}, [5, 1, 6, 2, 3, 4]),
    ],
)
def test_spacing(options, want):
    assert steps(SIX, 6, **options) == want


def test_spacing_of_several_rows_and_of_places_that_are_not_all_masked():
    """Places are apart by their slots, not by their number among the places that are left."""
    confidence = torch.tensor([[0.9, 0.8, 0.7, 0.0], [0.6, 0.9, 0.8, 0.7]])
    eligible = torch.tensor([[True, True, True, False], [True] * 4])
    slots = torch.tensor([[0, 4, 5, 9], [0, 1, 2, 3]])
    step = Step(torch.tensor([3, 2]), threshold=0.5, spacing=1, slots=slots)
    spaced = choose("threshold", confidence, eligible, step)
    assert spaced.tolist() == [[True, True, False, False], [False, True, False, True]]
    filled = choose("quota", confidence, eligible, step)
    assert filled.tolist() == [[True, True, True, False], [False, True, False, True]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"commit": "sequential"}, "says itself which places"),
        ({"commit": "dynamic"}, "use quota, threshold"),
        ({"method": "pipeline", "commit": "threshold"}, "go on in every pass"),
        ({"commit": "threshold", "spacing": -1}, "0 or more"),
        ({"commit": "threshold", "spacing_threshold": 2.0}, "at most 1"),
    ],
)
def test_spacing_is_refused_where_it_cannot_work(options, words):
    with pytest.raises(ValueError, match=words):
        SamplingConfig(**({"spacing": 1} | options))


# --- quota -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "want"),
    [
        (1, [1, 1, 1, 1, 1, 1]),
        (2, [2, 1, 2, 1, 1, 2]),  # 3 + 3
        (3, [3, 1, 3, 1, 2, 2]),  # 2 + 2 + 2
        (4, [3, 1, 4, 1, 2, 2]),  # 6 = 4 + 2, the remainder first: 2 + 2 + 1 + 1
        (5, [4, 1, 5, 1, 2, 3]),  # 2 + 1 + 1 + 1 + 1
        (6, [5, 1, 6, 2, 3, 4]),
        (50, [5, 1, 6, 2, 3, 4]),  # a quota of zero costs no pass
        (None, [5, 1, 6, 2, 3, 4]),  # one token a pass
    ],
)
def test_quota_gives_the_remainder_first(passes, want):
    states, got, _ = run(SIX, 6, steps=passes)
    assert got == want
    assert states[-1].nfe.tolist() == [max(want)]


@pytest.mark.parametrize(
    ("block", "passes", "want"),
    [
        (3, 2, [1, 1, 1, 2, 2, 2]),
        (3, 3, [1, 1, 2, 3, 3, 3]),  # 3 passes over 2 blocks: 2 + 1; 3 tokens over 2 passes: 2 + 1
        (3, 4, [1, 1, 2, 3, 3, 4]),
        (2, 4, [2, 1, 3, 3, 4, 4]),  # 4 passes over 3 blocks: 2 + 1 + 1
        (2, 5, [2, 1, 4, 3, 5, 5]),  # 2 + 2 + 1
        (4, 2, [1, 1, 1, 1, 2, 2]),  # the last block is shorter, and gets passes in proportion
        (4, 3, [2, 1, 2, 1, 3, 3]),  # 2 + 1
        (4, 6, [3, 1, 4, 2, 5, 6]),  # 4 + 2
        (1, 6, [1, 2, 3, 4, 5, 6]),
        (100, 2, [2, 1, 2, 1, 1, 2]),  # a block longer than the region is the region
    ],
)
def test_passes_are_shared_over_blocks(block, passes, want):
    assert steps(SIX, 6, block_length=block, steps=passes) == want


def test_every_block_gets_a_pass():
    """Nine tokens in blocks of 8 and 1, two passes: in proportion the short block would get none."""
    model = best(*[0.9 - 0.01 * i for i in range(9)])
    assert steps(model, 9, block_length=8, steps=2) == [1] * 8 + [2]


def test_quota_ties_go_to_the_lowest_index():
    assert steps(best(*[0.6] * 6), 6, steps=3) == [1, 1, 2, 2, 3, 3]
    assert steps(best(*[0.6] * 6), 6, steps=2, confidence="margin") == [1, 1, 1, 2, 2, 2]
    assert steps(best(*[0.6] * 6), 6, steps=2, confidence="entropy") == [1, 1, 1, 2, 2, 2]
    assert steps(best(*[0.6] * 40), 40, steps=4) == sorted([1, 2, 3, 4] * 10)  # enough for an unstable sort to show


@pytest.mark.parametrize("size", [0.3, 1.5, 3.0, 5.7, 11.6])
def test_rounding_breaks_no_tie_at_any_size(size):
    """Entropies of rows of masks are near log V, where a unit in the last place was once as large as the grid."""
    middle = round(-size * 2**12) / 2**12  # in the middle of a cell of the grid
    near = torch.tensor([[middle, middle * (1 - 1.5 * torch.finfo(torch.float32).eps)]])  # some units off
    assert near[0, 1] > near[0, 0]
    for values, first in ((near, [True, False]), (near * torch.tensor([[1.0, 0.999]]), [False, True])):
        step = Step(torch.tensor([1]))
        assert by_quota(values, torch.ones(1, 2, dtype=torch.bool), step).tolist() == [first]


def test_tokens_tie_to_the_lowest_id():
    assert run(table([0.1, 0.4, 0.4, 0.1]), 1)[2] == [1]


def test_uneven_quota_as_dllm_splits_it():
    """8 tokens in 3 passes: 3, 3, 2 as LLaDA, or what is left over the passes left, half to even: 3, 2, 3."""
    model = best(0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
    assert steps(model, 8, steps=3) == [1, 1, 1, 2, 2, 2, 3, 3]
    assert steps(model, 8, steps=3, split="rounded") == [1, 1, 1, 2, 2, 3, 3, 3]
    # 3 in 4 passes: round(.75) = 1, round(2 / 3) = 1, round(1 / 2) = 0, 1; the empty one costs no pass
    assert steps(best(0.9, 0.8, 0.7), 3, steps=4, split="rounded") == [1, 2, 3]


# --- threshold, factor, entropy bound ----------------------------------------------------------------------------


def test_threshold():
    # .9 .8 | then the best alone: .7 | .6 | .55 | .51
    assert steps(SIX, 6, commit="threshold", threshold=0.75) == [4, 1, 5, 1, 2, 3]
    assert steps(SIX, 6, commit="threshold", threshold=0.0) == [1] * 6
    assert steps(SIX, 6, commit="threshold", threshold=1.0) == [5, 1, 6, 2, 3, 4]


def test_threshold_stays_inside_the_block():
    # blocks .55 .9 | .51 .8 | .7 .6: each commits its confident place, then the other
    assert steps(SIX, 6, commit="threshold", threshold=0.65, block_length=2) == [2, 1, 4, 3, 5, 6]


def test_factor():
    # (n + 1)(1 - c_n) over .9 .8 .7 .6 .55 .51: .2 .6 1.2 2 2.7 3.43; the largest n below 1 is 2.
    # Then .7 .6: .6 1.2 -> 1; .6 .55: .8 1.35 -> 1; .55 .51: .9 1.47 -> 1; .51: .98 -> 1.
    assert steps(SIX, 6, commit="factor", factor=1.0) == [4, 1, 5, 1, 2, 3]
    # Below 2.1: n = 4 (2); then .55 .51: .9 1.47 -> both.
    assert steps(SIX, 6, commit="factor", factor=2.1) == [2, 1, 2, 1, 1, 1]
    # Below 0.1: never, so one a pass.
    assert steps(SIX, 6, commit="factor", factor=0.1) == [5, 1, 6, 2, 3, 4]


def test_entropy_bound():
    # H(.99) = .0560, H(.95) = .1985, H(.9) = .3251, H(.8) = .5004, H(.5 + eps) = .69
    model = best(0.8, 0.99, 0.501, 0.95, 0.9)
    # Sum of the smaller ones, sum H - max H: 0, .0560, .2545, .5796, 1.08: three are within .3.
    # Then .5004 | .6931: 0, .5004: one. Then one.
    assert steps(model, 5, commit="entropy_bound", entropy_bound=0.3) == [2, 1, 3, 1, 1]
    # Within .6: four (.5796).
    assert steps(model, 5, commit="entropy_bound", entropy_bound=0.6) == [1, 1, 2, 1, 1]
    # Within 0: one a pass, entropy ascending.
    assert steps(model, 5, commit="entropy_bound", entropy_bound=0.0) == [4, 1, 5, 2, 3]


def test_entropy_bound_orders_by_entropy_whatever_the_probability():
    # [.58 .42]: H = .6803. [.59 .2 .1 .11]: H = 1.1064. The second is more probable and less certain.
    model = table([0.59, 0.2, 0.1, 0.11], [0.58, 0.42, 0, 0])
    assert steps(model, 2, commit="entropy_bound", entropy_bound=0.1) == [2, 1]


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


# --- end of text -------------------------------------------------------------------------------------------------

EOS = 3


def test_suppress_eos():
    # End of text .6, token 0 .3, token 1 .1: without it 0 has .75, as LLaDA's logits_eos_inf leaves it.
    model = table([0.3, 0.1, 0.0, 0.6], [0.3, 0.1, 0.0, 0.6])
    assert run(model, 2, eos_token_id=EOS)[2] == [EOS, EOS]
    states, _, tokens = run(model, 2, eos_token_id=EOS, suppress_eos=True, steps=1)
    assert tokens == [0, 0]
    assert states[0].confidence[0, 1].item() == pytest.approx(0.75, abs=1e-5)
    assert run(model, 2, eos_token_id=(EOS, 0), suppress_eos=True)[2] == [1, 1]
    for temperature in (0.5, 1.0, 50.0):
        for seed in range(30):
            assert EOS not in run(model, 2, eos_token_id=EOS, suppress_eos=True, temperature=temperature, seed=seed)[2]


def test_delay_eos():
    # End of text is the surest guess of the middle two; it is committed after the others all the same.
    model = table([0.5, 0.3, 0.2, 0.0], [0.05, 0.0, 0.0, 0.95], [0.1, 0.0, 0.0, 0.9], [0.4, 0.3, 0.3, 0.0])
    assert steps(model, 4, eos_token_id=EOS) == [3, 1, 2, 4]
    states, got, tokens = run(model, 4, eos_token_id=EOS, delay_eos=True)
    assert got == [1, 3, 4, 2]
    said = sum(state.confidence for state in states)[0, 1:]  # what held it back is not what is reported
    assert said.tolist() == pytest.approx([0.5, 0.95, 0.9, 0.4], abs=1e-5)
    assert tokens == [0, EOS, EOS, 0]
    # A threshold that both guesses of end of text reach does not commit them early either.
    _, got, tokens = run(model, 4, eos_token_id=EOS, delay_eos=True, commit="threshold", threshold=0.45)
    assert got[0] == 1
    assert got[3] == 2
    assert min(got[1], got[2]) == 3
    assert tokens == [0, EOS, EOS, 0]


@pytest.mark.parametrize("commit", ["quota", "threshold", "factor", "entropy_bound"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_delay_eos_at_any_temperature_and_commit(temperature, commit):
    """In every pass, end of text is committed only if nothing else was proposed and left behind in that pass."""
    rows = [[0.4, 0.2, 0.0, 0.4], [0.1, 0.1, 0.1, 0.7], [0.3, 0.3, 0.3, 0.1], [0.05, 0.0, 0.0, 0.95]]
    for seed in range(25):
        options = {"eos_token_id": EOS, "delay_eos": True, "temperature": temperature, "commit": commit, "seed": seed}
        states, got, tokens = run(table(*rows), 4, threshold=0.3, **options)
        assert sorted(set(got)) == list(range(1, len(states) + 1))
        if temperature == 0:
            ends = [s for s, t in zip(got, tokens, strict=True) if t == EOS]
            others = [s for s, t in zip(got, tokens, strict=True) if t != EOS]
            assert not ends or not others or min(ends) >= max(others)


# --- broken predictors -------------------------------------------------------------------------------------------


PAIRS = [
    (commit, confidence)
    for commit, confidences in {
        "quota": ("probability", "margin", "entropy", "random"),
        "threshold": ("probability", "margin", "entropy", "random"),
        "factor": ("probability", "margin"),
        "entropy_bound": ("entropy",),
    }.items()
    for confidence in confidences
]


@pytest.mark.parametrize("other", [0.0, -1e4, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("commit", "confidence"), PAIRS)
def test_all_weight_on_the_mask(other, temperature, commit, confidence):
    row = torch.full((5,), other)
    row[MASK] = 30.0
    config = {
        "gen_length": 4,
        "block_length": 2,
        "temperature": temperature,
        "commit": commit,
        "confidence": confidence,
    }
    canvas = dlm.Canvas.from_prompts([[0]], 4, MASK)
    states, got = trace(Table(row[None]), canvas, dlm.SamplingConfig(**config))
    assert (states[-1].canvas.tokens[0, 1:] != MASK).all()
    assert (got[0, 1:] > 0).all()
    assert len(states) <= 4


@pytest.mark.parametrize("commit", ["quota", "threshold", "factor", "entropy_bound"])
@pytest.mark.parametrize("confidence", ["probability", "margin", "entropy", "random"])
def test_what_does_not_go_together_is_refused_with_a_reason(commit, confidence):
    if (commit, confidence) in PAIRS:
        dlm.SamplingConfig(commit=commit, confidence=confidence)
    else:
        with pytest.raises(ValueError, match=f"{commit}.*{confidence}"):
            dlm.SamplingConfig(commit=commit, confidence=confidence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_that_rounding_breaks_are_broken_by_place(dtype):
    """Under guidance a row of masks without a prompt committed in an order that depended on its batch."""
    even = torch.full((1, 6), 0.025, dtype=dtype)
    noise = torch.tensor([[0.0, 1, -1, 1, 0, -1]], dtype=dtype) * torch.finfo(dtype).eps * 0.025
    eligible = torch.tensor([[False, True, True, True, True, True]])
    chosen = by_quota(even + noise, eligible, Step(torch.tensor([2])))
    assert chosen.tolist() == [[False, True, True, False, False, False]]
    last = torch.tensor([[-torch.inf, -torch.inf, 0.5]], dtype=dtype)  # what delay_eos makes of end-of-text
    chosen = by_quota(last, torch.tensor([[False, True, True]]), Step(torch.tensor([2])))
    assert chosen.tolist() == [[False, True, True]]


def test_rows_of_masks_alone_do_not_depend_on_their_batch():
    for seed in range(4):
        torch.manual_seed(seed)
        model = tiny_model().double()
        for method in ("none", "dual", "c2f"):
            config = SamplingConfig(gen_length=12, block_length=4, method=method, cfg_scale=1.5)
            together = generate(model, [[], [1, 2, 3], [], [4, 4]], config).sequences
            assert torch.equal(together[2], generate(model, [[]], config).sequences[0])


def test_order_temperature_draws_places_from_the_rows_generators():
    """It crashed: the loop looked for the generators where they no longer were."""
    from dlm import SamplingConfig, generate
    from tests.helpers.toys import tiny_model

    model, found = tiny_model(3), set()
    for seed in range(4):
        config = SamplingConfig(gen_length=6, block_length=6, steps=2, order_temperature=5.0, seed=seed)
        out = generate(model, [[1, 2]], config)
        again = generate(model, [[7], [1, 2]], SamplingConfig(**vars(config) | {"seed": (9, seed)}))
        assert out.sequences[0].tolist() == again.sequences[1].tolist()
        found.add(tuple(out.sequences[0].tolist()))
    assert len(found) > 1


def test_origin_with_sub_blocks_ends():
    """Its last pass committed all of one sub-block, and nothing was ever committed after it."""
    from dlm import Canvas, SamplingConfig, denoise
    from tests.helpers.toys import MASK, tiny_model

    for seed in range(4):
        config = SamplingConfig(gen_length=9, block_length=9, sub_block_length=2, steps=3, commit="origin", seed=seed)
        for state in denoise(tiny_model(1), Canvas.from_prompts([[1]], 9, MASK), config):
            assert state.step < 30
        assert not state.canvas.masked.any()
