"""What the engine counts: requests by outcome, passes, tokens, and histograms of batch sizes and times."""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from dlm.serving.requests import Cancelled, Expired, Handle, Result

__all__ = ["Histogram", "Stats"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """How many values were at most each bound, and their sum, as Prometheus counts."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


class Stats:
    """Counters of one engine; its thread writes them, others read.

    outcomes: requests that ended, by how (`stop`, `length`, `cancelled`, `timeout`, `invalid`, `error`); refused: for a
    full queue. passes, tokens: of all rows together; busy: seconds of passes, model: of those in the loop of
    `sampling`, joining: seconds in which rows joined.
    """

    def __init__(self):
        self.outcomes: Counter[str] = Counter()
        self.refused = self.passes = self.row_passes = self.tokens = self.prompt_tokens = 0
        self.busy = self.model = self.joining = 0.0
        self.rows, self.pass_seconds = Histogram(ROWS), Histogram(SECONDS)
        self.waited, self.seconds, self.first_text = Histogram(SECONDS), Histogram(SECONDS), Histogram(SECONDS)

    @contextlib.contextmanager
    def model_time(self, batch) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.model += time.monotonic() - began

    def passed(self, rows: int, tokens: int, seconds: float) -> None:
        """Takes note of a pass."""
        self.passes += 1
        self.row_passes += rows
        self.tokens += tokens
        self.busy += seconds
        self.rows.add(rows)
        self.pass_seconds.add(seconds)

    def finished(self, handle: Handle, result: Result | None, error: Exception | None) -> None:
        """Takes note of how a request ended."""
        if result is None:
            kinds = {Cancelled: "cancelled", Expired: "timeout", ValueError: "invalid"}
            self.outcomes[kinds.get(type(error), "error")] += 1
            return
        self.outcomes[result.finish_reason] += 1
        self.prompt_tokens += result.given
        self.waited.add(result.waited)
        self.seconds.add(result.seconds)
        self.first_text.add(result.first_text)
