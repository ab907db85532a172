"""Which rows share a forward pass, which slots it computes, and for which places it proposes tokens.

Shapes: B rows of the batch, R rows of one pass, T slots, Q slots computed, M places asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.models.attention import Visible, block_causal_from
from dlm.sampling.methods import Planner, Signals
from dlm.sampling.rows import Batch, Row
from dlm.sampling.step import Request

__all__ = ["Plan", "alike", "plan_pass", "request_of", "shifted", "visible_to"]


@dataclass(frozen=True)
class Plan:
    """What a pass computes. index (R,): the rows; block (R, 1): theirs; span (R, T) bool: the block's slots;
    positions (R, Q): the slots to compute, ascending, short rows padded with their last, None for all; counts: how
    many slots of each row those are."""

    index: Tensor
    block: Tensor
    span: Tensor
    positions: Tensor | None
    counts: list[int]

    def of(self, few: Tensor) -> Plan:
        """The plan of some of the rows; few (N,) into R."""
        positions = None if self.positions is None else self.positions[few]
        counts = [self.counts[i] for i in few.tolist()]
        return Plan(self.index[few], self.block[few], self.span[few], positions, counts)


def planner_of(row: Row) -> Planner:
    """What the row's method computes at its next pass."""
    return row.method.first if row.turn == 0 or row.stale else row.method.later


def alike(rows: Sequence[Row], together: bool = False) -> list[list[Row]]:
    """The rows in groups that share a forward pass: those that ask the model to compute the same kind of pass; where
    the predictor lays rows `together` end to end, first passes of a block stand beside later ones."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        settings = row.config
        parts = settings.sub_block_length, settings.sub_block_cache, settings.draft > 0, together and row.gapped
        planner = None if together and mixes(row) else planner_of(row)
        key = (planner, settings.method, settings.window, row.branches, row.visible, settings.revise, parts)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def mixes(row: Row) -> bool:
    """Whether the row's first and later passes read the same of its settings, but for the slots they compute."""
    config = row.config
    plain = config.revise == "none" and config.sub_block_length is None and not config.sub_block_cache
    return plain and row.method.cached and not row.method.coarse and config.grow == "none"


def computed_by(rows: Sequence[Row], span: Tensor, before: Tensor) -> Tensor | None:
    """The slots (R, T) that each row's planner computes, None for all of all rows."""
    planners, window = [planner_of(row) for row in rows], rows[0].config.window
    if len(kinds := dict.fromkeys(planners)) == 1:
        return planners[0](span, Signals(before, window))
    computed = torch.ones_like(span)
    for kind in kinds:
        here = [i for i, planner in enumerate(planners) if planner is kind]
        if (slots := kind(span[here], Signals(before[here], window))) is not None:
            computed[here] = slots
    return computed


def plan_pass(batch: Batch, rows: Sequence[Row]) -> Plan:
    """The plan of these rows' next pass; kept, since later passes of a block have the same."""
    planners = [planner_of(row) for row in rows]
    kind = planners[0] if len({*planners}) == 1 else None, rows[0].config
    key = tuple(
        (row.serial, row.block, row.ahead, row.done_before, row.edition, planner)
        for row, planner in zip(rows, planners, strict=True)
    )
    kept = batch.plans.get(kind)
    alone = rows[0].config.sub_block_cache and rows[0].turn > 0
    if not alone and kept is not None and kept[0] == key and kept[1].span.shape[1] == batch.layout.shape[1]:
        return kept[1]
    device = batch.layout.device
    index = torch.tensor([row.index for row in rows], device=device)
    block = torch.tensor([row.block for row in rows], device=device)[:, None]
    front, since = (
        torch.tensor(blocks, device=device)[:, None]
        for blocks in ([row.block + row.ahead for row in rows], [row.done_before for row in rows])
    )
    layout = batch.layout[index]
    span, before = (layout >= block) & (layout <= front), (layout >= since) & (layout < block) & (layout >= 0)
    computed = computed_by(rows, span, before)
    if computed is None:
        positions, counts = None, [row.length for row in rows]
    else:
        if any(row.known for row in rows):
            known = torch.tensor([row.known for row in rows], device=device)[:, None]
            computed = computed & (torch.arange(computed.shape[1], device=device) >= known)
        masked = batch.canvas.masked[index] & span
        if alone:
            computed = narrowed(computed, masked, span, rows)
            masked = masked & sub_block(masked, span, rows[0].config.sub_block_length)
        if shifted(batch):  # a guess is the output one slot before
            asked = masked
            if not alone:  # the same at every pass of a block, whatever rows stand beside this one
                asked = span & batch.canvas.editable[index] & ~led(rows, span)
            computed = computed | torch.nn.functional.pad(asked[:, 1:], (0, 1))
        computed = computed & batch.canvas.valid[index]
        size = computed.sum(dim=1)
        counts = size.tolist()
        ascending = leading(computed, max(counts))
        within = torch.arange(ascending.shape[1], device=device).minimum(size[:, None] - 1)
        positions = ascending.gather(1, within)
    plan = Plan(index, block, span, positions, counts)
    batch.plans[kind] = (key, plan, {row.serial for row in rows})
    return plan


def led(rows: Sequence[Row], span: Tensor) -> Tensor:
    """(R, T) bool: the first slot of a row's block where the first pass commits it, and no later one asks about it."""
    leads = torch.tensor([row.leads[row.block] for row in rows], device=span.device)[:, None]
    slots = torch.arange(span.shape[1], device=span.device)
    return leads & (slots == span.to(torch.uint8).argmax(dim=1, keepdim=True))


def shifted(batch: Batch) -> bool:
    """Whether the checkpoint's guess for slot i is its output at slot i - 1."""
    return bool(getattr(getattr(batch.predictor, "config", None), "shift_logits", None))


def sub_block(masked: Tensor, span: Tensor, length: int) -> Tensor:
    """(R, T) bool: the slots of the sub-block of `length` slots that holds a row's first masked place, counted from
    the start of its block; masked, span (R, T)."""
    slots = torch.arange(span.shape[1], device=span.device)
    start, first = (torch.where(here, slots, span.shape[1]).amin(dim=1, keepdim=True) for here in (span, masked))
    begin = start + (first - start) // length * length
    return span & (slots >= begin) & (slots < begin + length)


def narrowed(computed: Tensor, masked: Tensor, span: Tensor, rows: Sequence[Row]) -> Tensor:
    """What a pass computes with `sub_block_cache`: the sub-block alone where its first place is written and a pass has
    computed the whole block since its first place was; else all of it (Fast-dLLM v2, arXiv:2509.26328)."""
    part = sub_block(masked, span, rows[0].config.sub_block_length)
    slots = torch.arange(span.shape[1], device=span.device)
    first = slots == torch.where(part, slots, span.shape[1]).amin(dim=1, keepdim=True)
    ready = torch.tensor([row.turn > row.leads[row.block] for row in rows], device=span.device)
    alone = ready & ~(first & masked).any(dim=1)
    return torch.where(alone[:, None], part, computed)


def request_of(batch: Batch, rows: Sequence[Row], plan: Plan) -> tuple[Request, Tensor]:
    """What the pass is asked, and (R, M) which of its places are masked and may be committed."""
    whole = len(rows) == len(batch.rows)
    canvas = batch.canvas if whole else batch.canvas.rows(plan.index)
    masked = canvas.masked if rows[0].choosing else canvas.masked & plan.span
    if rows[0].config.sub_block_length is not None and not rows[0].choosing:
        masked = masked & sub_block(masked, plan.span, rows[0].config.sub_block_length)
    asked, counts = masked, [row.asked for row in rows]
    if rows[0].revision is not None and not rows[0].choosing:
        asked, counts = plan.span & canvas.editable & canvas.valid, [row.sizes[row.block] for row in rows]
    slots = leading(asked, max(row.most_asked for row in rows) if batch.fixed_shapes else max(counts))
    eligible = asked.gather(1, slots)
    valid = canvas.valid if any(row.length < canvas.tokens.shape[1] for row in rows) else None
    request = Request(None if whole else plan.index, plan.positions, slots, counts, eligible, valid)
    open_places = eligible if asked is masked else masked.gather(1, slots)
    if any(leads := [row.leading for row in rows]):
        first = plan.span.to(torch.uint8).argmax(dim=1, keepdim=True)
        open_places = open_places & (~torch.tensor(leads, device=slots.device)[:, None] | (slots == first))
    return request, open_places


def leading(here: Tensor, count: int) -> Tensor:
    """(R, count) the slots where `here` (R, T) holds, ascending, then others."""
    return here.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]


def visible_to(rows: list[Row]) -> Visible:
    """The rule of a pass of these rows, whose blocks may begin before slot 0."""
    if not any(row.offset for row in rows):
        return rows[0].visible
    return block_causal_from(rows[0].block_length, tuple(row.offset for row in rows) * rows[0].branches)
