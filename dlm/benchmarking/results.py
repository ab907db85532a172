"""Results files of a grid: a journal that survives any kill, and the JSON that scripts read, made from it.

The journal is the truth: JSON lines, one file a process (grid.journal-0.jsonl), each line on the disk before the next
measurement begins. The first line says the format and the settings; then come runs, reference measurements, cells and
judgements, in the order in which they happened. What a kill leaves half written at the end is dropped.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.benchmarking.journal import journal_paths, meta_path
from dlm.utils.errors import shortened
from dlm.utils.jsonio import read_json
from dlm.utils.stats import geometric_mean

ABOVE_ZERO = ("latency", "latency_min", "latency_median", "latency_max", "perplexity")  # of a cell
NUMBERS = (  # of a cell; any of them may be missing
    *ABOVE_ZERO, "latency_relative", "tokens_per_s", "tokens_per_forward", "nfe", "positions_computed", "places_asked",
    "bound_per_token", "unigram_entropy", "distinct_2", "repetition", "accuracy", "accuracy_error", "ties", "cache_rms",
    "cache_same",
)  # fmt: skip
NUMBER = (int, float)
META: dict[str, Any] = {  # what stands beside a grid: the type of an entry, [that of its items], {those of its entries}
    "cells": int, "measured": int, "degenerate_rule": str,
    "settings": {
        "model": str, "dtype": str, "repeats": int, "judge": (dict, type(None)), "sampling": {"gen_length": int},
    },
    "launches": [{"hardware": str, "versions": {"torch": str}, "commit": (str, type(None))}],
    "reference": [{"latency": NUMBER}],
    "infeasible": [{"method": str, "block_length": int, "steps": (int, type(None)), "reason": str}],
    "aup": [{"method": str, "block_length": int, "aup": NUMBER}],
}  # fmt: skip
CSV_COLUMNS = ("method", "question", "block_length", "steps", "latency_s", "perplexity")


# ---------------------------------------------------------------- reading results


@dataclass(frozen=True)
class Setting:
    """A cell over all its questions. latency: median over repeats, mean over questions, in seconds; perplexity: the
    geometric mean (None: not judged); accuracy in 0 to 1 and its error; degenerate: at least half of the answers
    are (None: not known); answers: the cells themselves."""

    method: str
    block_length: int
    steps: int
    latency: float
    perplexity: float | None
    accuracy: float | None
    accuracy_error: float | None
    degenerate: bool | None
    answers: list[dict] = field(default_factory=list)

    @property
    def place(self) -> tuple[int, int]:
        return self.block_length, self.steps

    def mean(self, name: str) -> float | None:
        """The mean of a field over the questions; None where a cell lacks it."""
        values = [cell.get(name) for cell in self.answers]
        return None if not values or None in values else sum(values) / len(values)

    def known(self, name: str) -> float | None:
        """The mean of a field over the questions that have it; None where none has."""
        values = [cell[name] for cell in self.answers if cell.get(name) is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Grid:
    """A results file: its cells (each a dict with method, question, block_length, steps and what was measured), and
    meta, what stands beside it ({} where nothing does)."""

    name: str
    cells: list[dict]
    meta: dict

    @property
    def methods(self) -> list[str]:
        """In the file's order, but `none`, with which others are compared, first."""
        return sorted(dict.fromkeys(cell["method"] for cell in self.cells), key=lambda method: method != "none")

    def settings(self) -> list[Setting]:
        """The cells of the same method, block length and steps taken together, in order."""
        groups: dict[tuple[str, int, int], list[dict]] = {}
        for cell in self.cells:
            groups.setdefault((cell["method"], cell["block_length"], cell["steps"]), []).append(cell)
        order = {method: i for i, method in enumerate(self.methods)}
        return [
            _setting(*key, group)
            for key, group in sorted(groups.items(), key=lambda item: (order[item[0][0]], *item[0][1:]))
        ]


def _setting(method: str, block_length: int, steps: int, cells: list[dict]) -> Setting:
    judged = [cell["perplexity"] for cell in cells if cell.get("perplexity") is not None]
    marks = [cell["degenerate"] for cell in cells if cell.get("degenerate") is not None]
    right = [cell["accuracy"] for cell in cells if cell.get("accuracy") is not None]
    return Setting(
        method,
        block_length,
        steps,
        sum(cell["latency"] for cell in cells) / len(cells),
        geometric_mean(judged),
        sum(right) / len(right) if right else None,
        cells[0].get("accuracy_error"),
        2 * sum(marks) >= len(marks) if marks else None,
        cells,
    )


def read_grid(path: str | os.PathLike) -> Grid:
    """A results file: JSON of the shape {method: [{question, result: {block: {steps: cell}}}]}, or CSV.

    Errors: a file that is neither, is damaged, or holds no cell.
    """
    path = Path(path)
    cells = list(_from_csv(path) if path.suffix == ".csv" else _from_json(path))
    if not cells:
        raise ValueError(f"{path} holds no cell: run dlm bench grid first")
    for cell in cells:
        _check_cell(path, cell)
    beside = meta_path(path)
    meta = _load(beside) if path.suffix == ".json" and beside.is_file() else {}
    if (wrong := _misfit(meta, META, "it", required=False)) is not None:
        raise ValueError(
            f"{beside}: {wrong}, so the file is damaged: take it away, or run the same dlm bench grid again"
        )
    return Grid(path.stem, cells, meta)


def _check_cell(path: Path, cell: dict) -> None:
    for name in NUMBERS:
        value = cell.get(name)
        if value is None and name != "latency":
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (name in ABOVE_ZERO and value <= 0):
            what = "seconds, above 0" if name.startswith("latency") else "a number" + " above 0" * (name in ABOVE_ZERO)
            raise ValueError(f"{path}: {_where(cell)} has {name} {shortened(repr(value), 60)}: it must be {what}")


def _misfit(value: Any, shape: Any, name: str, required: bool = True) -> str | None:
    """Where a value does not have the shape, in words; None where it does. required: each entry has to be there."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is no object {{...}}"
        entries = [key for key in shape if required or key in value]
        misfits = (_misfit(value.get(key), shape[key], key) for key in entries)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is no list [...]"
        misfits = (_misfit(item, shape[0], f"an entry of {name}") for item in value)
    else:
        fits = isinstance(value, shape) and not isinstance(value, bool)
        return None if fits else f"{name} is {shortened(repr(value), 60)}"
    return next((one for one in misfits if one is not None), None)


def _where(cell: dict) -> str:
    return f"{cell['method']}, block {cell['block_length']}, steps {cell['steps']}"


def _load(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        if journal_paths(path):
            raise ValueError(
                f"{error}: run the same dlm bench grid again, which makes it anew from its journal"
            ) from None
        raise ValueError(f"{error}, so it is no grid: give the file that dlm bench grid wrote (--out)") from None


def _from_json(path: Path) -> Iterable[dict]:
    by_method = _load(path)
    try:
        for method, questions in by_method.items():
            for entry in questions:
                for block, row in entry["result"].items():
                    for steps, cell in row.items():
                        place = {"method": method, "question": entry["question"]}
                        yield cell | place | {"block_length": int(block), "steps": int(steps)}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} is no grid, {{method: [{{question, result: {{block: {{steps: cell}}}}}}]}}: give the file that "
            "dlm bench grid wrote (--out)"
        ) from None


def _from_csv(path: Path) -> Iterable[dict]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        lacking = [name for name in CSV_COLUMNS if name not in (rows.fieldnames or ())]
        if lacking:
            raise ValueError(
                f"{path} lacks the columns {', '.join(lacking)}: a grid as CSV has {', '.join(CSV_COLUMNS)}"
            )
        quality = [name for name in rows.fieldnames if "accuracy" in name or "pass_at" in name]
        for number, row in enumerate(rows, 2):
            try:
                yield {
                    "method": row["method"],
                    "question": row["question"],
                    "block_length": int(row["block_length"]),
                    "steps": int(row["steps"]),
                    "latency": float(row["latency_s"]),
                    "perplexity": float(row["perplexity"]) if row["perplexity"] else None,
                    "accuracy": float(row[quality[0]]) if quality and row[quality[0]] else None,
                }
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {number} does not parse: {row}") from None
