"""The outcome of a pass: logits -> tokens and confidences -> what is committed, what is revised, and how rows grow.

Shapes: B rows, T slots of the canvas, R rows of one forward pass, M slots asked about, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dlm.sampling.canvas import Canvas
from dlm.sampling.commit import Step, by_blocks, choose, coarse_block
from dlm.sampling.config import SamplingConfig
from dlm.sampling.constraints import allowed_tokens, best_words, change_in_order, commit_in_order
from dlm.sampling.growth import expansions, insertions
from dlm.sampling.planning import Plan, visible_to
from dlm.sampling.propose import drawn_order
from dlm.sampling.remask import draw_steps
from dlm.sampling.revise import REVISIONS, Slate
from dlm.sampling.rows import Batch, Row
from dlm.sampling.settle import is_any
from dlm.sampling.stability import stable_places
from dlm.sampling.step import Check, Request, branches, decide_all, guided, held_probability

__all__ = ["Pages", "commit", "prediction"]


@dataclass(frozen=True)
class Pages:
    """What a turn writes, (B, T) each: the tokens, which were committed, how sure, and which were revised; likely is as
    in a state; grown: of each row that changes its length, what becomes of which slots."""

    tokens: Tensor
    committed: Tensor
    confidence: Tensor
    revised: Tensor
    likely: dict[tuple[int, int], list[tuple[int, float]]]
    grown: dict[int, dict[int, int]]

    @classmethod
    def of(cls, canvas: Canvas, likely: dict | None = None) -> Pages:
        """Those of a step from this canvas on."""
        nothing = torch.zeros_like(canvas.valid)
        sure = torch.zeros(canvas.tokens.shape, dtype=torch.float32, device=canvas.tokens.device)
        return cls(canvas.tokens.clone(), nothing, sure, nothing.clone(), {} if likely is None else likely, {})

    def add(self, step: Pages) -> None:
        """Adds what a later step of the same turn wrote."""
        self.tokens.copy_(step.tokens)
        self.committed.logical_or_(step.committed)
        self.confidence.add_(step.confidence)


@dataclass(frozen=True)
class Asked:
    """The places that a pass asks about, in what is (B, T): slots (R, M) of rows (R,), None for all rows in order."""

    rows: Tensor | None
    slots: Tensor

    def of(self, x: Tensor) -> Tensor:
        """x at these places, (R, M)."""
        return x.gather(1, self.slots) if self.rows is None else x[self.rows[:, None], self.slots]

    def put(self, x: Tensor, values: Tensor) -> None:
        """Writes values (R, M) there."""
        if self.rows is None:  # quicker than an index of two tensors
            x.scatter_(1, self.slots, values)
        else:
            x[self.rows[:, None], self.slots] = values


def commit(
    batch: Batch,
    rows: list[Row],
    plan: Plan,
    request: Request,
    eligible: Tensor,
    logits: Tensor,
    shadow: Tensor | None,
    pages: Pages,
) -> None:
    """Proposes tokens from logits (R, M, V) for rows of the same settings, commits what the rule says, revises."""
    config, where = rows[0].config, Asked(request.rows, request.slots)
    written = [row.written for row in rows]
    bound = any(constraint is not None for constraint in written)
    suppressed = suppressed_of(batch, rows[0])
    options = {
        "mask_id": batch.canvas.mask_id,
        "vocab_size": batch.vocab_size,
        "suppressed": () if bound else suppressed,  # a constraint says itself where end-of-text stands
        "kernels": getattr(batch.predictor, "kernels", None),
    }
    generators = [row.generator for row in rows]
    allowed = None
    if bound:
        allowed = allowed_tokens(written, request.slots, eligible, logits.shape[-1], suppressed)
    elif config.grow == "expand" and not all(row.room_to_expand for row in rows):
        allowed = torch.ones(*request.slots.shape, logits.shape[-1], dtype=torch.bool, device=logits.device)
        for i, row in enumerate(rows):
            allowed[i, :, batch.growth_tokens[0]] = row.room_to_expand > 0
    if config.draft and allowed is not None:
        batch.drafts.allow(rows, request, pages.tokens, allowed)
    token, confidence, largest = decide_all(logits, request, config, generators=generators, allowed=allowed, **options)
    if bound and config.constraint_search == "viterbi":
        token, confidence = best_words(written, request, eligible, logits, token, confidence, config)
    batch.unchecked.append((batch.turns, Check(largest, request), rows))
    if batch.likely:
        note_likely(batch, rows, request, logits, pages)
    certain = confidence
    if config.delay_eos:
        certain = confidence.masked_fill(is_any(token, rows[0].eos), -torch.inf)
    if rows[0].choosing:
        size = torch.tensor([row.left for row in rows], device=token.device)
        eligible = coarse_block(certain, eligible, is_any(token, rows[0].eos), size)
        batch.layout[plan.index] = batch.layout[plan.index].scatter_add(1, request.slots, eligible * (plan.block + 1))
    if config.order_temperature > 0:
        certain = drawn_order(certain, config.order_temperature, request.counts, generators)
    held = where.of(pages.tokens)
    revisable = drawn = quota = None
    if config.commit != "quota" or any((row.quota or 2) > 1 for row in rows):
        quota = torch.stack([row.share for row in rows])
    if config.commit == "ancestral" or config.revise != "none":
        revisable = request.eligible & (held != batch.canvas.mask_id)
    if config.commit == "ancestral" or config.revise == "remask":
        drawn = draw_steps(rows, eligible, revisable, where.of(batch.certain))
    take = None if drawn is None else drawn.take
    choosing = commit_rule(batch, rows, where, eligible, logits, quota, take)
    chosen = choosing(certain)
    if batch.telemetry is not None:
        batch.telemetry.note(batch, rows, request, visible_to(rows), logits, certain, chosen, choosing, allowed)
    if bound:

        def again(row: int, place: int, allowed: np.ndarray) -> tuple[int, float]:
            few = logits[[row + len(rows) * branch for branch in range(rows[row].branches)], place][:, None]
            one = Request.one(request.slots[row : row + 1, place : place + 1])
            mask = torch.zeros(1, 1, logits.shape[-1], dtype=torch.bool, device=logits.device)
            mask[..., : len(allowed)] = torch.from_numpy(allowed[: logits.shape[-1]]).to(mask.device)
            new, sure, _ = decide_all(few, one, config, generators=[generators[row]], allowed=mask, **options)
            return int(new), float(sure)

        fixed = config.commit in ("quota", "sequential", "ancestral")
        token, confidence, chosen = commit_in_order(
            written, request.slots, token, confidence, chosen, again, keep_count=fixed
        )
    if config.moves:
        chosen = grow(batch, rows, request.slots, eligible, logits, token, confidence, chosen, pages)
    if (revision := REVISIONS[config.revise]) is not None:
        best = (token, confidence)
        if revision.compares and (config.edit_shadow or not config.is_greedy):
            seen = shadow if config.edit_shadow else logits
            best = decide_all(seen, request, config.greedy, generators=generators, allowed=allowed, **options)[:2]
        again = None if drawn is None else drawn.again
        sure = None if shadow is None else held_probability(shadow, held)
        slate = Slate(held, token, chosen, revisable, *best, again, sure, batch.canvas.mask_id, config, rows)
        token, revised = revision.rule(slate)
        if bound:
            revised = change_in_order(written, request.slots, token, revised, batch.canvas.mask_id)
        where.put(pages.revised, revised)
    new = chosen if revision is None else chosen | revised
    where.put(pages.tokens, torch.where(new, token, held))
    if revision is not None:
        where.put(batch.certain, torch.where(chosen, confidence.float(), where.of(batch.certain)))
    where.put(pages.committed, chosen)
    where.put(pages.confidence, confidence.float().masked_fill(~chosen, 0.0))  # torch.where copies its 0.0 to a GPU


def suppressed_of(batch: Batch, row: Row) -> tuple[int, ...]:
    """The ids that no place of the row may take beside the mask: end-of-text where it is asked for, and the tokens of
    growth where nothing grows."""
    suppressed = row.eos if row.config.suppress_eos else ()
    if row.config.grow == "expand":
        return () if batch.growth_tokens[1] is None else suppressed  # end-of-text takes a place out
    return suppressed + tuple(token for token in batch.growth_tokens if token is not None)


def commit_rule(
    batch: Batch, rows: list[Row], where: Asked, eligible: Tensor, logits: Tensor, quota: Tensor | None, take
) -> Callable[[Tensor], Tensor]:
    """The commit rule of a pass: confidence (R, M) -> which places are committed."""
    config, stable = rows[0].config, None
    if config.commit == "stable":
        stable = stable_places(rows, where.slots, eligible, prediction(logits, config), config)
    apart = config.spacing, config.spacing_threshold, where.slots
    rule = Step(quota, config.threshold, config.factor, config.entropy_bound, take, stable, *apart)
    if not rows[0].method.several:
        return partial(choose, config.commit, eligible=eligible, step=rule)
    block = where.of(batch.layout)
    forced = torch.stack([torch.isin(b, b.new_tensor(row.forced)) for b, row in zip(block, rows, strict=True)])
    return partial(by_blocks, eligible=eligible, step=rule, block=block, forced=forced, rule=config.commit)


def grow(batch: Batch, rows: list[Row], slots, eligible, logits, token, confidence, chosen, pages: Pages) -> Tensor:
    """Which places (R, M) are committed of rows that change their length; how they change goes into `pages`."""
    config = rows[0].config
    if config.grow == "expand":
        chosen, grown = expansions(batch, rows, slots, token, chosen)
    else:
        sure = confidence
        if config.ordering != "probability":
            sure = prediction(logits, config).gather(-1, token[..., None])[..., 0].exp()
        chosen, grown = insertions(batch, rows, slots, eligible, chosen, sure)
    pages.grown.update(grown)
    return chosen


def note_likely(batch: Batch, rows: list[Row], request: Request, logits: Tensor, pages: Pages) -> None:
    """Writes the most probable tokens at the places asked about into `pages`."""
    log_p = prediction(logits, rows[0].config)
    most = log_p.topk(min(batch.likely, log_p.shape[-1]), dim=-1)
    probabilities, ids = most.values.exp().tolist(), most.indices.tolist()
    for i, (row, slots) in enumerate(zip(rows, request.slots.tolist(), strict=True)):
        for j, slot in enumerate(slots[: request.counts[i]]):
            likeliest = zip(ids[i][j], probabilities[i][j], strict=True)
            pages.likely[row.index, slot] = [(token, round(p, 5)) for token, p in likeliest]


def prediction(logits: Tensor, config: SamplingConfig) -> Tensor:
    """log p (R, M, V) of the model's whole prediction, guided where it is."""
    return guided(*branches(logits, config), config).log_softmax(dim=-1)
