"""A sweep over the cells of a grid: shared out over processes, shown as it goes, on the disk cell by cell."""

from __future__ import annotations

import json
import random
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from dlm.benchmarking.grid import Cell, Runner, reference_cell
from dlm.benchmarking.journal import FORMAT, Journal, meta_path
from dlm.benchmarking.quality import FIELDS, Appraiser, assemble, aup_by_curve, finished
from dlm.benchmarking.results import read_grid
from dlm.evaluation.metrics import DEGENERATE_RULE
from dlm.evaluation.tasks import Question
from dlm.utils.distributed import Sharing
from dlm.utils.files import write_json
from dlm.utils.hardware import commit, hardware, versions
from dlm.utils.progress import duration

REFERENCE_SECONDS = 15.0  # between measurements of the reference cell
JUDGED_TOGETHER = 16  # cells in a batch of the judge
SAID_SECONDS = 10.0  # between lines of progress where there is no terminal


def told_apart(records: Sequence[dict]) -> list[dict]:
    """Records in order of time, each once: processes that share a disk have read the same journals."""
    unique = {json.dumps(record, sort_keys=True): record for record in records}
    return sorted(unique.values(), key=lambda record: record["time"])


class Progress:
    """One line that moves on a terminal, one every few seconds elsewhere: cells done, time left, the last numbers."""

    def __init__(self, total: int, known: int, passes: int, sharing: Sharing):
        self.total, self.known, self.left, self.sharing = total, known, passes, sharing
        self.done, self.spent, self.began, self.said = 0, 0, time.monotonic(), -SAID_SECONDS
        self.live = sys.stderr.isatty()

    def add(self, cell: Cell, record: dict, passes: int) -> None:
        """A cell is done; passes: as it counted in the passes that were left."""
        self.done, self.left, self.spent = self.done + 1, self.left - passes, self.spent + passes
        elapsed = time.monotonic() - self.began
        due = self.live or self.left <= 0 or elapsed - self.said >= SAID_SECONDS
        if self.sharing.rank or not due:
            return
        self.said = elapsed
        done = min(self.total, self.known + self.done * self.sharing.size)
        line = (
            f"{done}/{self.total} cells · left {duration(elapsed / self.spent * self.left)} · {cell.column} "
            f"block {cell.block_length} steps {record['nfe']}: {record['latency']:.3f} s, "
            f"{record['tokens_per_s']:.0f} tokens/s"
        )
        sys.stderr.write(f"\r\x1b[2K{line}" + ("\n" if self.left <= 0 else "") if self.live else f"{line}\n")
        sys.stderr.flush()


def passes_of(cell: Cell, places: int) -> int:
    """Passes that a cell takes, a guess where the commit rule decides: for the time left."""
    return cell.steps or max(1, places // 2)


def sweep(
    cells: Sequence[Cell],
    records: Sequence[dict],
    runner: Runner,
    appraiser: Appraiser,
    journal: Journal,
    sharing: Sharing,
    judging: dict,
    command: str,
) -> list[dict]:
    """Measure this process's share of the cells that `records` lack, in random order, and judge them.

    Returns the new records. Each is in the journal before the next measurement begins; answers that an earlier run
    left unjudged, or judged in another way, are judged too. judging: who judges and how; command: what was typed.
    """
    launch, known, new = uuid.uuid4().hex[:12], finished(records, judging), []
    waiting = sharing.share([known[c.key] for c in cells if c.key in known and not known[c.key]["judged"]])
    todo = [cell for cell in cells if cell.key not in known]
    random.Random(runner.config.sampling.seed).shuffle(todo)
    todo = sharing.share(todo)
    costs = {cell: passes_of(cell, int(runner.canvases[cell.question].masked.sum())) for cell in todo}
    progress = Progress(len(cells), sum(cell.key in known for cell in cells), sum(costs.values()), sharing)

    def note(kind: str, **fields) -> dict:
        record = {"kind": kind, "time": time.time(), "rank": sharing.rank, "launch": launch, **fields}
        journal.append(record)
        new.append(record)
        return record

    def judge() -> None:
        for record, fields in zip(waiting, appraiser.appraise(waiting), strict=True):
            note("judgement", key=record["key"], judging=judging, fields=fields)
        waiting.clear()

    def refer() -> float:
        note("reference", latency=runner.reference(reference))
        return time.monotonic()

    if todo:
        facts = {"commit": commit(), "hardware": hardware(), "versions": versions(), "processes": sharing.size}
        note("launch", command=command, **facts)
        reference = reference_cell(cells)
        referred = refer()
    for cell in todo:
        if time.monotonic() - referred > REFERENCE_SECONDS:
            referred = refer()
        measured = runner.measure(cell)
        waiting.append(note("cell", key=cell.key, question=cell.question, **measured))
        progress.add(cell, measured, costs[cell])
        if len(waiting) >= JUDGED_TOGETHER:
            judge()
    judge()
    if todo:
        refer()
    return new


def write_results(
    out: Path,
    records: Sequence[dict],
    cells: Sequence[Cell],
    left_out: Sequence[dict],
    questions: Sequence[Question],
    settings: dict,
    judging: dict,
) -> int:
    """Write the results file and what stands beside it; returns how many cells it holds."""
    results = assemble(records, cells, questions, judging)
    done = sum(record["judged"] for record in finished(records, judging).values())
    prose = all(question.prose for question in questions)
    meta = {
        "format": FORMAT,
        "cells": len(cells),
        "measured": done,
        "settings": settings | judging,
        "launches": [record for record in records if record["kind"] == "launch"],
        "reference_cell": reference_cell(cells).key,
        "reference": [record for record in records if record["kind"] == "reference"],
        "order": [record["key"] for record in records if record["kind"] == "cell"],
        "infeasible": left_out,
        "fields": FIELDS,
        "degenerate_rule": DEGENERATE_RULE if prose else "an answer is degenerate where it is empty",
    }
    write_json(out, results)
    if done and any(question.check for question in questions):
        meta["aup"] = aup_by_curve(read_grid(out).settings())
    write_json(meta_path(out), meta, indent=1)
    return done
