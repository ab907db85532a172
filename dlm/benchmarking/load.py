"""A load for the engine: requests with drawn lengths that arrive as a Poisson process, and what they waited for.

Times are in seconds. What comes out of one load is a row: a dict of numbers, as it stands in the JSON. A `clock` counts
what throughput is of: time, or the process's own, which other work on the machine does not change.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.sampling.config import SamplingConfig
from dlm.serving.requests import Handle, QueueFull, Request, ServingError

if TYPE_CHECKING:
    from dlm.serving.engine import Engine

__all__ = ["Lengths", "Need", "alone", "at_once", "demands", "in_turn", "percentiles", "poisson", "table", "together"]

PERCENTILES = (50, 90, 99)
Clock = Callable[[], float]


@dataclass(frozen=True)
class Lengths:
    """A number of tokens from `least` to `most`, each equally often."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """`32` or `8:64`. Raises ValueError for anything else."""
        numbers = text.split(":")
        if not 1 <= len(numbers) <= 2 or not all(number.isdecimal() and int(number) for number in numbers):
            raise ValueError(f"{option} is {text!r}: give a number of tokens, or the least and the most, such as 8:64")
        least, most = int(numbers[0]), int(numbers[-1])
        if least > most:
            raise ValueError(f"{option} is {text!r}: the least is above the most")
        return cls(least, most)

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        return generator.integers(self.least, self.most, count, endpoint=True).tolist()

    @property
    def middle(self) -> Lengths:
        """The number in the middle, always."""
        half = (self.least + self.most) // 2
        return Lengths(half, half)


@dataclass(frozen=True)
class Need:
    """One request: the ids of its prompt, the tokens that it asks for, its seed."""

    prompt: tuple[int, ...]
    length: int
    seed: int

    def ids(self, mask_id: int) -> list[int]:
        """Its canvas (T,)."""
        return [*self.prompt, *[mask_id] * self.length]


def demands(count: int, prompts: Lengths, outputs: Lengths, vocabulary: int, seed: int) -> list[Need]:
    """Requests with random prompts of ids below `vocabulary`."""
    generator = np.random.default_rng(seed)
    sizes, lengths = prompts.draw(generator, count), outputs.draw(generator, count)
    ids = [tuple(generator.integers(0, vocabulary, size).tolist()) for size in sizes]
    return [Need(*need, seed + i) for i, need in enumerate(zip(ids, lengths, strict=True))]


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """When each request comes, in seconds from the start: independent gaps with the mean 1 / rate."""
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum().tolist()


def percentiles(values: Sequence[float], name: str) -> dict[str, float | None]:
    """{name_p50: ..., name_p90: ..., name_p99: ...}, interpolated; None where there is no value."""
    values_at = np.percentile(values, PERCENTILES).tolist() if len(values) else [None] * len(PERCENTILES)
    return {f"{name}_p{p}": value for p, value in zip(PERCENTILES, values_at, strict=True)}


# ---------------------------------------------------------------- a plain loop, without the engine


def alone(
    predictor, needs: Sequence[Need], config: SamplingConfig, known: dict[str, Any], mask_id: int, clock: Clock
) -> dict:
    """One request after the other in a plain loop over `denoise`."""
    times = []
    began = clock()
    for need in needs:
        start = time.perf_counter()
        run([need.ids(mask_id)], predictor, dataclasses.replace(config, seed=need.seed), known, mask_id)
        times.append(time.perf_counter() - start)
    seconds = clock() - began
    return row("plain loop, one at a time", needs, seconds, percentiles(times, "latency"))


def together(
    predictor, needs: Sequence[Need], config: SamplingConfig, known: dict[str, Any], mask_id: int, clock: Clock
) -> dict:
    """All requests as one batch of `denoise` from the first pass to the last: the machine's own limit for batches,
    where they are equally long."""
    seeds = tuple(need.seed for need in needs)
    began = clock()
    run([need.ids(mask_id) for need in needs], predictor, dataclasses.replace(config, seed=seeds), known, mask_id)
    return row(f"plain loop, a batch of {len(needs)}", needs, clock() - began, {})


def run(rows: Sequence[Sequence[int]], predictor, config: SamplingConfig, known: dict[str, Any], mask_id: int) -> None:
    from dlm.sampling.canvas import Canvas
    from dlm.sampling.denoise import denoise

    for _ in denoise(predictor, Canvas.from_templates(rows, mask_id), config, **known):
        pass


# ---------------------------------------------------------------- through the engine


def request_of(need: Need, config: SamplingConfig, mask_id: int) -> Request:
    return Request(need.ids(mask_id), dataclasses.replace(config, seed=need.seed), stream=True)


def at_once(engine: Engine, needs: Sequence[Need], config: SamplingConfig, count: int, name: str, clock: Clock) -> dict:
    """Always `count` requests under way: the next one comes when one is done."""
    places, handles = threading.Semaphore(count), []
    return measured(engine, needs, name, handles, lambda: _keep(engine, needs, config, places, handles), clock)


def _keep(engine, needs, config, places: threading.Semaphore, handles: list[Handle]) -> int:
    for need in needs:
        places.acquire()
        handle = engine.submit(request_of(need, config, engine.pretrained.mask_id))
        handles.append(handle)
        threading.Thread(target=_then, args=(handle, places.release), daemon=True).start()
    return 0


def _then(handle: Handle, do) -> None:
    try:
        handle.result()
    except (ServingError, ValueError):
        pass
    finally:
        do()


def in_turn(
    engine: Engine, needs: Sequence[Need], config: SamplingConfig, at: Sequence[float], name: str, clock: Clock
) -> dict:
    """Each request at its time, whether those before it are done or not; a full queue refuses some."""
    handles: list[Handle] = []

    def send() -> int:
        refused, began = 0, time.perf_counter()
        for need, when in zip(needs, at, strict=True):
            time.sleep(max(0.0, began + when - time.perf_counter()))
            try:
                handles.append(engine.submit(request_of(need, config, engine.pretrained.mask_id)))
            except QueueFull:
                refused += 1
        return refused

    return measured(engine, needs, name, handles, send, clock)


def measured(
    engine: Engine, needs: Sequence[Need], name: str, handles: list[Handle], send: Callable[[], int], clock: Clock
) -> dict:
    """The row of what `send` sends. Raises what a request ended with."""
    stats = engine.stats
    before = stats.passes, stats.row_passes, stats.busy, stats.joining, stats.model
    began, started = clock(), time.perf_counter()
    refused = send()
    results = [handle.result() for handle in handles]
    seconds, wall = clock() - began, time.perf_counter() - started
    time.sleep(0.05)  # the engine notes its last pass after the results of it
    after = stats.passes, stats.row_passes, stats.busy, stats.joining, stats.model
    passes, rows, busy, joining, model = (b - a for a, b in zip(before, after, strict=True))
    more = {
        **percentiles([result.seconds for result in results], "latency"),
        **percentiles([result.first_text for result in results], "first_text"),
        "wall_seconds": wall,
        "refused": refused,
        "rows_per_pass": rows / max(passes, 1),
        "engine_overhead": (busy + joining - model) / max(model, 1e-9),
    }
    done = [need for need, result in zip(needs, results, strict=False) if result is not None]
    return row(name, done, seconds, more)


def row(name: str, needs: Sequence[Need], seconds: float, more: dict[str, Any]) -> dict:
    tokens = sum(need.length for need in needs)
    rates = {"tokens_per_second": tokens / seconds, "requests_per_second": len(needs) / seconds}
    return {"load": name, "requests": len(needs), "tokens": tokens, "seconds": seconds, **rates, **more}


# ---------------------------------------------------------------- for people


def table(rows: Sequence[dict]) -> str:
    """The rows under each other: latency and time to first text in milliseconds, at p50, p90 and p99."""
    head = ["load", "requests", "tokens/s", "latency p50/p90/p99 (ms)", "first text p50/p90/p99 (ms)", "rows a pass"]
    body = [_cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = []
    for first, *others in (head, *body):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(row: dict) -> list[str]:
    numbers = [str(row["requests"]), f"{row['tokens_per_second']:.0f}"]
    rows = f"{row['rows_per_pass']:.1f}" if "rows_per_pass" in row else ""
    return [row["load"], *numbers, _times(row, "latency"), _times(row, "first_text"), rows]


def _times(row: dict, name: str) -> str:
    values = [row.get(f"{name}_p{p}") for p in PERCENTILES]
    return "" if values[0] is None else " / ".join(f"{1e3 * value:.0f}" for value in values)


def vocabulary_of(tokenizer, mask_id: int) -> int:
    """How many ids at the start of a vocabulary are no special ones."""
    return max(1, min([len(tokenizer), mask_id, *tokenizer.all_special_ids]))


def known_of(tokenizer, ends: Sequence[int]) -> dict[str, Any]:
    """What `denoise` is told beside the settings, as the engine tells it."""
    return {"vocab_size": len(tokenizer), "eos_token_ids": tuple(ends)}
