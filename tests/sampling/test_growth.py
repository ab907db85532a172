"""Growth that moves what is written: DAEDAL's rule and DreamOn's tokens, worked by hand, and random settings."""

import random

import pytest
import torch

from dlm import Canvas, SamplingConfig, denoise, generate
from tests.helpers.toys import MASK, Predictor, Watch, tiny_model

END, EXPAND, DELETE = 38, 37, 36
A, B, C = 1, 2, 3


def states_of(model, rows, tokens=(None, None), templates=False, **options):
    config = SamplingConfig(**options)
    make = Canvas.from_templates if templates else None
    canvas = make(rows, MASK) if make else Canvas.from_prompts(rows, config.start_length, MASK)
    return list(denoise(model, canvas, config, eos_token_ids=(END,), growth_tokens=tokens))


def text(state, row=0):
    return state.canvas.tokens[row][state.canvas.valid[row]].tolist()


class Scripted(Predictor):
    """p(token) at each slot by a function of the visible ids: `rule(ids) -> [(token, probability)]` a slot."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def logits(self, tokens, slots):
        out = torch.full((*tokens.shape, 40), -40.0, dtype=torch.float64)
        for row, ids in enumerate(tokens.tolist()):
            for slot, (token, p) in enumerate(self.rule(ids)):
                out[row, slot] = float(torch.tensor((1 - p) / 39, dtype=torch.float64).clamp_min(1e-15).log())
                out[row, slot, token] = float(torch.tensor(p, dtype=torch.float64).log())
        return out


# --- confidence ----------------------------------------------------------------------------------------------------


def ends_from(first):
    """End-of-text with 0.99 from a slot on, token A with 0.8 before it."""
    return lambda ids: [(END, 0.99) if slot >= first else (A, 0.8) for slot in range(len(ids))]


def test_masks_are_added_before_the_first_commit_until_the_tail_is_certain_of_the_end():
    # Prompt of 2, 4 masks, tail of 4 slots, 3 more at a time; end-of-text from slot 7 on. Tails: slots 2..5: none of 4;
    # 5..8: (8, 7 end) 2 of 4 = 0.5; 8..11: all. So 4 -> 7 -> 10 masks, and the third pass commits.
    options = {"gen_length": 20, "initial_length": 4, "grow": "confidence", "grow_by": 3, "tail_length": 4}
    states = states_of(Scripted(ends_from(7)), [[B, B]], tail_start=0.6, block_length=10, grow_below=0.0, **options)
    assert [int(state.canvas.valid.sum()) for state in states[:4]] == [9, 12, 12, 12]
    assert [int(state.committed.sum()) for state in states[:4]] == [0, 0, 1, 1]
    assert text(states[-1]) == [B, B] + [A] * 5 + [END] * 5
    assert states[-1].nfe.tolist() == [12]  # 2 passes that only added, and one for each of the 10 places


def test_the_limit_stops_the_growth():
    states = states_of(
        Scripted(ends_from(99)), [[B]], gen_length=9, initial_length=4, grow="confidence", grow_by=4, tail_length=4
    )
    assert text(states[-1]) == [B] + [A] * 9
    assert [int(state.canvas.valid.sum()) for state in states[:3]] == [9, 10, 10]


def test_an_unsure_place_becomes_several_while_the_tail_is_unsure():
    # Slot 1 is unsure (0.05), the tail is not certain enough to stop growing (0.5 of the bound 0.9).
    def rule(ids):
        return [(C, 0.05) if slot == 1 and len(ids) < 7 else (A, 0.8) for slot in range(len(ids))]

    options = {"gen_length": 9, "initial_length": 4, "grow": "confidence", "grow_by": 3, "tail_length": 2}
    states = states_of(Scripted(rule), [[B]], tail_start=0.0, block_length=4, **options)
    # Pass 1 commits slot 2 (A), and slot 1 becomes three masks: [B, M, M, M, A, M, M].
    assert text(states[0]) == [B, MASK, MASK, MASK, A, MASK, MASK]
    assert states[0].committed[0].nonzero()[:, 0].tolist() == [4]
    assert text(states[-1]) == [B] + [A] * 6
    certain = states_of(Scripted(rule), [[B]], tail_start=0.0, tail_bound=0.0, block_length=4, **options)
    assert len(text(certain[-1])) == 5


def test_rows_grow_at_their_own_pace_and_as_they_would_alone():
    rows = [[B, B], [B], [B, B, B, B]]
    options = {"gen_length": 12, "initial_length": 2, "grow": "confidence", "grow_by": 2, "tail_length": 2}
    last = states_of(Scripted(ends_from(6)), rows, block_length=3, **options)[-1]
    for row, prompt in enumerate(rows):
        alone = states_of(Scripted(ends_from(6)), [prompt], block_length=3, **options)[-1]
        assert text(alone) == text(last, row)
        assert alone.nfe[0] == last.nfe[row]
    assert [len(text(last, row)) for row in range(3)] == [8, 9, 8]


@pytest.mark.parametrize("method", ["prefix", "dual", "vicinity"])
def test_after_a_change_no_key_of_another_token_is_read(method):
    model, config = Watch(tiny_model(3, sharp=2.0)), SamplingConfig(
        gen_length=16, initial_length=6, grow="confidence", grow_by=3, tail_length=3, method=method, block_length=4,
        tail_bound=1.0, grow_below=0.6,
    )  # fmt: skip
    canvas = Canvas.from_prompts([[1, 2], [3, 4, 5]], 6, MASK)
    states = list(model.follow(denoise(model, canvas, config, eos_token_ids=(END,)), canvas))
    assert len({int(state.canvas.valid[0].sum()) for state in states}) > 2
    assert not states[-1].canvas.masked.any()


# --- expand --------------------------------------------------------------------------------------------------------


def dreamon(ids):
    """Between A and C, with one mask: expand. With two: the first expands again, the second is B. Three: B B delete."""
    masks = [slot for slot, token in enumerate(ids) if token in (MASK, B)]
    found = [(A, 0.5)] * len(ids)
    words = {1: [(EXPAND, 0.9)], 2: [(EXPAND, 0.9), (B, 0.8)], 3: [(B, 0.9), (DELETE, 0.95), (B, 0.7)]}[len(masks)]
    for slot, word in zip(masks, words, strict=True):
        found[slot] = word
    return found


def test_an_expand_token_becomes_two_masks_and_a_delete_token_takes_its_place_out():
    states = states_of(
        Scripted(dreamon), [[A, MASK, C]], (EXPAND, DELETE), templates=True, gen_length=8, grow="expand", block_length=8
    )
    seen = [text(state) for state in states]
    assert seen[0] == [A, MASK, MASK, C]
    assert seen[1] == [A, MASK, MASK, MASK, C]
    assert seen[2][0] == A and seen[2][-1] == C and len(seen[2]) == 4  # the middle one was deleted
    # With two masks the script expands again, and so on: the budget of 2 x 8 expansions ends it.
    assert not states[-1].canvas.masked.any() and EXPAND not in seen[-1] and DELETE not in seen[-1]


def test_by_hand_with_end_of_text_as_the_delete_token():
    def rule(ids):
        if ids.count(MASK) == 1 and B not in ids:
            return [(EXPAND, 0.9) if token == MASK else (A, 0.5) for token in ids]
        places = iter([(B, 0.9), (END, 0.8)] if B not in ids else [(END, 0.8)])
        return [next(places) if token == MASK else (A, 0.5) for token in ids]

    states = states_of(
        Scripted(rule), [[A, MASK, C]], (EXPAND, None), templates=True, gen_length=4, grow="expand", suppress_eos=True
    )
    assert [text(state) for state in states] == [[A, MASK, MASK, C], [A, B, MASK, C], [A, B, C]]
    assert states[-1].nfe.tolist() == [3]
    assert [state.committed.sum().item() for state in states] == [0, 1, 0]


def test_the_limit_forbids_the_expand_token():
    states = states_of(
        Scripted(lambda ids: [(EXPAND, 0.9)] * len(ids)), [[]], (EXPAND, DELETE),
        gen_length=5, initial_length=1, grow="expand",
    )  # fmt: skip
    assert len(text(states[-1])) == 5
    assert EXPAND not in text(states[-1])


def test_where_nothing_grows_the_tokens_are_not_written():
    out = denoise(
        Scripted(lambda ids: [(EXPAND, 0.9)] * len(ids)), Canvas.from_prompts([[A]], 3, MASK),
        SamplingConfig(gen_length=3), growth_tokens=(EXPAND, DELETE),
    )  # fmt: skip
    *_, last = out
    assert EXPAND not in last.canvas.tokens


def test_generate_takes_the_checkpoints_tokens():
    model = tiny_model(7, sharp=3.0)
    model.config.expand_token_id, model.config.delete_token_id = EXPAND, DELETE
    out = generate(model, [[1, 2, 3]], SamplingConfig(gen_length=12, initial_length=4, grow="expand"))
    assert not torch.isin(out.sequences, torch.tensor([EXPAND, DELETE, MASK])).any()


# --- all together --------------------------------------------------------------------------------------------------


def test_random_settings_end_within_the_limit_and_do_not_depend_on_the_batch():
    rng, model, changed = random.Random(3), tiny_model(5, sharp=2.5), set()
    with torch.no_grad():
        model.model.transformer.ff_out.weight[DELETE:END] *= 3.0
    for _ in range(14):
        grow = rng.choice(["confidence", "expand"])
        options = {
            "gen_length": rng.randint(3, 12),
            "initial_length": rng.randint(1, 6),
            "grow": grow,
            "grow_by": rng.randint(1, 4),
            "grow_below": rng.choice([0.3, 0.9]),
            "tail_length": rng.randint(1, 5),
            "tail_start": rng.choice([0.05, 0.5]),
            "block_length": rng.randint(1, 5),
            "method": rng.choice(["none", "prefix", "dual", "vicinity"]),
            "commit": rng.choice(["quota", "threshold", "stable", "dynamic", "entropy_bound"]),
            "threshold": 0.3,
            "kl_bound": 1.0,
            "revise": rng.choice(["none", "edit", "remask"]) if grow == "confidence" else "none",
            "temperature": rng.choice([0.0, 2.0]),
            "cfg_scale": rng.choice([0.0, 0.0, 0.5]),
            "stop_at_eos": rng.random() < 0.3,
            "seed": rng.randrange(100),
        }
        rows = [[rng.randrange(36) for _ in range(rng.randint(1, 4))] for _ in range(2)]
        tokens = (EXPAND, rng.choice([DELETE, None]))
        states = states_of(model, rows, tokens, **options)
        last, sizes = states[-1].canvas, [int(state.canvas.valid[0].sum()) for state in states]
        assert not last.masked.any() and len(states) < 200
        for row, prompt in enumerate(rows):
            assert text(states[-1], row)[: len(prompt)] == prompt
            assert len(text(states[-1], row)) <= len(prompt) + options["gen_length"], options
        alone = states_of(model, rows[1:], tokens, **options | {"seed": options["seed"] + 1})[-1]
        assert text(alone) == text(states[-1], 1), options
        if len(set(sizes)) > 1:
            changed.add((grow, options["method"]))
    assert len(changed) >= 4, changed


@pytest.mark.parametrize(
    "options",
    [
        {"method": "c2f"},
        {"method": "block_causal"},
        {"steps": 4},
        {"commit": "ancestral"},
        {"regex": "a*"},
        {"suppress_eos": True},
        {"tail_start": 2.0},
        {"grow_by": 0},
        {"grow": "expand", "revise": "edit"},
    ],
)
def test_contradictions_are_refused_in_one_line(options):
    with pytest.raises(ValueError) as found:
        SamplingConfig(**{"grow": "confidence"} | options)
    assert "\n" not in str(found.value)


def test_what_the_model_or_the_canvas_cannot_do_is_refused():
    with pytest.raises(ValueError, match="behind a blank"):
        states_of(tiny_model(0), [[A, MASK, C]], templates=True, grow="confidence")
    with pytest.raises(ValueError, match="use grow 'block'"):
        states_of(tiny_model(0, block_length=4), [[A]], grow="confidence")
    with pytest.raises(ValueError, match="expand token"):
        states_of(tiny_model(0), [[A]], grow="expand")
