"""The one denoising loop: plan which slots to compute, run the model, propose tokens, commit some, revise, repeat.

Shapes: B rows, T slots of the canvas, R rows of one forward pass, M slots asked about.

Every decoding method is a row of `methods.METHODS`, every commit rule an entry of `commit.COMMITS`, every revision of
`revise.REVISIONS`; nothing here knows their names. Rows keep their own pace (`rows`): at each turn the rows that plan
alike share one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dlm.kernels.by_rows import RowSizes
from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SamplingConfig, as_config
from dlm.sampling.constraints import Constraint
from dlm.sampling.growth import resize, tail_slots, take_tail
from dlm.sampling.outcome import Pages, commit, prediction
from dlm.sampling.planning import Plan, alike, plan_pass, request_of, shifted, visible_to
from dlm.sampling.rows import Batch, Row
from dlm.sampling.settle import advance, end_faulty, refuse_nan, stop_ended
from dlm.sampling.step import Check, Request, compute, compute_shadows
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
    batch.join(canvas, as_config(config), constraints)
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
    blocks = [0 if row is None else row.block for row in batch.rows]
    pages = Pages.of(before)
    rows = active
    while rows:
        step = pages if rows is active else Pages.of(batch.canvas, pages.likely)
        take_step(batch, rows, step, known=rows is not active)
        if step is not pages:
            pages.add(step)
        rows = [row for row in active if row.config.draft and is_known(batch, row)]
    spent = ([0 if row is None else getattr(row, name) for row in batch.rows] for name in ("nfe", "computed"))
    blocks, nfe, computed = torch.tensor([blocks, *spent])
    likely = pages.likely if batch.likely else None
    written = pages.committed, pages.confidence, pages.revised
    if batch.extra is not None:
        written = [x.masked_fill(batch.extra, 0)[:, : batch.width] for x in written]
        likely = likely and {at: found for at, found in likely.items() if at[1] < batch.width and not batch.extra[at]}
    return DenoiseState(batch.shown, *written, blocks, batch.turns, nfe, computed, likely)


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


def without_hidden(canvas: Canvas, request: Request, *, cached: bool) -> tuple[Canvas, Request]:
    """The canvas and the request of a pass over rows that grow, up to the last slot that any of them shows."""
    extent = int(canvas.valid.any(dim=0).nonzero().max()) + 1
    if cached:
        positions = torch.arange(extent, device=canvas.tokens.device).repeat(len(canvas.tokens), 1)
        return canvas, replace(request, positions=positions)
    part = {name: getattr(canvas, name)[:, :extent] for name in ("tokens", "editable", "valid")}
    valid = None if request.valid is None else request.valid[:, :extent]
    return replace(canvas, **part), replace(request, valid=valid)
