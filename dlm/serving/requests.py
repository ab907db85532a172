"""What is asked of the engine and what comes back: a request, its events pass by pass, its result, its errors.

Shapes: T slots of the request's canvas.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dlm.sampling.config import SamplingConfig, as_config

__all__ = [
    "Cancelled",
    "CanvasView",
    "Closing",
    "Event",
    "Expired",
    "Handle",
    "PassFailed",
    "QueueFull",
    "Request",
    "Result",
    "RowFailed",
    "ServingError",
]


class ServingError(RuntimeError):
    """A request that the engine could not finish, whatever was asked."""


class QueueFull(ServingError):
    """As many requests wait as may."""


class Closing(ServingError):
    """The engine takes no more requests, or was stopped before this one was done."""


class Expired(ServingError):
    """The request's time was over before it was done."""


class Cancelled(ServingError):
    """The client no longer wants the result."""


class RowFailed(ServingError):
    """The model's numbers for this row, and for no other, were none."""


class PassFailed(RowFailed):
    """A pass failed, and with it all its rows: out of memory, perhaps."""


@dataclass(frozen=True)
class Request:
    """One text to write.

    ids (T,): the canvas, the mask id where to write. config: the settings, with one seed; its gen_length is not read.
    stop: texts; what is written ends before the first of them. stream: an event for every pass; canvas: the events
    hold the whole canvas. likely: how many of the most probable tokens the result names at each place, None for no
    probabilities. trim: a space that begins the text is left out (the prompt ends with it). timeout: seconds from
    `submit` on, None for the engine's own.
    """

    ids: Sequence[int]
    config: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    stream: bool = False
    canvas: bool = False
    likely: int | None = None
    trim: bool = False
    timeout: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "config", as_config(self.config))  # raises TypeError for a dict
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise TypeError(f"stop is {self.stop!r}: give a tuple of texts, none of them empty")


@dataclass(frozen=True)
class CanvasView:
    """The region of a row after a pass, slot by slot: the text of each (None for a mask, "" for a special token), its
    confidence when it was committed (None for a mask), and the slots that this pass committed or changed."""

    pieces: tuple[str | None, ...]
    confidence: tuple[float | None, ...]
    committed: tuple[int, ...]


@dataclass(frozen=True)
class Event:
    """A pass of a row. number: passes so far, from 1; text: what became final at this pass; canvas: where asked for."""

    number: int
    text: str
    canvas: CanvasView | None = None


@dataclass(frozen=True)
class Place:
    """A place of the text in a result: its id, its text, the probability that it was committed with, and the most
    probable tokens there as (text, probability)."""

    token: int
    text: str
    probability: float
    likely: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """A text that is done. ids: of the region in order, up to its end; finish_reason: `stop` or `length`; nfe: forward
    passes; written: tokens committed in all; given: tokens that stood on the canvas; computed: slots that the passes
    computed; waited, seconds: in the queue, and in all; places: where `likely` was asked for."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    nfe: int
    written: int
    given: int
    computed: int
    waited: float
    seconds: float
    first_text: float | None = None
    places: tuple[Place, ...] = ()

    @property
    def tokens_per_forward(self) -> float:
        return self.written / max(self.nfe, 1)


class Handle:
    """A request on its way. Iterate it for events (`async for` on an event loop), or wait for the `result`."""

    def __init__(self, request: Request):
        self.request, self.began = request, time.monotonic()
        self.deadline = None if request.timeout is None else self.began + request.timeout
        self.cancelled = False
        self._events: deque[Event] = deque()
        self._result: Result | None = None
        self._error: Exception | None = None
        self._finished = False
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    @property
    def finished(self) -> bool:
        return self._finished

    def cancel(self) -> None:
        """The row leaves at the next pass; has no effect on a request that is done."""
        self.cancelled = True

    # ------------------------------------------------------------ the engine's side

    def unwanted(self, now: float) -> ServingError | None:
        """Why nobody waits for the result at this time; None while somebody does."""
        if self.cancelled:
            return Cancelled("the client is gone")
        if self.deadline is not None and now > self.deadline:
            return Expired(f"not done within {self.request.timeout:g} s")
        return None

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._tell()

    def finish(self, result: Result | None = None, error: Exception | None = None) -> None:
        with self._changed:
            if not self._finished:
                self._result, self._error, self._finished = result, error, True
                self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            with contextlib.suppress(RuntimeError):  # its event loop is closed: nobody listens there any more
                listener()

    # ------------------------------------------------------------ the caller's side

    def result(self, timeout: float | None = None) -> Result:
        """The result. Raises what the request ended with, TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._finished, timeout):
                raise TimeoutError(f"no result within {timeout} s")
        return self._outcome()

    def _outcome(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._result

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._finished)
                events = list(self._events)
                self._events.clear()
                over = self._finished
            yield from events
            if over:
                self._outcome()
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for events in self._batches():
            for event in events:
                yield event
        self._outcome()

    async def wait(self) -> Result:
        """`result`, on an event loop."""
        async for _ in self._batches():
            pass
        return self._outcome()

    async def _batches(self) -> AsyncIterator[list[Event]]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            loop.call_soon_threadsafe(news.set)

        with self._changed:
            self._listeners.append(listener)
        try:
            while True:
                news.clear()
                with self._changed:
                    events = list(self._events)
                    self._events.clear()
                    over = self._finished
                if events:
                    yield events
                elif over:
                    return
                else:
                    await news.wait()
        finally:
            with self._changed:
                self._listeners.remove(listener)
