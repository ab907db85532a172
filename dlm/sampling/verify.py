"""One forward pass over rows and over states that they may come to: each state is a row of its own for the model.

Shapes: R rows of the canvas in the pass, T slots, U rows of the model, Q slots computed, M slots asked about, V
vocabulary.

With a cache a state computes its block alone, and sees the stored keys of its row with those of its own block put over
them. A state in the next block also sees the finished block, whose keys another row of the pass computes; they are kept
with it, and stored once the canvas has come there. Every row has as many queries and keys as it has in plain decoding,
so that with a predictor of `exact_rows` its logits have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dlm.kernels.by_rows import RowSizes
from dlm.models.kv_cache import Drafted, Part
from dlm.sampling.canvas import Canvas
from dlm.sampling.draft import Guess, Known, name_of
from dlm.sampling.planning import Plan, shifted
from dlm.sampling.rows import Batch, Row
from dlm.sampling.step import Request, compute, forbidden_ids

__all__ = ["is_known", "logits_known", "note", "verify"]


def tokens_of(batch: Batch, row: Row) -> np.ndarray:
    """(T,) what a row holds."""
    return batch.canvas.tokens[row.index].cpu().numpy()


def is_known(batch: Batch, row: Row) -> bool:
    """Whether the row's next step needs no pass."""
    return not row.done and batch.drafts.find(row, tokens_of(batch, row)) is not None


def logits_known(batch: Batch, rows: Sequence[Row], request: Request) -> Tensor:
    """Logits (R, M, V), with guidance (2R, M, V), of rows whose states were verified before."""
    found = [batch.drafts.find(row, tokens_of(batch, row)) for row in rows]
    for row, known in zip(rows, found, strict=True):
        each = 0 if batch.cache is None else batch.cache.rows // row.branches
        for branch, parts in enumerate(known.parts):
            for part in parts:
                part.store(batch.cache, row.index + branch * each)
    first, width = found[0].logits, request.slots.shape[1]
    logits = first.new_zeros(len(first), len(rows), width, first.shape[-1])
    for i, known in enumerate(found):
        logits[:, i, : len(known.slots)] = known.logits
    return logits.flatten(0, 1)


def note(batch: Batch, rows: Sequence[Row], request: Request, logits: Tensor) -> None:
    """Keeps the logits (R or 2R, M, V) of the rows' own states, from which the next ones are guessed."""
    logits = logits.unflatten(0, (-1, len(rows)))
    for i, (row, slots) in enumerate(zip(rows, request.slots.cpu().numpy(), strict=True)):
        count = request.counts[i]
        _keep(batch, row, tokens_of(batch, row), row.block, slots[:count], logits[:, i, :count], [])


def _keep(batch: Batch, row: Row, tokens, block: int, slots, logits: Tensor, parts: list[list[Part]]) -> None:
    logits = logits.clone() if batch.fixed_shapes else logits  # a recorded pass writes its result over the last one
    forbidden = forbidden_ids(logits.shape[-1], batch.vocab_size, (batch.canvas.mask_id,), logits.device)
    known = Known(tokens, block, slots, logits, row.config, parts, forbidden=forbidden)
    batch.drafts.note(row, known)


@dataclass
class _Asked:
    """A row of the model. place: of its row among those of the pass; tokens (T,); positions (Q,), None for all; slots:
    those asked about; before: finished blocks that it sees, by their number in the pass; stored: those of them that are
    stored once the canvas comes to it; guess: the state it is for, None for the canvas and for finished blocks; true:
    whether it belongs to the canvas."""

    place: int
    tokens: np.ndarray
    positions: np.ndarray | None
    slots: np.ndarray
    before: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    guess: Guess | None = None
    true: bool = False


def verify(batch: Batch, rows: list[Row], plan: Plan, request: Request, visible_to) -> Tensor | None:
    """Logits as `compute` gives them for these rows, from a pass that computes what they may ask next too; None where
    nothing can be guessed. visible_to: the rule for a pass of some rows."""
    layout = batch.layout[plan.index].cpu().numpy()
    guesses = []
    for i, row in enumerate(rows):
        batch.drafts.forget(row)
        guesses.append(batch.drafts.guesses(row, tokens_of(batch, row), layout[i], batch.canvas.mask_id))
    if not any(guesses):
        return None
    asked = _asked(batch, rows, plan, request, layout, guesses)
    logits, cache = _compute(batch, rows, plan, request, asked, visible_to)
    logits = logits.unflatten(0, (-1, len(asked)))  # (branches, U, M, V)
    own = [0] * len(rows)
    for number, one in enumerate(asked):
        if one.guess is not None:
            parts = [
                [cache.part(number + branch * len(asked)) for number in one.stored] for branch in range(len(logits))
            ]
            row, found = rows[one.place], logits[:, number, : len(one.slots)]
            _keep(batch, row, one.tokens, one.guess.block, one.slots, found, parts)
        elif one.true and len(one.slots):
            own[one.place] = number
        if not one.true:
            rows[one.place].computed += rows[one.place].branches * _count(rows[one.place], one)
    return logits[:, own, : request.slots.shape[1]].flatten(0, 1)


def _count(row: Row, one: _Asked) -> int:
    return row.length if one.positions is None else len(one.positions)


def _asked(batch: Batch, rows, plan: Plan, request: Request, layout, guesses) -> list[_Asked]:
    """The rows of the model."""
    nothing = np.zeros(0, np.int64)
    slots = request.slots.cpu().numpy()
    positions = None if plan.positions is None else plan.positions.cpu().numpy()
    found: list[_Asked] = []
    for i, row in enumerate(rows):
        tokens, mine = tokens_of(batch, row), slots[i, : request.counts[i]]
        block = None
        if positions is None:
            found.append(_Asked(i, tokens, None, mine, true=True))
        else:
            for block in _by_blocks(row, positions[i, : plan.counts[i]]):
                found.append(_Asked(i, tokens, block, nothing, true=True))
            found[-1].slots = mine
        finished: dict[bytes, list[int]] = {}
        for guess in guesses[i]:
            before, stored, where = [], [], block
            for after, number in guess.before if positions is not None else ():
                name = name_of(number, after)
                if name not in finished:
                    finished[name] = []
                    for here in _by_blocks(row, _between(layout[i], number)):
                        found.append(_Asked(i, after, here, nothing, [*before, *finished[name]]))
                        finished[name].append(len(found) - 1)
                before, stored = [*before, *finished[name]], finished[name]
            if positions is not None and guess.block != row.block:
                where = np.flatnonzero(layout[i] == guess.block)
            found.append(_Asked(i, guess.tokens, where, guess.slots, before, stored if guess.first else [], guess))
    return found


def _between(layout: np.ndarray, block: int) -> np.ndarray:
    """The slots from a block's first up to the next one, given ones between them too, whose keys follow the block's."""
    return np.arange(np.flatnonzero(layout == block)[0], np.flatnonzero(layout == block + 1)[0])


def _by_blocks(row: Row, positions: np.ndarray) -> list[np.ndarray]:
    """The slots that a pass computes of a row, in pieces that a state is made of: under block-causal visibility the
    blocks, of which the later see the earlier."""
    if not row.method.block_causal:
        return [positions]
    cell = (positions + row.offset) // row.block_length
    return np.split(positions, np.flatnonzero(np.diff(cell)) + 1)


def _padded(parts: list[np.ndarray], width: int, device) -> Tensor:
    """(U, width): short ones are filled up with their last."""
    filled = [np.concatenate([part, np.full(width - len(part), part[-1] if len(part) else 0)]) for part in parts]
    return torch.from_numpy(np.stack(filled).astype(np.int64)).to(device)


def _compute(batch: Batch, rows, plan: Plan, request: Request, asked: list[_Asked], visible_to):
    """Logits (U or 2U, M, V) of the pass, and the cache that it saw."""
    device, canvas, guided = batch.canvas.tokens.device, batch.canvas, rows[0].branches == 2
    index = plan.index[[one.place for one in asked]]
    mine = [rows[one.place] for one in asked]
    tokens = torch.from_numpy(np.stack([one.tokens for one in asked])).to(device)
    states = Canvas(tokens, canvas.editable[index], canvas.valid[index], canvas.mask_id)
    width = max(request.slots.shape[1], *(len(one.slots) for one in asked))
    positions, cache, seen = None, None, canvas.tokens.shape[1]
    cached = rows[0].method.cached
    if cached:
        positions = _padded([one.positions for one in asked], max(len(one.positions) for one in asked), device)
        seen = batch.cache.length
        if rows[0].method.block_causal:
            seen = min(seen, int(positions.max()) + 1)
        cache = _cache(batch, asked, index, guided, seen)
        fill = [one.slots if len(one.slots) else one.positions[-1:] for one in asked]
    else:
        fill = [one.slots for one in asked]
    slots = _padded(fill, width, device)
    counts = [len(one.slots) for one in asked]
    valid = None
    if request.valid is not None or canvas.valid.shape[1] > seen:
        valid = states.valid[:, :seen] if seen <= states.valid.shape[1] else states.valid
        valid = None if bool(valid.all()) else valid
    sizes = None
    if getattr(batch.predictor, "exact_rows", False) and not any(row.gapped for row in mine):
        keys = tuple(min(row.slots, seen) if cached else row.length for row in mine)
        sizes = RowSizes(tuple(_count(row, one) for row, one in zip(mine, asked, strict=True)), keys, tuple(counts))
    states_request = Request(None, positions, slots, counts, torch.ones_like(slots, dtype=torch.bool), valid)
    logits = compute(
        batch.predictor, states, states_request, guided=guided, visible=visible_to(mine), cache=cache,
        shifted=shifted(batch), sizes=sizes,
    )  # fmt: skip
    return logits, cache


def _cache(batch: Batch, asked: list[_Asked], index: Tensor, guided: bool, seen: int) -> Drafted:
    """What the rows of the pass see of the cache; the second branches behind all the first."""
    count, branches = len(asked), 1 + guided
    index = torch.cat([index + branch * (batch.cache.rows // branches) for branch in range(branches)])
    true = [number + branch * count for branch in range(branches) for number, one in enumerate(asked) if one.true]
    before = [[number + branch * count for number in one.before] for branch in range(branches) for one in asked]
    keep = sorted({number for numbers in before for number in numbers})
    return Drafted(batch.cache, index, true, before, keep, seen)
