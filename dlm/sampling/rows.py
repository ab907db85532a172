"""Rows that are denoised together: they join and leave between passes.

Shapes: B rows of the batch, T slots, R rows that join.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlm.models.attention import full
from dlm.models.kv_cache import KVCache
from dlm.sampling.canvas import Canvas, check_slots
from dlm.sampling.config import SamplingConfig
from dlm.sampling.constraints import Constraint, Written
from dlm.sampling.draft import Drafts
from dlm.sampling.growth import check_growth, length_with_room, with_room
from dlm.sampling.methods import METHODS, visibility
from dlm.sampling.revise import REVISIONS
from dlm.sampling.row import Row
from dlm.sampling.schedule import lay_out, quotas_of

if TYPE_CHECKING:
    from dlm.sampling.telemetry import Telemetry

__all__ = ["Batch", "Row"]


class Batch:
    """Rows that share forward passes. What a row becomes does not depend on the others.

    predictor: as `denoise` takes it. vocab_size: ids from there on are never proposed. eos_token_ids: what ends a
    text, unless a row's settings say. growth_tokens: the checkpoint's expand and delete token.
    canvas, layout (B, T): the slots of all rows and the block of each (-1: none); a free index has no valid slot.
    extra (B, T) or None: slots that fill a row's last block up, which nobody asked for. width: slots asked for.
    """

    def __init__(
        self,
        predictor,
        *,
        vocab_size: int | None = None,
        eos_token_ids: Sequence[int] = (),
        growth_tokens: tuple[int | None, int | None] = (None, None),
    ):
        self.growth_tokens = growth_tokens
        self.predictor, self.vocab_size, self.eos_token_ids = predictor, vocab_size, tuple(eos_token_ids)
        self.fixed_shapes = getattr(predictor, "fixed_shapes", False)
        self.canvas: Canvas | None = None
        self.layout: Tensor | None = None
        self.certain: Tensor | None = None  # (B, T): how sure each place was when it was committed
        self.rows: list[Row | None] = []
        self.cache: KVCache | None = None
        self.branches = 1  # of the cache: guidance needs two for each row
        self.turns = self._serial = self.width = 0
        self.extra: Tensor | None = None
        self.telemetry: Telemetry | None = None
        self.lenient = False  # whether a row whose logits are no numbers ends alone, in place of an error for all
        self.likely = 0  # how many of the most probable tokens a state names
        self.plans: dict = {}
        self.drafts = Drafts()
        self.unchecked: deque = deque()
        self.lag = 0

    @property
    def active(self) -> list[Row]:
        """The rows that are not done, by index."""
        return [row for row in self.rows if row is not None and not row.done]

    @torch.inference_mode()
    def join(
        self,
        canvas: Canvas,
        config: SamplingConfig,
        constraints: Sequence[Sequence[Constraint]] | None = None,
    ) -> list[Row]:
        """Adds the rows of `canvas` (R, T), all with these settings; row i has the seed of its place.

        constraints: each row's, none for a row that may hold any text.
        Raises ValueError for settings that fit neither the model nor the canvas.
        """
        eos = config.eos_ids or self.eos_token_ids
        if (config.stop_at_eos or config.suppress_eos or config.delay_eos) and not eos:
            raise ValueError(
                "stop_at_eos, suppress_eos and delay_eos need an end-of-text id, and the checkpoint names none: "
                "give eos_token_id"
            )
        method = METHODS[config.method]
        block_length, visible = visibility(self.predictor, config.method, config.block_length)
        settings = getattr(self.predictor, "config", None)
        if (own := getattr(settings, "mask_token_id", None)) is not None and canvas.mask_id != own:
            raise ValueError(
                f"the canvas has mask_id {canvas.mask_id}, and the model's mask token is {own}: give the "
                "canvas that one"
            )
        limit = getattr(settings, "max_sequence_length", None)
        if config.moves:
            check_growth(canvas, config, visible, eos, self.growth_tokens[0])
            check_slots(length_with_room(canvas, config.gen_length), settings)
            canvas = with_room(canvas, config.gen_length)
        count, slots = canvas.tokens.shape
        check_slots(slots, settings)
        if visible is full and (config.align != "start" or config.whole_blocks):
            raise ValueError(
                "align and whole_blocks are for block-causal models or method block_causal, and this is neither: "
                "leave them out"
            )
        shifted = getattr(getattr(self.predictor, "config", None), "shift_logits", None)
        if shifted and config.shadowed:
            name = "edit_shadow" if config.revise == "edit" else f"revise {config.revise!r}"
            raise ValueError(
                f"{name} hides a token from its own place, and this model's logits are shifted by "
                "one: take another revision"
            )
        if shifted and config.draft and method.cached:
            raise ValueError(
                f"draft with method {config.method!r} computes a block alone, and this model's logits are shifted by "
                "one place: use method none, or leave draft out"
            )
        device = canvas.tokens.device
        offsets = [0] * count
        if config.align == "prompt":
            first = torch.where(canvas.masked, torch.arange(slots, device=device), slots).amin(dim=1)
            offsets = [-prompt % block_length for prompt in first.tolist()]
        asked, extra = canvas, None
        if config.whole_blocks:
            canvas, extra = canvas.filled_up(block_length, offsets, limit)
            extra = extra if bool(extra.any()) else None
        revised = REVISIONS[config.revise] is not None and not method.coarse
        layout, sizes = lay_out(canvas, block_length, visible, revised=revised, offsets=offsets)
        starts_masked = first_masked(layout, canvas.masked)
        shown = first_block(canvas, layout, eos) if config.grow == "block" else canvas
        ends = canvas.valid.sum(dim=1).tolist()
        gaps = (canvas.valid.cummin(dim=1).values != canvas.valid).any(dim=1).tolist()
        lengths, seeds, rules = shown.valid.sum(dim=1).tolist(), config.row_seeds(count), rules_of(config)
        written: list[Written | None] = [None] * count
        for i, here in enumerate(constraints or ()):
            if here and config.moves:
                raise ValueError(f"a pattern fits a number of tokens, and grow {config.grow!r} changes it: drop one")
            if here:
                written[i] = Written(here, canvas.tokens[i].tolist(), canvas.mask_id, config.constraint_search)
                whole = set(written[i].where) >= set(asked.masked[i].nonzero()[:, 0].tolist())
                if config.stop_at_eos and not (whole and len(here) == 1):
                    raise ValueError(
                        "stop_at_eos ends a whole text, and here a blank is constrained, which may end before the "
                        "text does: leave it out"
                    )
        joined = []
        for i, index in enumerate(self._free(count)):
            masked = sizes[i]
            if revised:
                masked = torch.bincount(layout[i][canvas.masked[i]], minlength=len(sizes[i])).tolist()
            leads = [config.commit_first and lead for lead in starts_masked[i]]
            spans = torch.bincount(layout[i][layout[i] >= 0], minlength=len(sizes[i])).tolist()
            quotas = quotas_of(config, masked, spans, leads, sizes[i])
            flat = [quota for block in quotas for quota in block]
            row = Row(
                index,
                self._serial,
                rules,
                visible,
                eos,
                lengths[i],
                ends[i],
                sizes[i],
                masked,
                quotas,
                [0, *accumulate(len(block) for block in quotas)],
                torch.tensor(
                    [*flat, int(config.commit == "origin")],
                    dtype=None if config.commit == "origin" else torch.int64,
                    device=device,
                ),
                torch.Generator(device).manual_seed(seeds[i]),
                leads,
                block_length,
                offsets[i],
                written[i],
                gapped=gaps[i],
                left=masked[0] if masked else 0,
                lefts=masked,
            )
            if config.moves:
                row.places = int((canvas.editable & canvas.valid)[i].sum())
                row.limit, row.sizing = max(config.gen_length, row.places), config.grow == "confidence"
            joined.append(row)
            self._serial += 1
        self.width = max(self.width, slots)
        self._place(shown, torch.full_like(layout, -1) if method.coarse else layout, joined, extra)
        self.lag = int(device.type != "cpu")  # a GPU is asked about a turn while it works on the next one
        return joined

    def open_block(self, row: Row) -> None:
        """Shows a row that grows its next block, or ends it where what is written holds end-of-text."""
        valid = self.canvas.valid.clone()
        ours = self.canvas.tokens[row.index][self.canvas.editable[row.index] & valid[row.index]].tolist()
        if set(ours) & set(row.eos):
            row.end()
            return
        valid[row.index] |= self.layout[row.index] == row.block
        row.length = int(valid[row.index].sum())
        self.canvas = replace(self.canvas, valid=valid)

    def leave(self, row: Row) -> None:
        """Removes a row, done or not; its index is free for one that joins."""
        assert self.rows[row.index] is row, f"row {row.serial} is not in this batch"
        row.end()
        self.drafts.forget(row)
        self.rows[row.index] = None
        self.plans = {kind: kept for kind, kept in self.plans.items() if row.serial not in kept[2]}
        if row.fault is not None and self.cache is not None:  # what is hidden is still multiplied by 0, and NaN stays
            each = self.cache.rows // self.branches
            self.cache.clear([row.index + branch * each for branch in range(self.branches)])
        valid, layout = self.canvas.valid.clone(), self.layout.clone()
        valid[row.index], layout[row.index] = False, -1
        self.canvas, self.layout = replace(self.canvas, valid=valid), layout

    def close(self) -> None:
        """Gives the cache back where the predictor lends its own."""
        if self.cache is not None:
            getattr(self.predictor, "give_back", lambda cache: None)(self.cache)
            self.cache = None

    def _free(self, count: int) -> list[int]:
        """Indices for rows that join, the lowest free ones first."""
        free = [index for index, row in enumerate(self.rows) if row is None]
        return (free + list(range(len(self.rows), len(self.rows) + count)))[:count]

    @property
    def shown(self) -> Canvas:
        """The canvas as it was asked for."""
        if self.extra is None:
            return self.canvas
        keep = ~self.extra[:, : self.width]
        tokens, editable, valid = (
            x[:, : self.width] for x in (self.canvas.tokens, self.canvas.editable, self.canvas.valid)
        )
        return Canvas(tokens, editable & keep, valid & keep, self.canvas.mask_id)

    def _place(self, canvas: Canvas, layout: Tensor, joined: list[Row], extra: Tensor | None) -> None:
        """Writes the rows that join into the canvas and the layout, which grow where they must."""
        if self.canvas is None:
            self.canvas, self.layout, self.extra = canvas, layout, extra
            self.certain = torch.ones(layout.shape, dtype=torch.float32, device=layout.device)
        else:
            rows = max(len(self.rows), max((row.index for row in joined), default=-1) + 1)
            slots = max(self.canvas.tokens.shape[1], canvas.tokens.shape[1])
            grown = {
                name: _grown(getattr(self.canvas, name), rows, slots, 0) for name in ("tokens", "editable", "valid")
            }
            self.certain = _grown(self.certain, rows, slots, 1)
            self.certain[[row.index for row in joined]] = 1.0
            self.layout, width = _grown(self.layout, rows, slots, -1), canvas.tokens.shape[1]
            if extra is not None or self.extra is not None:
                before = self.extra if self.extra is not None else self.layout.new_zeros(0, 0, dtype=torch.bool)
                self.extra = _grown(before, rows, slots, False)
            for i, row in enumerate(joined):
                if self.extra is not None:
                    self.extra[row.index] = False
                    if extra is not None:
                        self.extra[row.index, :width] = extra[i]
                self.layout[row.index, :width], self.layout[row.index, width:] = layout[i], -1
                for name, whole in grown.items():
                    whole[row.index, :width], whole[row.index, width:] = getattr(canvas, name)[i], 0
            self.canvas = replace(self.canvas, **grown)
        self.rows += [None] * (max((row.index for row in joined), default=-1) + 1 - len(self.rows))
        for row in joined:
            self.rows[row.index] = row

    def make_room(self) -> None:
        """A cache with a row for every branch of every row, the second branches behind all the first: once for all that
        joined before a pass."""
        branches = max((row.branches for row in self.rows if row is not None and row.method.cached), default=0)
        if not branches:
            return
        rows, slots = self.canvas.tokens.shape
        before, kept = self.cache, self.branches
        self.branches = max(branches, kept)
        if before is not None and (before.rows, before.length) == (rows * self.branches, slots):
            return
        self.cache = getattr(self.predictor, "borrow", KVCache)(rows * self.branches, slots)
        if before is not None:
            for branch in range(kept):
                count = before.rows // kept
                self.cache.copy_rows(before, slice(branch * count, (branch + 1) * count), branch * rows)
            getattr(self.predictor, "give_back", lambda cache: None)(before)


def rules_of(config: SamplingConfig) -> SamplingConfig:
    """The settings that passes read: rows that differ in their seed, length or text to match alone share commits."""
    same = SamplingConfig()
    names = ("seed", "gen_length", "regex", "json_schema", "choices")
    return replace(config, **{name: getattr(same, name) for name in names})


def first_masked(layout: Tensor, masked: Tensor) -> list[list[bool]]:
    """For each row's blocks whether the first slot of the block is masked; layout and masked (R, T)."""
    firsts = []
    for row, here in zip(layout, masked, strict=True):
        count = int(row.max()) + 1 if len(row) else 0
        slots = torch.arange(len(row), device=row.device)
        first = torch.full((count,), len(row), device=row.device)
        inside = row >= 0
        first = first.scatter_reduce(0, row[inside], slots[inside], "amin")
        firsts.append(here[first].tolist())
    return firsts


def first_block(canvas: Canvas, layout: Tensor, eos: Sequence[int]) -> Canvas:
    """The canvas of rows that grow: what is given and the first block of each, the others hidden.

    Raises ValueError where no end-of-text is known, or text stands behind the region.
    """
    if not eos:
        raise ValueError("grow ends a text at its end-of-text, and the checkpoint names none: give eos_token_id")
    behind = canvas.given & (canvas.masked.cumsum(dim=1) > 0)
    if bool(behind.any()):
        raise ValueError("grow 'block' goes on with a text, and here text stands behind a blank: leave it out")
    return replace(canvas, valid=canvas.valid & (layout <= 0))


def _grown(x: Tensor, rows: int, slots: int, value: int) -> Tensor:
    """A copy of x (B, T) that is (rows, slots), with `value` where x has nothing."""
    out = x.new_full((rows, slots), value)
    out[: x.shape[0], : x.shape[1]] = x
    return out
