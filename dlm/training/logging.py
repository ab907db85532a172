"""What a run says: progress lines, metrics and trackers."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from dlm.training.config import TrainingConfig
from dlm.utils.jsonio import to_json
from dlm.utils.progress import duration

SLOW_STEPS = 3  # the first steps of a run, which also compile and fill caches, say nothing of the time left
SPEED_STEPS = 20  # after so many a line with the speed and the time left is printed, whatever log_every is


class Display:
    """Collects steps and shows their mean loss, what they learn from a second and the time left.

    unit: what the objective counts: target tokens, answers of a policy gradient, pairs of preferences.
    """

    def __init__(
        self,
        report: Callable[[str], None],
        step: int,
        max_steps: int,
        *,
        log_every: int,
        log_seconds: float,
        peak: float | None = None,
        unit: str = "tokens",
    ):
        self.report, self.max_steps, self.log_every, self.log_seconds = report, max_steps, log_every, log_seconds
        self.began, self.first, self.shown = time.perf_counter(), step, 0.0
        self.settled = self.began, step
        self.first_share: tuple[float, float] | None = None  # when the first step was noted, and of what time it was
        self.live = report is print and sys.stderr.isatty()
        self.unit, self.peak = unit, peak  # operations a second of all devices; None: not known
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
        time_share: float = 0.0,
        last: bool = False,
    ) -> dict | None:
        """Note a step; returns a record for the log every `log_every` steps. Loss per unit (nats per target token).

        work: the step's operations, of which the record's `mfu` is the share of the peak. time_share: of the time that
        the run has, where that limits it. last: nothing comes after it.
        """
        self.loss, self.count, self.took = self.loss + loss * count, self.count + count, self.took + took
        self.norm, self.steps, self.work = self.norm + norm, self.steps + 1, self.work + work
        last = last or step == self.max_steps
        if step - self.first == SLOW_STEPS:
            self.settled = time.perf_counter(), step
        if self.first_share is None:
            self.first_share = time.perf_counter(), time_share
        early = step - self.first == SPEED_STEPS
        if step % self.log_every and not last and not early:
            return None
        now = time.perf_counter()
        elapsed = now - self.began  # with validation and samples: the time left includes them
        since, first = self.settled if step - self.settled[1] >= SLOW_STEPS else (self.began, self.first)
        left = (now - since) / (step - first) * (self.max_steps - step)
        if time_share > self.first_share[1]:  # a resumed run begins with a share of its time over
            pace = (now - self.first_share[0]) / (time_share - self.first_share[1])
            left = min(left, pace * max(0.0, 1 - time_share))
        record = {
            "step": step,
            "loss": self.loss / self.count if self.count else None,
            "grad_norm": self.norm / self.steps,
            "learning_rate": rates[0] if rates else 0.0,
            "learning_rates": rates,
            self.unit: tokens,
            f"{self.unit}_per_s": self.count / self.took,
            "seconds": elapsed,
        }
        usage = ""
        if self.peak:
            record["mfu"] = self.work / self.took / self.peak
            usage = f" ({record['mfu']:.1%} MFU)"
        speed = record[f"{self.unit}_per_s"]
        loss = f"{record['loss']:.4f}" if self.count else f"- (none of the {self.unit} carried loss)"
        rate = f"{speed:,.{int(speed < 10)}f} {self.unit}/s{usage}"
        line = (
            f"step {step}/{self.max_steps}  loss {loss}  grad {record['grad_norm']:.2f}  "
            f"lr {record['learning_rate']:.2e}  {rate}  left {duration(left)}"
        )
        if self.live:
            sys.stderr.write(f"\r\x1b[2K{line}" + ("\n" if last else ""))
            sys.stderr.flush()
        elif early or elapsed - self.shown >= self.log_seconds or last or self.shown == 0.0:
            self.report(line)
            self.shown = elapsed
        if step % self.log_every and not last:
            return None  # a line for people, between two records
        self._clear()
        return record


class Metrics:
    """metrics.jsonl of a run, and its tracker: one record a line, written by the first process."""

    def __init__(self, accelerator, output: str | os.PathLike):
        self.accelerator, self.path = accelerator, Path(output) / "metrics.jsonl"

    def add(self, record: dict) -> None:
        """Append a record, and tell the tracker its numbers."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as log:
                log.write(to_json(record) + "\n")
        numbers = {f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, float)}
        self.accelerator.log(numbers, step=record["step"])

    def begin_anew(self) -> Path | None:
        """Set aside the log of an earlier run in the folder, which left no checkpoint to go on from; its new name."""
        if not (self.accelerator.is_main_process and self.path.is_file() and self.path.stat().st_size):
            return None
        number = 1
        while (target := self.path.with_name(f"metrics-{number}.jsonl")).exists():
            number += 1
        os.rename(self.path, target)
        return target

    def forget_after(self, step: int) -> int:
        """Drop the records of steps that will be done again, and damaged lines; returns how many lines were damaged."""
        if not (self.accelerator.is_main_process and self.path.is_file()):
            return 0
        kept, damaged = [], 0
        for line in self.path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                record, damaged = None, damaged + 1
            else:
                if record is not None and not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                    record, damaged = None, damaged + 1
            if record is not None and record["step"] <= step:
                kept.append(to_json(record) + "\n")
        temporary = self.path.with_name(f".{self.path.name}.partial")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)
        return damaged


def tracker_of(config: TrainingConfig) -> str | None:
    """The tracker that is used. Errors: one that was named and is not installed."""
    if config.tracker == "none":
        return None
    name = "tensorboard" if config.tracker == "auto" else config.tracker
    if importlib.util.find_spec(name) is not None:
        return name
    if config.tracker == "auto":
        return None
    raise ValueError(f"tracker is {name!r}, which is not installed: pip install {name}, or use --tracker none")


def start_tracker(accelerator, config: TrainingConfig) -> None:
    """Open the tracker, if there is one, and note the settings in it."""
    if accelerator.log_with:
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in asdict(config).items()}
        accelerator.init_trackers("dlm", config=plain)


def finish_tracker(accelerator) -> None:
    """Close the tracker. (Accelerate's end_training would take down the process group too, which is still needed.)"""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            tracker.finish()
