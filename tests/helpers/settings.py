"""Random settings over all rules of sampling together, and what must hold of every one of them.

Ids of the small vocabulary: 0..9 are words of a, b, c, then the expand and the delete token, the mask, and embeddings
beyond the tokenizer.
"""

import dataclasses
import re

import torch

import dlm
from dlm import Canvas, SamplingConfig
from dlm.sampling.automaton import compile_pattern
from dlm.sampling.config import COMMIT_NAMES, GROW_NAMES, METHOD_NAMES, NOISE_NAMES, REMASK_NAMES, REVISION_NAMES
from dlm.sampling.constraints import Constraint
from tests.helpers.toys import tiny_model

VOCAB, REAL, MASK, EXPAND, DELETE, END = 16, 13, 12, 10, 11, 3
PATTERNS = ("(ab)*c?", "[ab]+c", "(a|b|c)*", "a{2,3}|b", "c")


class Words:
    """The vocabulary as a tokenizer."""

    words = ("a", "b", "c", "", "ab", "bc", "abc", "ca", "d", "e", "<x>", "<d>", "<m>")
    all_special_ids = (END, EXPAND, DELETE, MASK)
    added_tokens_decoder: dict = {}
    backend_tokenizer = None

    def __len__(self):
        return len(self.words)

    def get_vocab(self):
        return {word or "<end>": i for i, word in enumerate(self.words)}

    def text(self, ids):
        return "".join(self.words[i] for i in ids)


def models():
    """A full-attention model, one with shifted logits, and a block-causal one."""
    sizes = {"d_model": 8, "n_heads": 2, "n_kv_heads": 1, "n_layers": 1, "mlp_hidden_size": 12, "sharp": 3.0}
    ids = {"vocab_size": VOCAB, "embedding_size": VOCAB, "mask_token_id": MASK, "eos_token_id": END}
    every = sizes | ids | {"pad_token_id": END}
    found = [
        tiny_model(0, **every),
        tiny_model(1, **every, shift_logits=True),
        tiny_model(2, **every, block_length=3),
    ]
    for model in found:  # the two tokens of growth are rare otherwise
        with torch.no_grad():
            model.model.transformer.ff_out.weight[EXPAND:MASK] *= 1.5
    return found


def settings(rng, model):
    """Any settings at all: each choice is its default half of the time."""

    def some(default, *others):
        return default if rng.random() < 0.5 else rng.choice(others)

    causal = model.config.block_length is not None
    methods = [name for name in METHOD_NAMES if name in ("none", "pipeline") or causal == ("causal" in name)]
    grow = some("none", *GROW_NAMES)
    planned = grow in ("none", "block")
    steps = some(None, 3, 5, 9) if planned else None
    return {
        "gen_length": rng.randint(2, 8),
        "initial_length": rng.randint(1, 5),
        "block_length": None if causal else rng.randint(1, 5),
        "steps": steps,
        "steps_per_block": some(None, None, 2) if planned and steps is None else None,
        "sub_block_length": some(None, None, None, 2) if planned else None,
        "commit_first": planned and rng.random() < 0.1,
        "whole_blocks": causal and rng.random() < 0.2,
        "align": rng.choice(["start", "prompt"]) if causal else "start",
        "method": rng.choice(methods),
        "commit": some("quota", *COMMIT_NAMES, "threshold", "stable"),
        "split": some("remainder_first", "rounded", "time"),
        "threshold": rng.choice([0.0, 0.2, 0.5, 0.9]),
        "factor": rng.choice([0.01, 1.0, 30.0]),
        "entropy_bound": rng.choice([0.0, 0.5, 100.0]),
        "kl_bound": rng.choice([0.01, 1.0]),
        "kl_passes": rng.choice([1, 2]),
        "spacing": some(0, 0, 1, 3),
        "spacing_threshold": rng.choice([0.5, 0.95]),
        "open_share": rng.choice([0.0, 0.5, 1.0]),
        "force_share": rng.choice([0.0, 0.5, 0.95]),
        "revise": some("none", *REVISION_NAMES),
        "edit_threshold": rng.choice([0.0, 0.5]),
        "edit_shadow": rng.random() < 0.3,
        "max_post_passes": rng.choice([0, 1, 3]),
        "remask": rng.choice(REMASK_NAMES),
        "remask_eta": rng.choice([None, 0.5, 1.0]),
        "verify_threshold": rng.choice([0.3, 1.0]),
        "noise_schedule": rng.choice(NOISE_NAMES),
        "confidence": some(None, "probability", "margin", "entropy", "random"),
        "temperature": rng.choice([0.0, 0.7, 2.0]),
        "order_temperature": some(0.0, 0.5),
        "tempered_confidence": rng.random() < 0.2,
        "top_k": some(None, None, 2),
        "top_p": some(None, None, 0.5),
        "cfg_scale": some(0.0, 0.0, 0.5),
        "window": rng.choice([0, 2]),
        "grow": grow,
        "grow_by": rng.randint(1, 3),
        "grow_below": rng.choice([0.1, 0.6]),
        "tail_length": rng.randint(1, 4),
        "tail_start": rng.choice([0.05, 0.4]),
        "constraint_search": some("greedy", "greedy", "viterbi"),
        "stop_at_eos": rng.random() < 0.25,
        "suppress_eos": rng.random() < 0.1,
        "delay_eos": rng.random() < 0.15,
        "seed": rng.randrange(10**6),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to make: rows of ids with masks, each row's pattern or None."""

    model: torch.nn.Module
    config: SamplingConfig
    rows: list
    patterns: list

    def states(self, few=None):
        """The states of all rows, or of some, each with the seed of its place."""
        few = range(len(self.rows)) if few is None else few
        canvas = Canvas.from_templates([self.rows[i] for i in few], MASK)
        seeds = tuple(self.config.seed + i for i in few)
        constraints = [
            [Constraint(compile_pattern(Words(), self.patterns[i], (END,)), places_of(self.rows[i]))]
            if self.patterns[i]
            else []
            for i in few
        ]
        known = {"vocab_size": REAL, "eos_token_ids": (END,), "growth_tokens": (EXPAND, DELETE)}
        if any(constraints):
            known["constraints"] = constraints
        return dlm.denoise(self.model, canvas, dataclasses.replace(self.config, seed=seeds), **known)


def places_of(row):
    return tuple(slot for slot, token in enumerate(row) if token == MASK)


def case_of(rng, model, config):
    """A ragged batch for these settings: prompts, or templates with text behind and between the blanks."""
    start, rows = config.start_length, []
    infill = rng.random() < 0.3 and config.grow in ("none", "expand")
    # At least one given token: masks alone predict the same everywhere, and rounding would choose among them.
    for _ in range(rng.choice([1, 2, 3])):
        row = [rng.randrange(10) for _ in range(rng.randint(1, 5))] + [MASK] * start
        if infill:
            rng.shuffle(row)
        rows.append(row)
    patterns = [None] * len(rows)
    if rng.random() < 0.3:
        patterns = [rng.choice([None, *PATTERNS]) for _ in rows]
    return Case(model, config, rows, patterns)


def text(state, row):
    """The ids that a row holds."""
    return state.canvas.tokens[row][state.canvas.valid[row]].tolist()


def check(rng, case, most=400):
    """Runs a case and what must hold of it; returns what it did. Raises ValueError for settings that contradict the
    model, the canvas or each other."""
    states, config = case.states(), case.config
    spent = torch.zeros(len(case.rows), dtype=torch.int64)
    did = set()
    for state in states:
        assert state.step < most, "no end"
        assert ((state.nfe - spent) >= 0).all() and ((state.nfe - spent) <= 2).all()
        assert torch.isfinite(state.confidence).all()
        assert not (state.committed & ~state.canvas.editable).any()
        assert not (state.revised & ~state.canvas.editable).any()
        did |= {"revised"} if bool(state.revised.any()) else set()
        did |= {"several"} if int(state.committed.sum(dim=1).max()) > 1 else set()
        spent = state.nfe
    last = state
    for row, ids in enumerate(case.rows):
        final, ours = text(last, row), last.canvas.editable[row][last.canvas.valid[row]].tolist()
        written = [token for token, mine in zip(final, ours, strict=True) if mine]
        assert [token for token, mine in zip(final, ours, strict=True) if not mine] == [t for t in ids if t != MASK]
        assert not {MASK, EXPAND, DELETE} & set(written) and all(0 <= token < REAL for token in written)
        assert len(written) <= max(config.gen_length, ids.count(MASK)), "above the limit"
        did |= {"grown"} if len(final) != len(ids) else set()
        if not config.moves and config.grow == "none":
            assert len(final) == len(ids)
        if case.patterns[row]:
            did.add("matched")
            ended = written.index(END) if END in written else len(written)
            assert set(written[ended:]) <= {END}
            whole = config.grow != "block" or len(final) == len(ids)
            found = re.fullmatch(case.patterns[row], Words().text(written[:ended]))
            assert found or not whole, "no match"
    few = [rng.randrange(len(case.rows))]
    *_, alone = case.states(few)
    assert text(alone, 0) == text(last, few[0]), "depends on its batch"
    assert int(alone.nfe[0]) == int(last.nfe[few[0]]), "passes depend on the batch"
    if rng.random() < 0.2:
        *_, again = case.states()
        assert torch.equal(again.canvas.tokens, last.canvas.tokens), "another text of the same seed"
    return did


def run(rng, count, found, failures=None):
    """`count` settings that are not refused; returns how many were. found: (rule, what it did) -> how often."""
    refused, done = 0, 0
    every = models()
    while done < count:
        model = rng.choice(every)
        options = settings(rng, model)
        case = None
        try:
            config = SamplingConfig(**options)
            case = case_of(rng, model, config)
            did = check(rng, case)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
            found["refused", str(error)[:60]] = found.get(("refused", str(error)[:60]), 0) + 1
            continue
        except (AssertionError, RuntimeError, IndexError, KeyError) as error:
            if failures is None:
                raise AssertionError(f"{error}: {options}, {case and case.rows}, {case and case.patterns}") from error
            failures.append((repr(error)[:200], options, case and case.rows, case and case.patterns))
        else:
            for name in ("method", "commit", "revise", "grow"):
                for what in {"ran", *did}:
                    key = f"{name} {options[name]}", what
                    found[key] = found.get(key, 0) + 1
        done += 1
    return refused
