"""A request that has a row in the batch: its text as it becomes final, its events, its result.

Shapes: B rows of the batch, T slots.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlm.sampling.rows import Row
from dlm.serving.requests import CanvasView, Event, Handle, Place, Result
from dlm.serving.text import FinalText, up_to_end

if TYPE_CHECKING:
    from dlm.sampling.denoise import DenoiseState
    from dlm.serving.engine import Engine

__all__ = ["Running"]


class Running:
    """The row of a request and what was said of it so far."""

    def __init__(self, engine: Engine, handle: Handle, row: Row, waited: float):
        self.engine, self.handle, self.row, self.waited = engine, handle, row, waited
        request = handle.request
        mask = engine.pretrained.mask_id
        self.region = [slot for slot, token in enumerate(request.ids) if token == mask]
        self.given = len(request.ids) - len(self.region)
        self.mask, self.ends = mask, engine.ends | set(request.config.eos_ids)
        self.text = FinalText(engine.decode, self.ends, request.stop, request.trim)
        self.follows = bool(request.stream or request.canvas or request.stop)
        self.noted = request.likely is not None
        self.sure: dict[int, float] = {}
        self.likely: dict[int, list[tuple[int, float]]] = {}
        self.written, self.ended, self.first_text = 0, False, None

    def follow(self, state: DenoiseState, tokens: Sequence[int], written: int) -> None:
        """Takes note of a pass; tokens (T,) of this row after it, of which it committed `written`."""
        self.written += written
        if self.row.config.moves:  # its region changes
            canvas, index = state.canvas, self.row.index
            self.region = (canvas.editable & canvas.valid)[index].nonzero()[:, 0].tolist()
        request, index = self.handle.request, self.row.index
        if self.noted or request.canvas:
            self._note(state, index)
        if not self.follows:
            return
        text = self.text.update(self._final(tokens), last=self.row.done)
        if text and self.first_text is None:
            self.first_text = time.monotonic() - self.handle.began
        self.ended = self.ended or (self.text.ended and bool(request.stop) and self._stopped())
        if request.stream or request.canvas:
            canvas = self._view(state, tokens, index) if request.canvas else None
            self.handle.put(Event(self.row.nfe, text, canvas))

    def _stopped(self) -> bool:
        """Whether a stop text, not the model's own end of text, ended the text."""
        return not self.row.done

    def _note(self, state: DenoiseState, index: int) -> None:
        new = state.committed[index].nonzero()[:, 0].tolist()
        for slot, sure in zip(new, state.confidence[index][new].tolist(), strict=True):
            self.sure[slot] = sure
            if state.likely:
                self.likely[slot] = state.likely.get((index, slot), [])

    def _final(self, tokens: Sequence[int]) -> list[int]:
        """The ids of the region up to the first place that may still change."""
        row, region = self.row, [tokens[slot] for slot in self.region if slot < len(tokens)]
        if row.revision is not None and not row.done:  # a token of a block that is not done may change
            settled = sum(row.sizes[: row.block])
            region = region[:settled] if not row.method.coarse else []
        return region[: region.index(self.mask)] if self.mask in region else region

    def _view(self, state: DenoiseState, tokens: Sequence[int], index: int) -> CanvasView:
        changed = (state.committed[index] | state.revised[index]).tolist()
        region = [slot for slot in self.region if slot < len(tokens)]
        masked = [tokens[slot] == self.mask for slot in region]
        pieces = [
            None if hidden else self.engine.piece(tokens[slot]) for slot, hidden in zip(region, masked, strict=True)
        ]
        if self.handle.request.trim and pieces and pieces[0] is not None:
            pieces[0] = pieces[0].removeprefix(" ")
        sure = [
            None if hidden else round(self.sure.get(slot, 1.0), 4) for slot, hidden in zip(region, masked, strict=True)
        ]
        return CanvasView(tuple(pieces), tuple(sure), tuple(i for i, slot in enumerate(region) if changed[slot]))

    def result(self, state: DenoiseState, tokens: Sequence[int]) -> Result:
        """The text, once the row is done or a stop text ended it."""
        region = [tokens[slot] for slot in self.region]
        if not self.follows:
            self.text.update([token for token in region if token != self.mask] if self.row.done else [], last=True)
        ids, ended = up_to_end(self._final(tokens), self.ends)
        if self.handle.request.stop and self.text.ended:
            ended = True
        now = time.monotonic()
        return Result(
            text=self.text.sent,
            ids=tuple(ids),
            finish_reason="stop" if ended else "length",
            nfe=self.row.nfe,
            written=self.written,
            given=self.given,
            computed=self.row.computed,
            waited=self.waited,
            seconds=now - self.handle.began,
            first_text=self.first_text if self.first_text is not None else now - self.handle.began,
            places=self._places(self._told(ids)) if self.noted else (),
        )

    def _told(self, ids: list[int]) -> list[int]:
        """The ids whose texts make the result's text; behind a stop text more of them may be final."""
        if not self.handle.request.stop or self.text.whole is None:
            return ids
        least, most = 0, len(ids)
        while least < most:  # the fewest ids whose text holds what was sent
            middle = (least + most) // 2
            if len(self.engine.decode(ids[:middle])) < self.text.whole:
                least = middle + 1
            else:
                most = middle
        return ids[:least]

    def _places(self, ids: Sequence[int]) -> tuple[Place, ...]:
        places = []
        for slot, token in zip(self.region, ids, strict=False):
            likely = tuple((self.engine.name_of(other), p) for other, p in self.likely.get(slot, ()))
            wanted = self.handle.request.likely or 0
            places.append(Place(token, self.engine.name_of(token), self.sure.get(slot, 1.0), likely[:wanted]))
        return tuple(places)
