"""The one denoising loop: plan which slots to compute, run the model, propose tokens, commit some, repeat.

Shapes: B rows, T slots of the canvas, R rows of one forward pass, Q slots computed by it, M masked slots asked about.

Every decoding method is a row of `cache.METHODS`, every commit rule an entry of `unmasking.COMMITS`; nothing here
knows their names. Rows keep their own pace: at each turn the rows that plan alike share one forward pass.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dlm.models.attention import full
from dlm.models.kv_cache import KVCache
from dlm.sampling.canvas import Canvas
from dlm.sampling.commit import COMMITS, Step, coarse_block
from dlm.sampling.config import SamplingConfig
from dlm.sampling.methods import METHODS, Planner, Signals, visibility
from dlm.sampling.schedule import schedule
from dlm.sampling.step import Check, Request, run_step

__all__ = ["DenoiseState", "denoise"]


@dataclass(frozen=True)
class DenoiseState:
    """The canvas after one turn of the loop (a forward pass for every row that is not done).

    committed (B, T) bool: written at this turn; confidence (B, T): theirs, 0 elsewhere. block, nfe and
    positions_computed (B,) int64: each row's block, its forward passes so far, and the slots they computed.
    step: turns so far, from 1.
    """

    canvas: Canvas
    committed: Tensor
    confidence: Tensor
    block: Tensor
    step: int
    nfe: Tensor
    positions_computed: Tensor


# ---------------------------------------------------------------- the loop


@torch.inference_mode()
def denoise(
    predictor,
    canvas: Canvas,
    config: SamplingConfig | None = None,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
) -> Iterator[DenoiseState]:
    """Fills the masked places of `canvas` and yields a state after every turn.

    `predictor` is any callable with the signature of `Packed.__call__`; a model is called as it is (`dlm.denoise` packs
    it first). vocab_size: ids from there on are never proposed (embeddings beyond the tokenizer). eos_token_ids: what
    ends a text, unless the config says. Raises ValueError for settings that do not fit the model or the canvas,
    FloatingPointError for NaN logits.
    """
    yield from _Run(predictor, canvas, config or SamplingConfig(), vocab_size, eos_token_ids).turns()


class _Run:
    """The state of one call of `denoise`. What a schedule fixes beforehand is kept on the host, so that a turn
    waits for the device only where a rule must know what was committed."""

    def __init__(self, model, canvas: Canvas, config: SamplingConfig, vocab_size: int | None, eos: Sequence[int]):
        self.model, self.canvas, self.config, self.vocab_size = model, canvas, config, vocab_size
        self.method, self.device = METHODS[config.method], canvas.tokens.device
        self.eos = config.eos_ids or tuple(eos)
        if (config.stop_at_eos or config.suppress_eos or config.delay_eos) and not self.eos:
            raise ValueError(
                "stop_at_eos, suppress_eos and delay_eos need an end-of-text id, and the checkpoint names none: "
                "give eos_token_id"
            )
        self.block_length, self.visible = visibility(model, config.method, config.block_length)
        rows, slots = canvas.tokens.shape
        limit = getattr(getattr(model, "config", None), "max_sequence_length", None)
        if limit is not None and slots > limit:
            raise ValueError(
                f"prompt and region are {slots} tokens together, above the model's max_sequence_length {limit}: "
                "shorten the prompt or gen_length"
            )
        self.branches = 2 if config.cfg_scale else 1
        self.cache: KVCache | None = None
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in config.row_seeds(rows)]
        self.lengths = canvas.valid.sum(dim=1).tolist()
        self.layout, self.sizes = self._lay_out()
        steps = config.steps if config.commit == "quota" else None
        self.quotas = [schedule(steps, sizes, config.split) if sizes else [] for sizes in self.sizes]
        self.block = [0] * rows  # each row's block ...
        self.turn = [0] * rows  # ... the passes spent on it ...
        self.left = [sizes[0] if sizes else 0 for sizes in self.sizes]  # ... and the places still masked in it
        self.nfe, self.computed = [0] * rows, [0] * rows
        self._plans: dict[Planner, tuple] = {}
        # (B, S) each row's quota at every turn, since a row that is not done has a pass at each
        turns = [
            torch.tensor([quota for block in blocks for quota in block], dtype=torch.int64) for blocks in self.quotas
        ]
        self.quota_at = torch.nn.utils.rnn.pad_sequence(turns, batch_first=True).to(self.device)
        self._unchecked: deque[tuple[int, Check]] = deque()
        self.lag = int(self.device.type != "cpu")  # a GPU is asked about a turn while it works on the next one

    def _lay_out(self) -> tuple[Tensor, list[list[int]]]:
        """(B, T) the block of every slot, -1 outside of the region, and the masked places of every row's blocks.

        Left to right, a block is block_length masked places in order; for a block-causal model, the slots of one of
        its blocks, which count from slot 0; coarse to fine chooses blocks as it goes.
        """
        masked = self.canvas.masked
        if self.visible is full:
            layout = torch.where(masked, (masked.cumsum(dim=1) - 1) // self.block_length, -1)
        else:
            cell = torch.arange(masked.shape[1], device=self.device) // self.block_length
            busy = torch.zeros(masked.shape[0], int(cell[-1]) + 1, dtype=torch.int64, device=self.device)
            busy = busy.index_add(1, cell, masked.long()) > 0
            layout = torch.where(busy, busy.cumsum(dim=1) - 1, -1)[:, cell].masked_fill(~self.canvas.valid, -1)
        sizes = [torch.bincount(row[here]).tolist() for row, here in zip(layout, masked, strict=True)]
        return torch.full_like(layout, -1) if self.method.coarse else layout, sizes

    def turns(self) -> Iterator[DenoiseState]:
        """Denoises to the end, with a cache where the method has one: the model's own, where it lends one."""
        if not self.method.cached:
            yield from self._turns()
            return
        rows, slots = self.canvas.tokens.shape
        self.cache = getattr(self.model, "borrow", KVCache)(rows * self.branches, slots)
        try:
            yield from self._turns()
        finally:
            getattr(self.model, "give_back", lambda cache: None)(self.cache)

    def _turns(self) -> Iterator[DenoiseState]:
        step = 0
        while active := [row for row, sizes in enumerate(self.sizes) if self.block[row] < len(sizes)]:
            step += 1
            tokens = self.canvas.tokens.clone()
            committed = torch.zeros_like(self.canvas.valid)
            confidence = torch.zeros(tokens.shape, device=self.device)
            block = torch.tensor(self.block)
            first = [row for row in active if self.turn[row] == 0]
            later = [row for row in active if self.turn[row] > 0]
            if self.method.first is self.method.later:
                first, later = active, []
            for planner, rows in ((self.method.first, first), (self.method.later, later)):
                if not rows:
                    continue
                where, chosen, token, certain = self._pass(planner, rows, step)
                tokens[where] = torch.where(chosen, token, tokens[where])
                committed[where] = chosen
                # not torch.where: it copies a number to a GPU, and waits
                confidence[where] = certain.float().masked_fill(~chosen, 0.0)
            self.canvas = replace(self.canvas, tokens=tokens)
            self._refuse_nan(before=step + 1 - self.lag)
            self._advance(active, committed)
            nfe, computed = torch.tensor(self.nfe), torch.tensor(self.computed)
            yield DenoiseState(self.canvas, committed, confidence, block, step, nfe, computed)
        self._refuse_nan(before=step + 1)

    def _refuse_nan(self, before: int) -> None:
        """FloatingPointError if the logits of a turn before that one were not numbers."""
        while self._unchecked and self._unchecked[0][0] < before:
            step, check = self._unchecked.popleft()
            try:
                check.refuse()
            except FloatingPointError as error:
                raise FloatingPointError(f"pass {step}: {error}") from None

    def _pass(self, planner: Planner, rows: list[int], step: int) -> tuple[tuple, Tensor, Tensor, Tensor]:
        """One forward pass for `rows`: the places asked about as an index (R, M) into (B, T), and at each whether it
        is committed, its token and its confidence."""
        whole = len(rows) == len(self.sizes)
        index, current, span, positions = self._plan_for(planner, rows)
        canvas = self.canvas if whole else self.canvas.rows(index)
        choosing = self.method.coarse and self.turn[rows[0]] == 0
        if choosing:
            asked, counts = canvas.masked, [sum(self.sizes[row][self.block[row] :]) for row in rows]
            most = max(sum(self.sizes[row]) for row in rows)
        else:
            asked, counts = canvas.masked & span, [self.left[row] for row in rows]
            most = max(self.sizes[row][self.block[row]] for row in rows)
        ragged = any(self.lengths[row] < canvas.tokens.shape[1] for row in rows)
        slots = _leading(asked, most if getattr(self.model, "fixed_shapes", False) else max(counts))
        eligible, valid = asked.gather(1, slots), canvas.valid if ragged else None
        request = Request(None if whole else index, positions, slots, counts, eligible, valid)
        token, confidence, largest = run_step(
            self.model,
            canvas,
            request,
            self.config,
            visible=self.visible,
            cache=self.cache,
            vocab_size=self.vocab_size,
            suppressed=self.eos if self.config.suppress_eos else (),
            generators=[self.generators[row] for row in rows],
        )
        self._unchecked.append((step, Check(largest, request)))
        certain = confidence
        if self.config.delay_eos:
            certain = confidence.masked_fill(_is_any(token, self.eos), -torch.inf)
        if choosing:
            size = torch.tensor([self.left[row] for row in rows], device=self.device)
            eligible = coarse_block(certain, eligible, _is_any(token, self.eos), size)
            self.layout[index] = self.layout[index].scatter_add(1, slots, eligible * (current + 1))
        config, at = self.config, min(step, self.quota_at.shape[1]) - 1
        quota = self.quota_at[:, at] if whole else self.quota_at[index, at]
        rule = Step(quota, config.threshold, config.factor, config.entropy_bound)
        chosen = COMMITS[config.commit](certain, eligible, rule)
        for row in rows:
            self.nfe[row] += 1
        return (index[:, None], slots), chosen, token, confidence

    def _plan_for(self, planner: Planner, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """For a pass of these rows (R,): their numbers, their blocks (R, 1), the blocks' slots bool (R, T), and the
        slots to compute (R, Q), ascending, short rows padded with their last; None for all."""
        key = (tuple(rows), tuple(self.block[row] for row in rows))
        found = self._plans.get(planner)
        if found is None or found[0] != key:  # the same for every later pass of the block
            index = torch.tensor(rows, device=self.device)
            current = torch.tensor(key[1], device=self.device)[:, None]
            layout = self.layout[index]
            span, before = layout == current, (layout == current - 1) & (current > 0)
            plan = planner(span, Signals(before, self.config.window))
            if plan is None:
                positions, counts = None, [self.lengths[row] for row in rows]
            else:
                plan = plan & self.canvas.valid[index]
                size = plan.sum(dim=1)
                counts = size.tolist()
                ascending = _leading(plan, max(counts))
                within = torch.arange(ascending.shape[1], device=self.device).minimum(size[:, None] - 1)
                positions = ascending.gather(1, within)
            found = self._plans[planner] = (key, (index, current, span, positions), counts)
        for row, count in zip(rows, found[2], strict=True):
            self.computed[row] += self.branches * count
        return found[1]

    def _quota(self, row: int) -> int:
        return self.quotas[row][self.block[row]][self.turn[row]] if self.config.commit == "quota" else 0

    def _advance(self, active: list[int], committed: Tensor) -> None:
        """Moves every row on to its next pass, its next block, or its end."""
        if self.config.commit == "quota":
            written = [self._quota(row) for row in active]
        else:
            counts = committed.sum(dim=1).tolist()
            written = [counts[row] for row in active]
        for row, count in zip(active, written, strict=True):
            assert 0 < count <= self.left[row], f"a pass committed {count} of row {row}'s {self.left[row]} places"
            self.left[row] -= count
            self.turn[row] += 1
            if self.left[row] == 0:
                self.block[row], self.turn[row] = self.block[row] + 1, 0
                if self.block[row] < len(self.sizes[row]):
                    self.left[row] = self.sizes[row][self.block[row]]
        if self.config.stop_at_eos:
            self._stop_ended()

    def _stop_ended(self) -> None:
        """Ends the rows whose end-of-text has nothing masked before it, and fills what they leave with it."""
        masked = self.canvas.masked
        slots = torch.arange(masked.shape[1], device=self.device)
        ending = self.canvas.editable & self.canvas.valid & _is_any(self.canvas.tokens, self.eos)
        first_end = torch.where(ending, slots, masked.shape[1]).amin(dim=1)
        first_mask = torch.where(masked, slots, masked.shape[1]).amin(dim=1)
        ended = first_end < first_mask
        tokens = self.canvas.tokens.masked_fill(masked & ended[:, None], self.eos[0])
        self.canvas = replace(self.canvas, tokens=tokens)
        for row in ended.nonzero()[:, 0].tolist():
            self.block[row] = len(self.sizes[row])


def _leading(here: Tensor, count: int) -> Tensor:
    """(R, count) the slots where `here` (R, T) holds, ascending, then others."""
    return here.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]


def _is_any(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for token in ids:
        found |= tokens == token
    return found
