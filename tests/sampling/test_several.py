"""Several blocks at once (`pipeline`) and the stability rule, by hand and against recomputing everything."""

import math
import random

import pytest
import torch

from dlm import Canvas, SamplingConfig, denoise, generate
from dlm.sampling.commit import COMMITS, Step
from tests.helpers.toys import MASK, Predictor, Probabilities, Recorder, tiny_model

# Probability of token 0 at slots 0..5, blocks of 2, threshold 0.9. The first block is half done after pass 1.
SURE = [0.95, 0.6, 0.97, 0.7, 0.99, 0.8]


def table():
    rows = [[p, (1 - p) * 0.6, (1 - p) * 0.4, 1e-9] for p in SURE]
    return Probabilities(rows)


def commits(**options):
    options = {"block_length": 2, "gen_length": 6, "commit": "threshold", "threshold": 0.9} | options
    states = denoise(table(), Canvas.from_prompts([[]], 6, 3), SamplingConfig(method="pipeline", **options))
    return [state.committed[0].nonzero()[:, 0].tolist() for state in states]


def test_the_next_block_opens_when_the_one_before_is_half_done():
    # Pass 1: block 0 alone, slot 0 is sure. It is half done: block 1 opens. Pass 2: slot 1 is the best of block 0,
    # which must commit; slot 2 is sure. Block 0 is done, block 1 half: block 2 opens. Pass 3: slot 3 is forced, slot 4
    # sure.
    assert commits() == [[0], [1, 2], [3, 4], [5]]


def test_a_block_is_not_forced_before_its_predecessor_is_mostly_done():
    # Nothing is sure: block 1 opens after pass 1 and commits only once block 0 is done, or from the share on.
    assert commits(threshold=1.0) == [[0], [1], [2], [3], [4], [5]]
    assert commits(threshold=1.0, force_share=0.5) == [[0], [1, 2], [3, 4], [5]]


def test_all_open_from_the_start_is_one_block_a_pass_more():
    assert commits(open_share=0.0) == [[0], [1, 2], [3, 4], [5]]
    assert commits(open_share=1.0) == [[0], [1], [2], [3], [4], [5]]


def test_one_block_is_the_threshold_rule():
    model, options = tiny_model(1), {"gen_length": 7, "block_length": 7, "commit": "threshold", "threshold": 0.3}
    a = generate(model, [[1, 2]], SamplingConfig(method="pipeline", **options))
    b = generate(model, [[1, 2]], SamplingConfig(method="none", **options))
    assert torch.equal(a.sequences, b.sequences) and a.nfe.tolist() == b.nfe.tolist()


@pytest.mark.parametrize("commit", ["threshold", "stable"])
def test_the_cache_is_exact_for_a_block_causal_model(commit):
    rng, model, fewer = random.Random(0), tiny_model(2, block_length=3, sharp=2.5), 0
    for _ in range(8):
        options = {
            "commit": commit,
            "threshold": rng.choice([0.2, 0.5, 0.9]),
            "kl_bound": 1.0,
            "open_share": rng.choice([0.0, 0.3, 0.5, 1.0]),
            "force_share": rng.choice([0.3, 0.95]),
            "cfg_scale": rng.choice([0.0, 0.5]),
            "seed": rng.randrange(99),
        }
        rows = [[rng.randrange(MASK) for _ in range(rng.randint(1, 5))] + [MASK] * 8 for _ in range(2)]
        rows[1][4:6] = [3, 7]  # given text between the blanks
        rows[1].append(5)
        canvas = Canvas.from_templates(rows, MASK)
        *_, a = denoise(model, canvas, SamplingConfig(method="pipeline", **options))
        *_, b = denoise(model, canvas, SamplingConfig(method="pipeline_causal", **options))
        assert torch.equal(a.canvas.tokens, b.canvas.tokens), options
        assert a.nfe.tolist() == b.nfe.tolist()
        fewer += int(b.positions_computed.sum()) < int(a.positions_computed.sum())
        *_, alone = denoise(model, Canvas.from_templates(rows[:1], MASK), SamplingConfig(method="pipeline", **options))
        assert torch.equal(alone.canvas.tokens[0], a.canvas.tokens[0, : len(rows[0])])
    assert fewer == 8


def test_closed_blocks_of_a_block_causal_model_are_not_computed():
    model = Recorder(tiny_model(3, block_length=2))
    model.config = model.model.config
    options = {"gen_length": 8, "block_length": 2, "commit": "threshold", "threshold": 1.0}
    generate(model, [[1, 2]], SamplingConfig(method="pipeline_causal", **options))
    computed = [positions[0].tolist() for _, positions, _ in model.calls]
    assert computed[0] == [0, 1, 2, 3] and computed[1] == [2, 3, 4, 5]  # half of block 0 is done: block 1 is open
    assert computed[2] == [2, 3, 4, 5]  # block 0 is done, and its keys saw a mask


# --- KLASS ---------------------------------------------------------------------------------------------------------


class Changing(Predictor):
    """Three tokens at three slots; the prediction of slot 1 changes from pass to pass, and slot 2 is never sure."""

    def logits(self, tokens, slots):
        turn = len(self.calls)
        p = torch.tensor([[0.95, 0.03, 0.02], [0.9, 0.05, 0.05], [0.5, 0.3, 0.2]], dtype=torch.float64)
        if turn % 2:
            p[1] = torch.tensor([0.96, 0.02, 0.02])
        return torch.nn.functional.pad(p.log(), (0, 1), value=-60.0)[None].expand(len(tokens), -1, -1)


def test_a_place_is_stable_after_as_many_passes_as_asked_below_the_bound():
    config = SamplingConfig(gen_length=3, block_length=3, commit="stable", threshold=0.9, kl_bound=0.01, kl_passes=1)
    states = list(denoise(Changing(), Canvas.from_prompts([[]], 3, 3), config))
    found = [state.committed[0].nonzero()[:, 0].tolist() for state in states]
    # Pass 1 knows no change: the best place, slot 1 (0.96). Pass 2: slot 0 did not change and is sure. Then the rest.
    assert found == [[1], [0], [2]]
    # KL((.9,.05,.05) || (.96,.02,.02)) = 0.9 ln(.9/.96) + 0.1 ln 2.5 = 0.0335 nats
    assert 0.9 * math.log(0.9 / 0.96) + 0.1 * math.log(2.5) == pytest.approx(0.0335, abs=1e-4)


def test_two_passes_back():
    options = {"gen_length": 3, "block_length": 3, "commit": "stable", "threshold": 0.3, "kl_bound": 0.01}
    passes = {}
    for back in (1, 2, 3):
        states = list(denoise(Steady(), Canvas.from_prompts([[]], 3, 3), SamplingConfig(**options, kl_passes=back)))
        passes[back] = [int(state.committed.sum()) for state in states]
    assert passes == {1: [1, 2], 2: [1, 1, 1], 3: [1, 1, 1]}


class Steady(Changing):
    def logits(self, tokens, slots):
        p = torch.tensor([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], dtype=torch.float64)
        return torch.nn.functional.pad(p.log(), (0, 1), value=-60.0)[None].expand(len(tokens), -1, -1)


def test_the_rule_itself():
    sure = torch.tensor([[0.95, 0.99, 0.5], [0.95, 0.99, 0.5]])
    eligible = torch.tensor([[True, True, True], [True, False, True]])
    stable = torch.tensor([[True, False, True], [False, True, True]])
    step = Step(torch.ones(2, dtype=torch.int64), threshold=0.9, stable=stable)
    assert COMMITS["stable"](sure, eligible, step).tolist() == [[True, False, False], [True, False, False]]


@pytest.mark.parametrize(
    "options",
    [
        {"commit": "quota"},
        {"commit": "threshold", "revise": "edit"},
        {"commit": "threshold", "grow": "block"},
        {"commit": "threshold", "sub_block_length": 2},
        {"commit": "threshold", "open_share": 1.5},
        {"commit": "stable", "kl_passes": 0},
        {"commit": "stable", "kl_bound": -1.0},
    ],
)
def test_contradictions_are_refused_in_one_line(options):
    with pytest.raises(ValueError) as found:
        SamplingConfig(method="pipeline", **options)
    assert "\n" not in str(found.value)
