"""Constraints of a row: which tokens may stand at its places, so that what is written always matches.

Shapes: R rows of a pass, M places asked about, V vocabulary.

The tokens of one pass are committed in order of confidence and what is allowed follows after each, so that the canvas
can be completed at any time: every output is in the language, for every method, commit rule, temperature and template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dlm.sampling.automaton import Automaton, compile_pattern
from dlm.sampling.patterns import region_choice, schema_pattern
from dlm.sampling.places import Places
from dlm.sampling.step import Request, branches, guided

if TYPE_CHECKING:
    from dlm.sampling.canvas import Canvas
    from dlm.sampling.config import SamplingConfig

__all__ = [
    "Constraint",
    "OpenSets",
    "Written",
    "allowed_tokens",
    "best_words",
    "change_in_order",
    "commit_in_order",
    "constraint_of",
    "constraints_of_blanks",
    "open_sets",
]


@dataclass(frozen=True)
class Constraint:
    """What the slots (in order) of a row must match together."""

    automaton: Automaton
    slots: tuple[int, ...]


def constraint_of(
    config: SamplingConfig, canvas: Canvas, tokenizer, eos: Sequence[int]
) -> list[list[Constraint]] | None:
    """Each row's constraints for settings that name a pattern, a schema or choices for the whole region; None without.

    Raises ValueError for a pattern that cannot be used, ImportError without outlines-core.
    """
    if config.regex is None and config.json_schema is None and config.choices is None:
        return None
    if tokenizer is None:
        raise ValueError("regex, json_schema and choices need the tokenizer: pass tokenizer=")
    if config.regex is not None:
        pattern = config.regex
    elif config.json_schema is not None:
        pattern = schema_pattern(config.json_schema)
    else:
        pattern = region_choice(config.choices)
    automaton = compile_pattern(tokenizer, pattern, tuple(config.eos_ids or eos))
    region = canvas.editable & canvas.valid
    return [[Constraint(automaton, tuple(row.nonzero()[:, 0].tolist()))] for row in region]


def constraints_of_blanks(
    tokenizer, blanks: Sequence[tuple[int, int, str | None]], eos: Sequence[int]
) -> list[Constraint]:
    """The constraints of a template's blanks: start, length and pattern of each, None where any text may stand."""
    return [
        Constraint(compile_pattern(tokenizer, pattern, tuple(eos)), tuple(range(start, start + length)))
        for start, length, pattern in blanks
        if pattern is not None
    ]


class Written:
    """The constraints of a row and what its places hold."""

    def __init__(self, constraints: Sequence[Constraint], tokens: Sequence[int], mask_id: int, search: str):
        """Raises ValueError where no text that matches fits."""
        self.search = search
        self.matches: list[tuple[Places, tuple[int, ...]]] = []
        self.where: dict[int, tuple[Places, int]] = {}
        for constraint in constraints:
            held = [None if tokens[slot] == mask_id else tokens[slot] for slot in constraint.slots]
            places = Places(constraint.automaton, held)
            self.matches.append((places, constraint.slots))
            self.where |= {slot: (places, i) for i, slot in enumerate(constraint.slots)}

    def allowed(self, slot: int) -> np.ndarray | None:
        """bool (V,): the tokens that may stand at a slot; None for any."""
        if slot not in self.where:
            return None
        places, i = self.where[slot]
        return places.allowed(i)

    def classes(self, slots: Sequence[int]) -> Iterator[tuple[int, Automaton, np.ndarray]]:
        """(slot, automaton, classes of its tokens that may stand there, bool (K,)) of those slots that are bound."""
        for places, _ in self.matches:
            here = [slot for slot in slots if slot in self.where and self.where[slot][0] is places]
            indices = [self.where[slot][1] for slot in here]
            for slot, classes in zip(here, places.classes(indices), strict=True):
                yield slot, places.automaton, classes

    def write(self, slot: int, token: int) -> bool:
        """Puts a token at a slot where that is allowed, and says whether it was."""
        if slot not in self.where:
            return True
        places, i = self.where[slot]
        if not places.permits(i, token):
            return False
        places.set(i, token)
        return True

    def change(self, slot: int, token: int | None) -> bool:
        """Empties a slot, or gives it another token where that is allowed; says whether it did."""
        if slot not in self.where:
            return True
        places, i = self.where[slot]
        before = places.tokens[i]
        places.set(i, None)
        if token is None or self.write(slot, token):
            return True
        places.set(i, before)
        return False

    def best(self, scores: dict[int, np.ndarray]) -> dict[int, int]:
        """The tokens of the most probable word at the slots that have scores (V,)."""
        word_at = {}
        for places, slots in self.matches:
            here = {i: scores[slot] for i, slot in enumerate(slots) if slot in scores}
            if here:
                word = places.best(here)
                word_at |= {slots[i]: word[i] for i in here}
        return word_at


@dataclass
class OpenSets:
    """What one automaton allows in a pass: different sets of classes of tokens, bool (K,) each, and for each place
    that is bound its row, its column and which of the sets holds there."""

    sets: list[np.ndarray] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    which: list[int] = field(default_factory=list)


def open_sets(written: Sequence[Written | None], slots: Tensor, eligible: Tensor) -> dict[Automaton, OpenSets]:
    """What the constraints allow at the places that are asked about, by automaton: the work of the host."""
    groups: dict[Automaton, OpenSets] = {}
    numbers: dict[int, int] = {}  # a set that holds at several places is one object
    for row, (constraint, places, asked) in enumerate(zip(written, slots.tolist(), eligible.tolist(), strict=True)):
        if constraint is None:
            continue
        column = {slot: j for j, slot in enumerate(places) if asked[j]}
        for slot, automaton, classes in constraint.classes(list(column)):
            group = groups.setdefault(automaton, OpenSets())
            if id(classes) not in numbers:
                numbers[id(classes)] = len(group.sets)
                group.sets.append(classes)
            group.rows.append(row)
            group.columns.append(column[slot])
            group.which.append(numbers[id(classes)])
    return groups


def allowed_tokens(
    written: Sequence[Written | None], slots: Tensor, eligible: Tensor, size: int, suppressed: Sequence[int]
) -> Tensor:
    """bool (R, M, V): what may be proposed; at places without a constraint all but the `suppressed`."""
    device = slots.device
    mask = torch.ones(*slots.shape, size, dtype=torch.bool, device=device)
    mask[..., list(suppressed)] = False
    for automaton, group in open_sets(written, slots, eligible).items():
        tokens = automaton.spread(np.stack(group.sets), size, device)  # (sets, V)
        where = torch.tensor([group.rows, group.columns, group.which], device=device)
        mask[where[0], where[1]] = tokens[where[2]]
    return mask


def commit_in_order(
    written: Sequence[Written | None],
    slots: Tensor,
    token: Tensor,
    confidence: Tensor,
    chosen: Tensor,
    again: Callable[[int, int, np.ndarray], tuple[int, float]],
    *,
    keep_count: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token, confidence and chosen (R, M) after the chosen places were committed one after another.

    A token that the ones before it have ruled out is proposed again by `again(row, place, allowed (V,))`, or where the
    commit rule may commit fewer (not `keep_count`) its place stays masked.
    """
    token, confidence, chosen = token.clone(), confidence.clone(), chosen.clone()
    order = confidence.masked_fill(~chosen, -torch.inf).sort(dim=1, descending=True, stable=True).indices.tolist()
    counts, names, tokens = chosen.sum(dim=1).tolist(), slots.tolist(), token.tolist()
    for row, constraint in enumerate(written):
        for j in order[row][: counts[row]] if constraint is not None else ():
            slot = names[row][j]
            if constraint.write(slot, tokens[row][j]):
                continue
            if not keep_count:
                chosen[row, j] = False
                continue
            new, sure = again(row, j, constraint.allowed(slot))
            assert constraint.write(slot, new), f"token {new} was proposed at slot {slot} against its constraint"
            token[row, j], confidence[row, j] = new, sure
    return token, confidence, chosen


def change_in_order(
    written: Sequence[Written | None], slots: Tensor, token: Tensor, revised: Tensor, mask_id: int
) -> Tensor:
    """Which of the revised places (R, M) keep their new token, one after another: those that a constraint allows."""
    if not bool(revised.any()):
        return revised
    revised = revised.clone()
    for row, j in revised.nonzero().tolist():
        constraint, new = written[row], int(token[row, j])
        if constraint is not None and not constraint.change(int(slots[row, j]), None if new == mask_id else new):
            revised[row, j] = False
    return revised


def best_words(
    written: Sequence[Written | None],
    request: Request,
    eligible: Tensor,
    logits: Tensor,
    token: Tensor,
    confidence: Tensor,
    config: SamplingConfig,
) -> tuple[Tensor, Tensor]:
    """Token and confidence (R, M) where constrained places hold the most probable text that matches, under the product
    of the predictions at the places asked about (DINGO, arXiv:2505.23061)."""
    token, confidence = token.clone(), confidence.clone()
    log_p = guided(*branches(logits, config), config).log_softmax(dim=-1)
    for row, constraint in enumerate(written):
        if constraint is None:
            continue
        here = {slot: j for j, slot in enumerate(request.slots[row].tolist()) if bool(eligible[row, j])}
        scores = {slot: log_p[row, j].double().cpu().numpy() for slot, j in here.items() if slot in constraint.where}
        for slot, best in constraint.best(scores).items():
            token[row, here[slot]] = best
            if config.ordering == "probability":
                confidence[row, here[slot]] = log_p[row, here[slot], best].exp()
    return token, confidence
