"""Blanks of unknown length: the text is filled for every length, and the one that the model finds most probable stays.

A text that is filled has a bound on -log p of all of its tokens (`objectives.likelihood`); the length whose bound is
lowest is chosen. Texts with the same number share the noise of the bound, so that lengths are compared on like draws.

Up to TOGETHER fillings, the lengths of all blanks are tried together. Beyond that one blank is varied at a time, from
left to right, the others held at what is best so far (at first the middle of their range), until a round over all
blanks changes nothing, or ROUNDS rounds were made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dlm.objectives.likelihood import LikelihoodConfig, answer, bound
from dlm.sampling.canvas import Canvas, check_slots
from dlm.sampling.config import SamplingConfig
from dlm.sampling.constraints import Written, constraints_of_blanks
from dlm.sampling.denoise import denoise
from dlm.tokenizer import blank_ranges, blanks

__all__ = ["Filled", "choose_lengths", "fill_lengths", "search"]

TOGETHER, ROUNDS, BATCH, DRAWS = 64, 3, 16, 16
Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Filled:
    """A text whose blanks are filled. ids: all of its tokens; blanks: of each the slot where it begins and its tokens;
    nats, error: the bound on -log p(ids) and its standard error. nfe: passes that filled it; tried: the bound of every
    choice of lengths that was filled."""

    ids: tuple[int, ...]
    blanks: tuple[tuple[int, int], ...]
    nats: float
    error: float
    nfe: int
    tried: dict[Lengths, float]

    @property
    def lengths(self) -> Lengths:
        """The tokens of each blank."""
        return tuple(length for _, length in self.blanks)


def search(ranges: Sequence[tuple[int, int]], score: Callable[[list[Lengths]], list[float]]) -> Lengths:
    """The lengths of lowest score, one from each range (both ends included), by the search of this file.

    score: of several choices at once, infinite for one that cannot be. Ties: the shorter text, then the earlier blank.
    """
    known: dict[Lengths, float] = {}

    def best(choices: list[Lengths]) -> Lengths:
        new = [lengths for lengths in choices if lengths not in known]
        known.update(zip(new, score(new) if new else [], strict=True))
        return min(choices, key=lambda lengths: (known[lengths], sum(lengths), lengths))

    every = [range(low, high + 1) for low, high in ranges]
    if math.prod(map(len, every)) <= TOGETHER:
        return best(list(itertools.product(*every)))
    held = tuple((low + high) // 2 for low, high in ranges)
    for _ in range(ROUNDS):
        before = held
        for blank, sizes in enumerate(every):
            held = best([(*held[:blank], size, *held[blank + 1 :]) for size in sizes])
        if held == before:
            break
    return held


def fill_lengths(
    predictor,
    text: str,
    config: SamplingConfig,
    *,
    tokenizer,
    mask_id: int,
    eos: Sequence[int] = (),
    blank_length: int = 4,
    draws: int = DRAWS,
) -> Filled:
    """Fills the blanks of a text, each with the length of its range that gives the lowest bound.

    Every choice of lengths is filled with the settings of `config` and its seed, BATCH at a time. draws: of each bound.
    Raises ValueError for a text without a blank, bad ranges, and patterns that no length fits.
    """
    known: dict[Lengths, Filled] = {}
    ranges, seed = blank_ranges(text, blank_length), config.row_seeds(1)[0]
    vocab_size = None if tokenizer is None else len(tokenizer)
    most = sum(high for _, high in ranges)
    check_slots(most, getattr(predictor, "config", None), what="the blanks are", fix="shorten them")  # before memory

    def score(choices: list[Lengths]) -> list[float]:
        fits = {}
        for lengths in choices:
            ids, places = blanks(tokenizer, text, blank_length, mask_id, lengths=lengths)
            wanted = constraints_of_blanks(tokenizer, places, eos)
            if not wanted or _fits(wanted, ids, mask_id):
                fits[lengths] = ids, places, wanted
        names = list(fits)
        for at in range(0, len(names), BATCH):
            part = [fits[name] for name in names[at : at + BATCH]]
            canvas = Canvas.from_templates(
                [ids for ids, *_ in part], mask_id, device=getattr(predictor, "device", None)
            )
            asked = replace(config, seed=(seed,) * len(part))
            wanted = [rules for *_, rules in part]
            *_, last = denoise(
                predictor, canvas, asked, vocab_size=vocab_size, eos_token_ids=eos,
                constraints=wanted if any(wanted) else None,
            )  # fmt: skip
            texts = [row[: len(ids)] for row, (ids, *_) in zip(last.canvas.tokens.tolist(), part, strict=True)]
            bounds = bound(
                predictor, [answer((), ids) for ids in texts], LikelihoodConfig(draws=draws, seed=seed), mask_id=mask_id
            )
            for name, ids, (_, places, _), found, nfe in zip(
                names[at : at + BATCH], texts, part, bounds, last.nfe.tolist(), strict=True
            ):
                spans = tuple((start, length) for start, length, _ in places)
                known[name] = Filled(tuple(ids), spans, found.nats, found.error, nfe, {})
        return [known[lengths].nats if lengths in known else math.inf for lengths in choices]

    lengths = search(ranges, score)
    if lengths not in known:
        raise ValueError(
            f"no text that matches the patterns of {text[:60]!r} fits any length of its blanks: widen them"
        )
    return replace(known[lengths], tried={name: filled.nats for name, filled in known.items()})


def choose_lengths(predictor, text: str, config: SamplingConfig, **known) -> Lengths:
    """The number of tokens for each blank of a text; where no blank has a range, without a pass. known: as
    `fill_lengths` takes it."""
    ranges = blank_ranges(text, known.get("blank_length", 4))
    if all(low == high for low, high in ranges):
        return tuple(low for low, _ in ranges)
    return fill_lengths(predictor, text, config, **known).lengths


def _fits(constraints, ids: Sequence[int], mask_id: int) -> bool:
    try:
        Written(constraints, ids, mask_id, "greedy")
    except ValueError:
        return False
    return True
