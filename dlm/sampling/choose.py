"""How probable each option of a text's blanks is: `The capital of France is ___{Paris|Rome}.`

Shapes: N rows, T slots, V vocabulary.

A filling of all blanks has the probability that the chain rule gives its tokens in some order, each predicted with
those after it masked. A true joint distribution has the same for every order; a model's differs, so several orders are
averaged and their spread is the standard error. Up to six orders all are taken, and nothing is estimated.

A block-causal model does not see what stands behind a blank's block. There all from the first blank on is predicted,
block by block: the probability of a filling and of the text behind it, given the text before (Bayes' rule).
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dlm.models.predictor import as_predictor
from dlm.sampling.canvas import check_slots
from dlm.tokenizer import encode_prompt

__all__ = ["Chosen", "Ranked", "choose", "read_options"]

OPTIONS = re.compile(r"_{3,}\{((?:[^{}|]+)(?:\|[^{}|]+)+)\}")
MOST = 4096  # fillings of all blanks together
MOST_ORDERS = 1000
EXACT = 6  # orders of a filling of which every one is taken
MOST_ROWS = 200_000  # rows that the model computes
BATCH = 64


@dataclass(frozen=True)
class Ranked:
    """options: one for each blank; probability among all fillings; error: its standard error, 0 where it is exact."""

    options: tuple[str, ...]
    probability: float
    error: float
    log_probability: float


@dataclass(frozen=True)
class Chosen:
    """ranked: all fillings, the most probable first; passes: rows that the model computed."""

    ranked: tuple[Ranked, ...]
    passes: int

    @property
    def best(self) -> tuple[str, ...]:
        """The options of the most probable filling."""
        return self.ranked[0].options

    def of_blank(self, blank: int) -> dict[str, float]:
        """The probability of each option of one blank, whatever stands in the others."""
        found: dict[str, float] = {}
        for row in self.ranked:
            found[row.options[blank]] = found.get(row.options[blank], 0.0) + row.probability
        return found


def read_options(text: str) -> list[tuple[str, ...]]:
    """The options of each blank. Raises ValueError where there is none, or one has the same option twice."""
    found = [tuple(match[1].split("|")) for match in OPTIONS.finditer(text)]
    if not found:
        raise ValueError(f"no blank with options in {text[:60]!r}: write ___{{Paris|Rome}} where one of them stands")
    for options in found:
        for option in options:
            if options.count(option) > 1:
                raise ValueError(f"the option {option!r} stands twice in one blank: leave one out")
    if math.prod(map(len, found)) > MOST:
        raise ValueError(
            f"the blanks have {math.prod(map(len, found)):,} fillings together, above {MOST:,}: give fewer options"
        )
    return found


def _filled(tokenizer, text: str, options: Sequence[str], mask_id: int) -> tuple[list[int], list[int]]:
    """The ids of a text with one option in each blank, and the slots of the options' tokens."""
    ids: list[int] = []
    slots: list[int] = []
    at = 0
    for match, option in zip(OPTIONS.finditer(text), options, strict=True):
        piece = text[at : match.start()]
        if piece.endswith(" ") and not piece.endswith("  "):  # a word of a byte-level vocabulary begins with its space
            piece, option = piece[:-1], f" {option}"
        ids += encode_prompt(tokenizer, piece, mask_id, beginning=not ids)
        word = encode_prompt(tokenizer, option, mask_id, beginning=False)
        if not word:
            raise ValueError(f"the option {option!r} has no token: give a text")
        slots += range(len(ids), len(ids) + len(word))
        ids += word
        at = match.end()
    return ids + encode_prompt(tokenizer, text[at:], mask_id, beginning=False), slots


def _predicted(filled: Sequence[tuple[list[int], list[int]]], settings) -> list[list[list[int]]]:
    """The slots that are predicted of each (ids, the options' slots), block by block: those of the options, which see
    all that is given. Where a block-causal model does not see all of it, everything from the first option on."""
    length = settings.block_length if getattr(settings, "attention", "full") == "block_causal" else None
    if length is None or all((len(ids) - 1) // length == slots[0] // length for ids, slots in filled):
        return [[slots] for _, slots in filled]
    every = [range(slots[0], len(ids)) for ids, slots in filled]
    return [[list(block) for _, block in itertools.groupby(row, key=lambda slot: slot // length)] for row in every]


def _drawn(blocks: Sequence[Sequence[int]], keys: Sequence[float]) -> list[int]:
    """The slots block by block, those of a block in the order of their keys; as many keys as slots, or more."""
    pairs = iter(keys)
    return [slot for block in blocks for _, slot in sorted((next(pairs), slot) for slot in block)]


@torch.inference_mode()
def choose(predictor, text: str, *, tokenizer, mask_id: int, orders: int = 8, seed: int = 0) -> Chosen:
    """Ranks all fillings of the blanks of a text by their probability.

    orders: how many orders of the tokens are averaged where a filling has more than six. Raises ValueError for a text
    without options, where the same option stands twice, and for more than MOST_ROWS rows.
    """
    if not 2 <= orders <= MOST_ORDERS:
        raise ValueError(f"orders is {orders}: give 2 (for a standard error) to {MOST_ORDERS}")
    fillings = list(itertools.product(*read_options(text)))
    filled = [_filled(tokenizer, text, options, mask_id) for options in fillings]
    settings, most = getattr(predictor, "config", None), max(len(ids) for ids, _ in filled)
    check_slots(most, settings, what="text and options are", fix="shorten the text")
    blocks = _predicted(filled, settings)
    different = [math.prod(math.factorial(len(block)) for block in each) for each in blocks]
    exact = max(different) <= EXACT
    count = math.lcm(*different) if exact else orders
    predicted = [sum(map(len, each)) for each in blocks]
    if count * sum(predicted) > MOST_ROWS:
        raise ValueError(
            f"{len(filled):,} fillings of up to {max(predicted)} predicted tokens take {count * sum(predicted):,} rows "
            f"of the model, above {MOST_ROWS:,}: give fewer options, or orders below {orders}"
        )
    rng = random.Random(seed)
    keys = [[rng.random() for _ in range(max(predicted))] for _ in range(count)]
    rows, wanted = [], []  # (ids with masks, slot, token), and whose filling and order it is
    for number, (ids, _) in enumerate(filled):
        every = list(itertools.product(*map(itertools.permutations, blocks[number]))) if exact else []
        for draw in range(count):
            if exact:
                order = list(itertools.chain(*every[draw % len(every)]))
            else:
                order = _drawn(blocks[number], keys[draw])
            for i, slot in enumerate(order):
                hidden = set(order[i:])
                masked = tuple(mask_id if place in hidden else token for place, token in enumerate(ids))
                rows.append((masked, slot, ids[slot]))
                wanted.append((number, draw))
    passes = sorted(set(rows), key=lambda row: (len(row[0]), row))
    log_p = dict(zip(passes, _log_probabilities(predictor, passes, mask_id), strict=True))
    totals = [[0.0] * count for _ in filled]
    for row, (number, draw) in zip(rows, wanted, strict=True):
        totals[number][draw] += log_p[row]
    shares = torch.tensor(totals, dtype=torch.float64).softmax(dim=0)  # (fillings, orders)
    mean = shares.mean(dim=1).tolist()
    error = [0.0] * len(mean) if exact else (shares.std(dim=1) / math.sqrt(count)).tolist()
    logs = (torch.tensor(totals, dtype=torch.float64).logsumexp(dim=1) - math.log(count)).tolist()
    ranked = [Ranked(*row) for row in zip(fillings, mean, error, logs, strict=True)]
    return Chosen(tuple(sorted(ranked, key=lambda row: -row.probability)), len({row[0] for row in passes}))


def _log_probabilities(predictor, rows: Sequence[tuple[tuple[int, ...], int, int]], mask_id: int) -> list[float]:
    """log p of the token at the slot of each (ids, slot, token), the mask token never predicted."""
    predict = as_predictor(predictor)
    device = getattr(predictor, "device", None)
    before = int(bool(getattr(getattr(predictor, "config", None), "shift_logits", None)))  # where the guess stands
    found: list[float] = []
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        width = max(len(ids) for ids, _, _ in part)
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _, _ in part], device=device)
        lengths = torch.tensor([len(ids) for ids, _, _ in part], device=device)
        valid = torch.arange(width, device=device)[None] < lengths[:, None]
        slots = torch.tensor([[max(0, slot - before)] for _, slot, _ in part], device=device)
        logits = predict(tokens, valid=None if bool(valid.all()) else valid, logits_to_keep=slots)[:, 0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits.index_fill(-1, torch.tensor([mask_id], device=device), -torch.inf)
        wanted = torch.tensor([token for _, _, token in part], device=device)
        found += logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0].tolist()
    return found
