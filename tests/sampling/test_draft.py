"""Drafts change nothing: the tokens, confidences and order of plain decoding, from fewer passes."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from dlm import Canvas, SamplingConfig, denoise, generate
from dlm.cli.main import main
from dlm.kernels.linear import has_kernels
from dlm.kernels.packing import packed
from dlm.sampling.draft import Drafts
from tests.helpers.settings import case_of, models, settings
from tests.helpers.toys import MASK, Predictor, Probabilities, tiny_model

FREE, CAUSAL = ("none", "prefix", "dual", "vicinity"), ("none", "block_causal")


def run(model, prompts, config, length=None, **known):
    """(tokens, confidences, nfe, slots computed) of a batch."""
    canvas = Canvas.from_prompts(prompts, length or config.gen_length, MASK)
    sure = torch.zeros(canvas.tokens.shape)
    for state in denoise(model, canvas, config, eos_token_ids=(38,), **known):
        sure += state.confidence
    return state.canvas.tokens, sure, state.nfe, state.positions_computed


# ---------------------------------------------------------------- by hand


def test_predictions_that_do_not_change_need_one_pass_a_chain():
    """Four slots whose predictions are the same in every state: the first pass knows only its own state, the second
    verifies what is left, and no pass is left over."""
    table = [[0.6, 0.4, 0], [0.9, 0.1, 0], [0.3, 0.7, 0], [0.8, 0.2, 0]]
    canvas = Canvas.from_prompts([[]], 4, 2)
    order = {}
    for draft, want in ((0, [1, 1, 1, 1]), (1, [1, 2, 1]), (2, [1, 3]), (9, [1, 3])):
        model = Probabilities(table)
        states = list(denoise(model, canvas, SamplingConfig(gen_length=4, block_length=4, draft=draft)))
        assert [int(state.committed.sum()) for state in states] == want
        assert states[-1].canvas.tokens.tolist() == [[0, 0, 1, 0]]
        assert int(states[-1].nfe[0]) == len(model.calls) == len(want)
        order[draft] = [rows for rows, _ in model.calls]
    # rows of the model: the canvas and its drafts; with nine, states that are less probable too
    assert order == {0: [1, 1, 1, 1], 1: [1, 2, 1], 2: [1, 3], 9: [1, 10]}


class Turning(Predictor):
    """Slot 1 is 0 until slot 0 is written, and then 1: a guess that does not foresee it is wrong."""

    def logits(self, tokens, slots):
        first = torch.tensor([0.9, 0.1, 0, 0], dtype=torch.float64)
        after = torch.tensor([0.2, 0.8, 0, 0], dtype=torch.float64)
        other = torch.tensor([0.7, 0.3, 0, 0], dtype=torch.float64)
        out = other.expand(*slots.shape, 4).clone()
        out[:, 0] = first
        out[:, 1] = torch.where((tokens[:, :1] != 3), after, other)
        return out.log()


def test_a_wrong_guess_costs_a_row_and_no_token():
    """The pass after slot 0 was written guesses slot 1 = 0 from the prediction before; the truth is 1, so that the
    state after it needs a pass of its own, in which the last one is guessed rightly."""
    canvas = Canvas.from_prompts([[]], 3, 3)
    plain = list(denoise(Turning(), canvas, SamplingConfig(gen_length=3, block_length=3)))
    model = Turning()
    states = list(denoise(model, canvas, SamplingConfig(gen_length=3, block_length=3, draft=1)))
    assert states[-1].canvas.tokens.tolist() == plain[-1].canvas.tokens.tolist() == [[0, 1, 0]]
    assert [int(state.committed.sum()) for state in states] == [1, 1, 1]
    assert [rows for rows, _ in model.calls] == [1, 2, 1]
    assert int(states[-1].positions_computed[0]) == 3 * (1 + 2 + 1)


def test_a_state_that_is_reached_in_another_order_is_known():
    """The draft writes slot 1 and then slot 2, plain decoding 2 and then 1: the state with both needs no pass."""

    class Swapped(Predictor):
        def logits(self, tokens, slots):
            out = torch.tensor([0.6, 0.4, 0, 0], dtype=torch.float64).expand(*slots.shape, 4).clone()
            out[:, 0, :2] = torch.tensor([0.99, 0.01], dtype=torch.float64)
            written = tokens[:, 0] != 3
            out[~written, 1, :2] = torch.tensor([0.9, 0.1], dtype=torch.float64)
            out[~written, 2, :2] = torch.tensor([0.8, 0.2], dtype=torch.float64)
            out[written, 1, :2] = torch.tensor([0.8, 0.2], dtype=torch.float64)
            out[written, 2, :2] = torch.tensor([0.9, 0.1], dtype=torch.float64)
            return out.log()

    canvas = Canvas.from_prompts([[]], 4, 3)
    states = list(denoise(Swapped(), canvas, SamplingConfig(gen_length=4, block_length=4, draft=2)))
    assert [int(state.committed.sum()) for state in states] == [1, 1, 2]


# ---------------------------------------------------------------- the same as plain decoding

RULES = [
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "commit": "threshold", "threshold": 0.2},
    {"temperature": 1.0, "top_k": 5, "order_temperature": 0.5},
    {"commit": "factor", "confidence": "margin"},
    {"confidence": "random", "steps": 7},
    {"temperature": 0.7, "tempered_confidence": True, "top_p": 0.9, "delay_eos": True},
    {"cfg_scale": 0.5, "temperature": 0.5},
    {"commit": "dynamic", "threshold": 0.3, "stop_at_eos": True, "temperature": 1.0},
    {"commit": "stable", "kl_bound": 1.0, "threshold": 0.1},
]


@pytest.mark.parametrize("causal", [False, True])
def test_bits_are_those_of_plain_decoding(causal):
    """float32: tokens and confidences of ragged batches, whatever the draft, with no more passes."""
    changes = {"block_length": 4, "objective": "block_diffusion"} if causal else {}
    model, prompts = packed(tiny_model(1, dtype=torch.float32, **changes)), [[1, 2, 3], [5] * 9]
    assert model.exact_rows or not has_kernels(torch.float32)
    methods, saved = CAUSAL if causal else FREE, 0
    for number, rule in enumerate(RULES):
        method = methods[-1 - number % len(methods)]
        length = None if causal else 4
        config = SamplingConfig(gen_length=9 if causal else 6, block_length=length, method=method, seed=number, **rule)
        tokens, sure, nfe, _ = run(model, prompts, config)
        draft = (1, 3, 12)[number % 3]
        again = run(model, prompts, dataclasses.replace(config, draft=draft))
        assert torch.equal(again[0], tokens), (method, rule, draft)
        assert not model.exact_rows or torch.equal(again[1], sure), (method, rule, draft)
        assert (again[2] <= nfe).all(), (method, rule, draft)
        saved += int((nfe - again[2]).sum())
    assert saved > 5


def test_blocks_in_a_row_of_one_chain_store_their_keys():
    """A chain over several blocks: later blocks read the keys of the blocks as they were written in the end."""
    model = tiny_model(3, block_length=2, objective="block_diffusion", sharp=0.3)  # predictions hardly change
    config = SamplingConfig(gen_length=24, method="block_causal", temperature=0.5, seed=5)
    plain, draft = (run(model, [[1, 2, 3]], dataclasses.replace(config, draft=k)) for k in (0, 8))
    assert torch.equal(plain[0], draft[0])
    assert torch.allclose(plain[1], draft[1], atol=1e-6)
    assert int(draft[2][0]) < 0.7 * int(plain[2][0])


def test_what_was_guessed_does_not_matter(monkeypatch):
    """Guesses of other texts altogether: the same tokens, and no pass is saved."""
    model = tiny_model(1, block_length=4, objective="block_diffusion")
    config = SamplingConfig(gen_length=12, method="block_causal", temperature=0.8)
    plain = run(model, [[1, 2]], config)
    right = Drafts.guesses

    def wrong(self, row, tokens, layout, mask_id):
        guesses = right(self, row, tokens, layout, mask_id)
        return [
            dataclasses.replace(guess, tokens=np.where((layout >= 0) & (guess.tokens != mask_id), 17, guess.tokens))
            for guess in guesses
        ]

    monkeypatch.setattr(Drafts, "guesses", wrong)
    again = run(model, [[1, 2]], dataclasses.replace(config, draft=3))
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[2], again[2])
    assert int(again[3][0]) > int(plain[3][0])


def drafted(rng, model):
    """Random settings that may have a draft."""
    options = settings(rng, model) | {"revise": "none", "grow": "none", "sub_block_length": None}
    causal, shifted = model.config.block_length is not None, model.config.shift_logits
    methods = ("none",) if shifted else CAUSAL if causal else FREE
    commits = ("quota", "threshold", "factor", "entropy_bound", "sequential", "dynamic", "capped", "stable")
    return options | {"method": rng.choice(methods), "commit": rng.choice(commits), "draft": rng.choice([1, 2, 3, 7])}


def identical(rng, count):
    """`count` random settings: tokens and texts as without a draft, no more passes; (passes saved, all, refused)."""
    every, saved, passes, refused, done = models(), 0, 0, 0, 0
    while done < count:
        model = rng.choice(every)
        options = drafted(rng, model)
        try:
            config = SamplingConfig(**options)
            case = case_of(rng, model, config)
            *_, last = case.states()
        except ValueError:
            refused += 1
            continue
        plain_config = dataclasses.replace(config, draft=0)
        *_, plain = dataclasses.replace(case, config=plain_config).states()
        assert torch.equal(plain.canvas.tokens, last.canvas.tokens), (options, case.rows, case.patterns)
        assert (last.nfe <= plain.nfe).all(), (options, case.rows, case.patterns)
        few = [rng.randrange(len(case.rows))]
        *_, alone = case.states(few)
        assert int(alone.nfe[0]) == int(last.nfe[few[0]]), "passes depend on the batch"
        saved, passes, done = saved + int((plain.nfe - last.nfe).sum()), passes + int(plain.nfe.sum()), done + 1
    return saved, passes, refused


def test_random_settings():
    saved, passes, _ = identical(random.Random(2), 12)
    assert saved > 0.1 * passes


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_a_thousand_random_settings(seed):
    saved, passes, refused = identical(random.Random(seed), 250)
    print(f"{saved} of {passes} passes saved, {refused} settings refused")
    assert saved > 0.1 * passes


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options",
    [
        {"method": "c2f"},
        {"method": "pipeline", "commit": "threshold"},
        {"revise": "edit"},
        {"commit": "origin"},
        {"commit": "ancestral"},
        {"grow": "block"},
        {"sub_block_length": 2},
    ],
)
def test_what_is_not_foreseen_is_refused_by_name(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"draft .*{name} {value!r} is not foreseen") as error:
        SamplingConfig(draft=2, **options)
    assert "\n" not in str(error.value)


def test_shifted_logits_need_all_slots():
    model = tiny_model(1, shift_logits=True)
    with pytest.raises(ValueError, match=r"draft with method 'dual' .* shifted"):
        generate(model, [[1]], SamplingConfig(gen_length=4, block_length=2, method="dual", draft=2))


@pytest.mark.parametrize("draft", [-1, 1.5, True])
def test_a_draft_counts_states(draft):
    with pytest.raises(ValueError, match=r"draft is .* it counts states"):
        SamplingConfig(draft=draft)


def test_on_the_command_line(capsys):
    """The same text in fewer passes; --json says passes, tokens a pass and slots computed."""
    told = {}
    for draft in (0, 3):
        words = ["generate", "A cat", "--gen-length", "16", "--seed", "2", "--json", "--draft", str(draft)]
        assert main(words) == 0
        told[draft] = json.loads(capsys.readouterr().out)
    assert told[3]["text"] == told[0]["text"] and told[3]["nfe"] < told[0]["nfe"] == 16
    assert told[3]["tokens_per_forward"] > 1 == told[0]["tokens_per_forward"]
    assert told[3]["positions_computed"] > told[0]["positions_computed"]
