"""After a pass: every row goes on to its next pass, its next block, or its end.

Shapes: B rows of the batch, T slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlm.sampling.rows import Batch, Row

if TYPE_CHECKING:
    from dlm.sampling.outcome import Pages
    from dlm.sampling.step import Check

__all__ = ["advance", "end_faulty", "is_any", "refuse_nan", "stop_ended"]


def advance(batch: Batch, active: list[Row], pages: Pages) -> None:
    """Moves every row on to its next pass, its next block, or its end."""
    active = [row for row in active if row.fault is None]
    free = [row for row in active if not row.method.several]
    counted = [row for row in free if row.quota is None or row.revision is not None]
    committed = revised = masked = [0] * len(batch.rows)
    if counted:
        committed = pages.committed.sum(dim=1).tolist()
    if any(row.revision is not None for row in counted):
        again = pages.revised & batch.canvas.masked
        revised, masked = pages.revised.sum(dim=1).tolist(), again.sum(dim=1).tolist()
    for row in active:
        if row.method.several:
            row.advance_several(masks_of(batch, row))
        elif row.config.moves:
            row.advance_moved(masks_of(batch, row), revised[row.index])
        elif row in counted:
            row.advance(committed[row.index], masked[row.index], revised[row.index])
        else:
            row.advance(row.quota)
        if row.config.grow == "block" and row.turn == 0 and not row.done:
            batch.open_block(row)


def masks_of(batch: Batch, row: Row) -> list[int]:
    """The masked places of each block of a row."""
    masked = batch.canvas.masked[row.index]
    return torch.bincount(batch.layout[row.index][masked], minlength=len(row.sizes)).tolist()


def stop_ended(batch: Batch, rows: list[Row]) -> None:
    """Ends the rows whose end-of-text has nothing masked before it, and fills what they leave with it."""
    rows = [row for row in rows if row.revision is None or row.turn == 0]  # a token that may be revised ends nothing
    if not rows:
        return
    canvas, tokens = batch.canvas, batch.canvas.tokens
    may_end = canvas.editable & canvas.valid
    for eos in {row.eos: None for row in rows}:
        if not bool((may_end & is_any(canvas.tokens, eos)).any()):
            continue  # as after most passes
        slots = torch.arange(tokens.shape[1], device=tokens.device)
        ours = [row for row in rows if row.eos == eos]
        index = torch.tensor([row.index for row in ours], device=tokens.device)
        part = canvas.rows(index)
        masked = part.masked
        ending = part.editable & part.valid & is_any(part.tokens, eos)
        first_end = torch.where(ending, slots, masked.shape[1]).amin(dim=1)
        first_mask = torch.where(masked, slots, masked.shape[1]).amin(dim=1)
        ended = first_end < first_mask
        tokens = tokens.index_put((index,), part.tokens.masked_fill(masked & ended[:, None], eos[0]))
        for row, over in zip(ours, ended.tolist(), strict=True):
            if over:
                row.end()
    batch.canvas = replace(canvas, tokens=tokens)


def refuse_nan(batch: Batch, before: int) -> None:
    """Raises FloatingPointError if the logits of a turn before that one were not numbers; in a lenient batch the rows
    that had them end instead."""
    while batch.unchecked and batch.unchecked[0][0] < before:
        number, check, rows = batch.unchecked.popleft()
        if batch.lenient:
            end_faulty(rows, check.bad_rows, check)
            continue
        try:
            check.refuse()
        except FloatingPointError as error:
            raise FloatingPointError(f"pass {number}: {error}") from None


def is_any(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """bool, the tokens' shape: whether each is one of `ids`."""
    matches = torch.zeros_like(tokens, dtype=torch.bool) if not ids else tokens == ids[0]
    for token in ids[1:]:
        matches |= tokens == token
    return matches


def end_faulty(rows: list[Row], bad: list[int], check: Check) -> None:
    """Ends the rows whose logits were no numbers, and says so in each."""
    try:
        check.refuse()
    except FloatingPointError as error:
        for place in bad:
            rows[place].fault = f"pass {rows[place].nfe}: {error}"
            rows[place].end()
