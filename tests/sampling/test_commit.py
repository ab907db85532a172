"""Which places are committed, by hand on predictors whose probabilities are written down (`helpers.tables`)."""

import math

import pytest
import torch

import dlm
from dlm import SamplingConfig, generate
from dlm.sampling.commit import Step, _sorted, by_quota, choose
from tests.helpers.tables import MASK, best, run, steps, table
from tests.helpers.toys import Table, tiny_model, trace

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
def test_one_place_and_scores_within_one_are_ordered_as_many_places_and_any_scores(dtype):
    """A CPU orders scores within one by fewer operations, and one place needs no sorting: ties, -inf, NaN and scores
    above one are what they were."""
    generator = torch.Generator().manual_seed(0)
    for number in range(300):
        scores = torch.rand(3, 9, generator=generator, dtype=dtype)
        scores = (8 * scores).round() / 8 if number % 3 == 0 else scores * (1, 6, -6)[number // 3 % 3]
        scores += torch.rand(3, 9, generator=generator, dtype=dtype) * 2 * torch.finfo(dtype).eps
        if number % 5 == 0:
            scores[torch.rand(3, 9, generator=generator) < 0.2] = (-torch.inf, torch.nan)[number % 2]
        eligible = torch.rand(3, 9, generator=generator) < 0.6
        ones = Step(torch.ones(3, dtype=torch.int64))
        assert torch.equal(by_quota(scores, eligible, Step(None)), by_quota(scores, eligible, ones))
        far = torch.nn.functional.pad(scores, (0, 1), value=2.0)  # a place above one, that is not eligible
        order = _sorted(far, torch.nn.functional.pad(eligible, (0, 1)))[1]
        assert torch.equal(_sorted(scores, eligible)[1], order[order < 9].view(3, 9))


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
