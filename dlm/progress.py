"""What a person sees of a training run: one line that moves on a terminal, one line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Display:
    """Collects steps and shows their mean loss, tokens per second and the time left."""

    def __init__(
        self,
        report: Callable[[str], None],
        step: int,
        max_steps: int,
        *,
        log_every: int,
        log_seconds: float,
        peak: float | None = None,
    ):
        self.report, self.max_steps, self.log_every, self.log_seconds = report, max_steps, log_every, log_seconds
        self.began, self.first, self.shown = time.perf_counter(), step, 0.0
        self.live = report is print and sys.stderr.isatty()
        self.peak = peak  # operations a second of all devices; None: not known
        self._clear()

    def _clear(self) -> None:
        self.loss, self.count, self.took, self.norm, self.steps, self.work = 0.0, 0, 0.0, 0.0, 0, 0.0

    def add(
        self,
        step: int,
        loss: float,
        count: int,
        norm: float,
        took: float,
        rates: list[float],
        tokens: int,
        work: float = 0.0,
    ) -> dict | None:
        """Note a step; returns a record for the log every `log_every` steps. Loss in nats per target token.

        work: the step's operations, of which the record's `mfu` is the share of the peak.
        """
        self.loss, self.count, self.took = self.loss + loss * count, self.count + count, self.took + took
        self.norm, self.steps, self.work = self.norm + norm, self.steps + 1, self.work + work
        if step % self.log_every and step != self.max_steps:
            return None
        elapsed = time.perf_counter() - self.began  # with validation and samples: the time left includes them
        left = elapsed / (step - self.first) * (self.max_steps - step)
        record = {
            "step": step,
            "loss": self.loss / max(self.count, 1),
            "grad_norm": self.norm / self.steps,
            "learning_rate": rates[0] if rates else 0.0,
            "learning_rates": rates,
            "tokens": tokens,
            "tokens_per_s": self.count / self.took,
            "seconds": elapsed,
        }
        usage = ""
        if self.peak:
            record["mfu"] = self.work / self.took / self.peak
            usage = f" ({record['mfu']:.1%} MFU)"
        line = (
            f"step {step}/{self.max_steps}  loss {record['loss']:.4f}  grad {record['grad_norm']:.2f}  "
            f"lr {record['learning_rate']:.2e}  {record['tokens_per_s']:,.0f} tokens/s{usage}  left {duration(left)}"
        )
        if self.live:
            sys.stderr.write(f"\r\x1b[2K{line}" + ("\n" if step == self.max_steps else ""))
            sys.stderr.flush()
        elif elapsed - self.shown >= self.log_seconds or step == self.max_steps or self.shown == 0.0:
            self.report(line)
            self.shown = elapsed
        self._clear()
        return record


def counted(items: Iterable[T], total: int, name: str, show: bool = True, every: float = 10.0) -> Iterator[T]:
    """The items, while standard error says how many of `total` there were and how long the rest will take.

    every: seconds between lines where it is no terminal; there the line moves.
    """
    live, began = sys.stderr.isatty(), time.perf_counter()
    shown = began
    for number, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if show and (number == total or now - shown >= (0.2 if live else every)):
            left = duration((now - began) / number * (total - number))
            start, end = ("\r\x1b[2K", "\n" if number == total else "") if live else ("", "\n")
            sys.stderr.write(f"{start}{name}: {number}/{total}  left {left}{end}")
            sys.stderr.flush()
            shown = now
