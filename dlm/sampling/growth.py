"""Rows that put masks in and take slots out while they are written: where, how many, and what moves with them.

Shapes: B rows of the batch, T slots, R rows of a pass, M places asked about, W slots of a tail, V vocabulary.

`confidence` (DAEDAL, arXiv:2508.00819, section 3.2, alg. 1). Before decoding, masks are added at the end of the region
while the mean probability of end-of-text over its last `tail_length` slots is below `tail_start`. While decoding, a
pass whose tail is below `tail_bound` turns the least certain of its places, where its token has a probability below
`grow_below`, into `grow_by` masks. The first pass that finds the tail certain enough is a decoding pass too. With a
cache, passes that do not compute the tail go by the last one that did.

`expand` (DreamOn). A committed expand token becomes two masks, and a place whose token is the delete token, or
end-of-text where the checkpoint has none, is taken out. Expansions are counted: a row makes at most twice as many as
its limit, so that it ends.

A row's next pass after a change computes all of its slots, since their positions and so their keys have moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlm.models.attention import Visible, full
from dlm.sampling.canvas import Canvas

if TYPE_CHECKING:
    from dlm.sampling.config import SamplingConfig
    from dlm.sampling.outcome import Pages
    from dlm.sampling.rows import Batch, Row

__all__ = [
    "check_growth",
    "expansions",
    "growth_tokens",
    "insertions",
    "resize",
    "tail_slots",
    "take_tail",
    "with_room",
]

EXPAND, DELETE = "<|expand|>", "<|delete|>"  # DreamOn's tokens, where a configuration names none
Changes = dict[int, int]  # slot -> how many masks stand in its place, 0 for none


def growth_tokens(tokenizer, settings) -> tuple[int | None, int | None]:
    """The ids of the expand and the delete token: the configuration's, else the tokenizer's; None where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # whose look-up does not list the vocabulary
    look_up = backend.token_to_id if backend is not None else (tokenizer.get_vocab() if tokenizer else {}).get
    expand, delete = getattr(settings, "expand_token_id", None), getattr(settings, "delete_token_id", None)
    return look_up(EXPAND) if expand is None else expand, look_up(DELETE) if delete is None else delete


# ---------------------------------------------------------------- before the first pass


def length_with_room(canvas: Canvas, gen_length: int) -> int:
    """Slots of the longest row once its region has gen_length places."""
    places = (canvas.editable & canvas.valid).sum(dim=1)
    return int((canvas.valid.sum(dim=1) + (gen_length - places).clamp_min(0)).max())


def with_room(canvas: Canvas, gen_length: int) -> Canvas:
    """The canvas with slots at the end of each row that do not exist yet: as many as its region may grow by.

    A region of more than gen_length places does not grow.
    """
    width = length_with_room(canvas, gen_length)
    if width <= canvas.tokens.shape[1]:
        return canvas
    wide = [x.new_zeros(len(x), width) for x in (canvas.tokens, canvas.editable, canvas.valid)]
    for new, old in zip(wide, (canvas.tokens, canvas.editable, canvas.valid), strict=True):
        new[:, : old.shape[1]] = old
    return Canvas(*wide, canvas.mask_id)


def check_growth(
    canvas: Canvas, config: SamplingConfig, visible: Visible, eos: Sequence[int], expand: int | None
) -> None:
    """Raises ValueError where the rows of a canvas cannot grow in this way."""
    if visible is not full:
        raise ValueError(
            f"grow {config.grow!r} moves what is written, and the blocks of a block-causal model stand still: use grow "
            "'block'"
        )
    slots = torch.arange(canvas.valid.shape[1], device=canvas.valid.device)
    if bool((canvas.valid != (slots < canvas.valid.sum(dim=1, keepdim=True))).any()):
        raise ValueError(f"grow {config.grow!r} needs rows that begin in slot 0: put the padding at the end")
    if config.grow == "expand":
        if expand is None:
            raise ValueError(
                "grow 'expand' is for checkpoints with an expand token, and this one names none: leave it out"
            )
        return
    if not eos:
        raise ValueError("grow looks for end-of-text, and the checkpoint names none: give eos_token_id")
    behind = canvas.given & (canvas.masked.cumsum(dim=1) > 0)
    if bool(behind.any()):
        raise ValueError(
            "grow 'confidence' looks at the end of a text, and here text stands behind a blank: leave it out, or give "
            "the blank a range of lengths, ___{2..20}"
        )


# ---------------------------------------------------------------- the tail


def tail_slots(batch: Batch, rows: Sequence[Row], positions: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The last slots (R, W) of each row's region and which of them are real (R, W); None where the pass does not
    compute them. positions (R, Q): the slots that it computes, None for all."""
    index = torch.tensor([row.index for row in rows], device=batch.layout.device)
    ours = (batch.canvas.editable & batch.canvas.valid)[index]
    back = ours.flip(1).cumsum(dim=1).flip(1)
    ours = ours & (back <= rows[0].config.tail_length)
    count = int(ours.sum(dim=1).max())
    slots = ours.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
    real = ours.gather(1, slots)
    slots = torch.where(real, slots, slots[:, :1])
    if positions is not None:
        at = torch.searchsorted(positions, slots).clamp_max(positions.shape[1] - 1)
        if not bool((positions.gather(1, at) == slots).all()):
            return None
    return slots, real


def take_tail(rows: Sequence[Row], tokens: Tensor, log_p: Tensor, real: Tensor, mask_id: int) -> None:
    """Writes into each row the mean probability of end-of-text over its tail; tokens (R, W), log_p (R, W, V)."""
    ends = list(rows[0].eos)
    ending = log_p[..., ends].exp().sum(dim=-1)
    written = (tokens[..., None] == tokens.new_tensor(ends)).any(dim=-1).to(ending.dtype)
    share = torch.where(tokens == mask_id, ending, written) * real
    for row, tail in zip(rows, (share.sum(dim=1) / real.sum(dim=1)).tolist(), strict=True):
        row.tail = tail


# ---------------------------------------------------------------- what a pass changes


def insertions(
    batch: Batch, rows: Sequence[Row], slots: Tensor, eligible: Tensor, chosen: Tensor, probability: Tensor
) -> tuple[Tensor, dict[int, Changes]]:
    """`confidence`: which places (R, M) are committed, and what becomes of which slots of which rows.

    eligible, chosen (R, M): the places that could be committed, and that a commit rule chose. probability (R, M) of
    each token proposed.
    """
    config, chosen, growths = rows[0].config, chosen.clone(), {}
    open_places = eligible & ~chosen & (probability < config.grow_below)
    least = probability.masked_fill(~open_places, torch.inf).argmin(dim=1)
    least_slot, any_open = slots.gather(1, least[:, None])[:, 0].tolist(), open_places.any(dim=1).tolist()
    for i, row in enumerate(rows):
        room = row.limit - row.places
        if row.sizing and room and row.tail < config.tail_start:
            chosen[i] = False
            last = int((batch.canvas.editable & batch.canvas.valid)[row.index].nonzero()[-1])
            growths[row.index] = {last: 1 + min(config.grow_by, room)}
            continue
        row.sizing = False
        extra = min(config.grow_by - 1, room)
        if extra and any_open[i] and row.tail < config.tail_bound:
            growths[row.index] = {least_slot[i]: 1 + extra}
    return chosen, growths


def expansions(
    batch: Batch, rows: Sequence[Row], slots: Tensor, token: Tensor, chosen: Tensor
) -> tuple[Tensor, dict[int, Changes]]:
    """`expand`: which places (R, M) hold their token, and what becomes of which slots of which rows.

    An expand token for which there is no room leaves its mask.
    """
    chosen, growths = chosen.clone(), {}
    expand, delete = batch.growth_tokens
    for i, row in enumerate(rows):
        removes = {delete} if delete is not None else set(row.eos)
        changes: Changes = {}
        for j in (
            (chosen[i] & torch.isin(token[i], token.new_tensor(sorted({expand, *removes})))).nonzero()[:, 0].tolist()
        ):
            chosen[i, j], slot = False, int(slots[i, j])
            if int(token[i, j]) != expand:
                changes[slot] = 0
            elif row.room_to_expand > sum(count == 2 for count in changes.values()):
                changes[slot] = 2
        row.expanded += sum(count == 2 for count in changes.values())
        if changes:
            growths[row.index] = changes
    return chosen, growths


def resize(batch: Batch, row: Row, changes: Changes, pages: Pages) -> None:
    """Gives a row its new slots: everything that is kept for a slot moves with it, and its blocks are laid out anew."""
    source: list[int] = []
    fresh: list[int] = []
    for slot in range(row.length):
        count = changes.get(slot)
        if count is not None:
            fresh += range(len(source), len(source) + count)
        source += [slot] * (1 if count is None else count)
    width, length, device = batch.canvas.tokens.shape[1], len(source), batch.layout.device
    assert length <= width, f"row {row.index} has {length} slots of {width}"
    order = torch.tensor(source + [0] * (width - length), dtype=torch.int64, device=device)
    new = torch.tensor(fresh, dtype=torch.int64, device=device)
    canvas, at = batch.canvas, row.index
    tokens, editable, valid = (x.clone() for x in (canvas.tokens, canvas.editable, canvas.valid))
    for x, empty in (
        (tokens, 0), (editable, False), (valid, False), (batch.layout, -1), (batch.certain, 1.0),
        (pages.committed, False), (pages.confidence, 0.0), (pages.revised, False),
    ):  # fmt: skip
        x[at] = x[at][order]
        x[at, length:] = empty
    tokens[at, new] = canvas.mask_id
    for x, empty in ((batch.certain, 1.0), (pages.committed, False), (pages.confidence, 0.0), (pages.revised, False)):
        x[at, new] = empty
    batch.canvas = replace(canvas, tokens=tokens, editable=editable, valid=valid)
    here = batch.layout[at] >= 0
    batch.layout[at] = torch.where(here, (here.cumsum(dim=0) - 1) // row.block_length, -1)
    if pages.likely:
        moved = {slot: place for place, slot in enumerate(source) if slot not in changes}
        for name in [name for name in pages.likely if name[0] == at]:
            named = pages.likely.pop(name)
            if name[1] in moved:
                pages.likely[at, -1 - moved[name[1]]] = named  # below 0 until all have moved
        for name in [name for name in pages.likely if name[0] == at]:
            pages.likely[at, -1 - name[1]] = pages.likely.pop(name)
    row.sizes = torch.bincount(batch.layout[at][here]).tolist() if bool(here.any()) else []
    row.places += length - row.length
    row.length, row.stale, row.past, row.edition = length, True, None, row.edition + 1
    row.leads, row.quotas = [False] * len(row.sizes), [[] for _ in row.sizes]
