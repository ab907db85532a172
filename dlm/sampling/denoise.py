"""The one denoising loop: plan which slots to compute, run the model, propose tokens, commit some, revise, repeat.

Shapes: B rows, T slots of the canvas, R rows of one forward pass, M slots asked about.

Every decoding method is a row of `methods.METHODS`, every commit rule an entry of `commit.COMMITS`, every revision of
`revise.REVISIONS`; nothing here knows their names. Rows keep their own pace (`rows`): at each turn the rows that plan
alike share one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dlm.kernels.by_rows import RowSizes
from dlm.models.attention import Visible, block_causal_from
from dlm.sampling.canvas import Canvas
from dlm.sampling.commit import Step, by_blocks, choose, coarse_block
from dlm.sampling.config import SamplingConfig
from dlm.sampling.constraints import Constraint, allowed_tokens, best_words, change_in_order, commit_in_order
from dlm.sampling.growth import expansions, insertions, resize, tail_slots, take_tail
from dlm.sampling.planning import Plan, alike, plan_pass, request_of, shifted
from dlm.sampling.propose import drawn_order
from dlm.sampling.remask import draw_steps
from dlm.sampling.revise import REVISIONS, Slate
from dlm.sampling.rows import Batch, Row
from dlm.sampling.settle import advance, end_faulty, is_any, refuse_nan, stop_ended
from dlm.sampling.stability import stable_places
from dlm.sampling.step import Check, Request, branches, compute, compute_shadows, decide_all, guided, held_probability
from dlm.sampling.telemetry import Telemetry
from dlm.sampling.verify import is_known, logits_known, note, verify

__all__ = ["DenoiseState", "denoise", "turn"]


@dataclass(frozen=True)
class DenoiseState:
    """The canvas after one turn of the loop (a forward pass for every row that is not done).

    committed (B, T) bool: written at this turn; confidence (B, T): theirs, 0 elsewhere. revised (B, T) bool: places
    that held a token and were changed, or masked again. block, nfe and positions_computed (B,) int64: each row's block,
    its forward passes so far, and the slots they computed. step: turns so far, from 1. likely: where it was asked for,
    the most probable tokens and their probabilities at each (row, slot) that a pass proposed for.
    """

    canvas: Canvas
    committed: Tensor
    confidence: Tensor
    revised: Tensor
    block: Tensor
    step: int
    nfe: Tensor
    positions_computed: Tensor
    likely: dict[tuple[int, int], list[tuple[int, float]]] | None = None


def denoise(
    predictor,
    canvas: Canvas,
    config: SamplingConfig | None = None,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
    constraints: Sequence[Sequence[Constraint]] | None = None,
    likely: int = 0,
    telemetry: Telemetry | None = None,
    growth_tokens: tuple[int | None, int | None] = (None, None),
) -> Iterator[DenoiseState]:
    """Fills the masked places of `canvas` and yields a state after every turn.

    `predictor` is a mask predictor (`models.predictor`) or a model, which is called as it is (`dlm.denoise` packs it
    first). vocab_size: ids from there on are never proposed (embeddings beyond the tokenizer). eos_token_ids: what
    ends a text, unless the config says. constraints: each row's. likely: how many of the most probable tokens each
    state names. growth_tokens: the checkpoint's expand and delete token. telemetry: watches the passes. Raises
    ValueError for settings that do not fit the model or the canvas, FloatingPointError for NaN logits.
    """
    batch = Batch(predictor, vocab_size=vocab_size, eos_token_ids=eos_token_ids, growth_tokens=growth_tokens)
    batch.join(canvas, config or SamplingConfig(), constraints)
    batch.likely, batch.telemetry = likely, telemetry
    try:
        while batch.active:
            yield turn(batch)
        refuse_nan(batch, before=batch.turns + 1)
    finally:
        batch.close()


@torch.inference_mode()
def turn(batch: Batch) -> DenoiseState:
    """One pass for every row of the batch that is not done."""
    batch.turns += 1
    batch.make_room()
    active, before = batch.active, batch.canvas
    blocks = torch.tensor([0 if row is None else row.block for row in batch.rows])
    pages = Pages.of(before)
    rows = active
    while rows:
        step = pages if rows is active else Pages.of(batch.canvas, pages.likely)
        take_step(batch, rows, step, known=rows is not active)
        if step is not pages:
            pages.add(step)
        rows = [row for row in active if row.config.draft and is_known(batch, row)]
    nfe, computed = (
        torch.tensor([0 if row is None else getattr(row, name) for row in batch.rows]) for name in ("nfe", "computed")
    )
    likely = pages.likely if batch.likely else None
    written = pages.committed, pages.confidence, pages.revised
    if batch.extra is not None:
        written = [x.masked_fill(batch.extra, 0)[:, : batch.width] for x in written]
        likely = likely and {at: found for at, found in likely.items() if at[1] < batch.width and not batch.extra[at]}
    return DenoiseState(batch.shown, *written, blocks, batch.turns, nfe, computed, likely)


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


def take_step(batch: Batch, rows: list[Row], pages: Pages, known: bool) -> None:
    """One step of plain decoding for these rows: a pass, or where its logits are `known` no pass; then each goes on."""
    for some in alike(rows, together=getattr(batch.predictor, "exact_rows", False)):
        run_pass(batch, some, pages, known)
    batch.canvas = replace(batch.canvas, tokens=pages.tokens)
    for index, changes in pages.grown.items():
        resize(batch, batch.rows[index], changes, pages)
    refuse_nan(batch, before=batch.turns + 1 - batch.lag)
    advance(batch, rows, pages)
    stop_ended(batch, [row for row in rows if row.config.stop_at_eos and row.fault is None])


def run_pass(batch: Batch, rows: list[Row], pages: Pages, known: bool = False) -> None:
    """One forward pass for `rows`, which are alike; what they commit and revise goes into `pages`. known: their logits
    were computed by an earlier pass, and there is none."""
    plan = plan_pass(batch, rows)
    request, eligible = request_of(batch, rows, plan)
    canvas = batch.canvas if request.rows is None else batch.canvas.rows(plan.index)
    if rows[0].config.grow != "none" and plan.positions is None:
        canvas, request = without_hidden(canvas, request, cached=rows[0].method.cached)
    tail = tail_slots(batch, rows, request.positions) if rows[0].config.grow == "confidence" else None
    asked = request.slots.shape[1]
    if tail is not None:
        request = replace(request, slots=torch.cat([request.slots, tail[0]], dim=1))
    cache = batch.cache if rows[0].method.cached else None
    shadow, visible, logits = None, visible_to(rows), logits_known(batch, rows, request) if known else None
    if rows[0].config.draft and not known:
        logits = verify(batch, rows, plan, request, visible_to)
    if logits is not None:
        pass
    elif rows[0].config.shadowed:
        logits, shadow = compute_shadows(batch.predictor, canvas, request, visible, cache)
    else:
        guided, shift = rows[0].branches == 2, shifted(batch)
        logits = compute(
            batch.predictor, canvas, request, guided=guided, visible=visible, cache=cache, shifted=shift,
            sizes=sizes_of(batch, rows, plan, request, canvas),
        )  # fmt: skip
    if tail is not None:
        log_p, request = prediction(logits[:, asked:], rows[0].config), replace(request, slots=request.slots[:, :asked])
        take_tail(rows, batch.canvas.tokens[plan.index[:, None], tail[0]], log_p, tail[1], batch.canvas.mask_id)
        logits, shadow = logits[:, :asked], None if shadow is None else shadow[:, :asked]
    for row, count in zip(rows, plan.counts, strict=True) if not known else ():
        row.stale = False
        row.nfe += 1 + (shadow is not None and cache is not None)
        row.computed += row.branches * count
    if rows[0].config.draft and not known:
        note(batch, rows, request, logits)
    bad = faults_of(batch, rows, request, logits)
    kinds: dict[tuple[SamplingConfig, bool], list[int]] = {}  # a row beside a constrained one is as it is alone
    for place, row in enumerate(rows):
        if place not in bad:
            kinds.setdefault((row.config, row.written is None), []).append(place)
    if len(kinds) == 1 and not bad:
        commit(batch, rows, plan, request, eligible, logits, shadow, pages)
        return
    for places in kinds.values():
        few = torch.tensor(places, device=logits.device)
        part = [rows[place] for place in places]
        picked = torch.cat([few + len(rows) * branch for branch in range(part[0].branches)])
        few_shadows = None if shadow is None else shadow[few]
        asked = request.of(few, plan.index)
        commit(batch, part, plan.of(few), asked, eligible[few], logits[picked], few_shadows, pages)


def sizes_of(batch: Batch, rows: list[Row], plan: Plan, request: Request, canvas: Canvas) -> RowSizes | None:
    """What each row would compute alone, where the predictor then gives it the same bits in every batch and the pass
    pads some; `canvas` as the pass sees it."""
    if not getattr(batch.predictor, "exact_rows", False) or any(row.config.moves or row.gapped for row in rows):
        return None  # a row's slots are taken to be its first ones
    cached = rows[0].method.cached
    keys = tuple(row.slots if cached else row.length for row in rows)
    sizes = RowSizes(tuple(plan.counts), keys, tuple(request.counts))
    width = batch.cache.length if cached else canvas.tokens.shape[1]
    queries = (width if request.positions is None else request.positions.shape[1]), width, request.slots.shape[1]
    alike = all({*own} == {whole} for own, whole in zip((sizes.queries, keys, sizes.asked), queries, strict=True))
    copied = cached and request.rows is not None  # else keys and values of these rows would be
    return None if alike and request.valid is None and not copied else sizes


def faults_of(batch: Batch, rows: list[Row], request: Request, logits: Tensor) -> list[int]:
    """In a lenient batch on a CPU the places of the rows whose logits (R or 2R, M, V) are no numbers: they end. On a
    GPU `refuse_nan` ends them, a pass later, and nobody waits."""
    if not batch.lenient or logits.device.type != "cpu":
        return []
    largest = logits.amax(dim=-1).unflatten(0, (-1, len(rows))).amax(dim=0)
    check = Check(largest, request)
    if bad := check.bad_rows if bool(check.any) else []:
        end_faulty(rows, bad, check)
    return bad


def visible_to(rows: list[Row]) -> Visible:
    """The rule of a pass of these rows, whose blocks may begin before slot 0."""
    if not any(row.offset for row in rows):
        return rows[0].visible
    return block_causal_from(rows[0].block_length, tuple(row.offset for row in rows) * rows[0].branches)


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
    config, where = rows[0].config, (plan.index[:, None], request.slots)
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
    quota = torch.stack([row.share for row in rows])
    held = pages.tokens[where]
    revisable = request.eligible & (held != batch.canvas.mask_id)
    drawn = None
    if config.commit == "ancestral" or config.revise == "remask":
        drawn = draw_steps(rows, eligible, revisable, batch.certain[where])
    take = None if drawn is None else drawn.take
    choosing = commit_rule(batch, rows, request.slots, eligible, where, logits, quota, take)
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
        pages.revised[where] = revised
    new = chosen if revision is None else chosen | revised
    pages.tokens[where] = torch.where(new, token, held)
    if revision is not None:
        batch.certain[where] = torch.where(chosen, confidence.float(), batch.certain[where])
    pages.committed[where] = chosen
    pages.confidence[where] = confidence.float().masked_fill(~chosen, 0.0)  # torch.where copies its 0.0 to a GPU


def suppressed_of(batch: Batch, row: Row) -> tuple[int, ...]:
    """The ids that no place of the row may take beside the mask: end-of-text where it is asked for, and the tokens of
    growth where nothing grows."""
    suppressed = row.eos if row.config.suppress_eos else ()
    if row.config.grow == "expand":
        return () if batch.growth_tokens[1] is None else suppressed  # end-of-text takes a place out
    return suppressed + tuple(token for token in batch.growth_tokens if token is not None)


def commit_rule(
    batch: Batch, rows: list[Row], slots: Tensor, eligible: Tensor, where, logits: Tensor, quota: Tensor, take
) -> Callable[[Tensor], Tensor]:
    """The commit rule of a pass: confidence (R, M) -> which places are committed."""
    config, stable = rows[0].config, None
    if config.commit == "stable":
        stable = stable_places(rows, slots, eligible, prediction(logits, config), config)
    apart = config.spacing, config.spacing_threshold, slots
    rule = Step(quota, config.threshold, config.factor, config.entropy_bound, take, stable, *apart)
    if not rows[0].method.several:
        return partial(choose, config.commit, eligible=eligible, step=rule)
    block = batch.layout[where]
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


def without_hidden(canvas: Canvas, request: Request, *, cached: bool) -> tuple[Canvas, Request]:
    """The canvas and the request of a pass over rows that grow, up to the last slot that any of them shows."""
    extent = int(canvas.valid.any(dim=0).nonzero().max()) + 1
    if cached:
        positions = torch.arange(extent, device=canvas.tokens.device).repeat(len(canvas.tokens), 1)
        return canvas, replace(request, positions=positions)
    part = {name: getattr(canvas, name)[:, :extent] for name in ("tokens", "editable", "valid")}
    valid = None if request.valid is None else request.valid[:, :extent]
    return replace(canvas, **part), replace(request, valid=valid)


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
