"""Results files of a grid: a journal that survives any kill, and the JSON that scripts read, made from it.

The journal is the truth: JSON lines, one file a process (grid.journal-0.jsonl), each line on the disk before the next
measurement begins. The first line says the format and the settings; then come runs, reference measurements, cells and
judgements, in the order in which they happened. What a kill leaves half written at the end is dropped.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.metrics import geometric_mean

FORMAT = 1
CSV_COLUMNS = ("method", "question", "block_length", "steps", "latency_s", "perplexity")


def meta_path(path: Path) -> Path:
    """grid.json -> grid.meta.json, which says how the numbers came about."""
    return path.with_name(f"{path.name.removesuffix('.json')}.meta.json")


def journal_path(path: Path, rank: int) -> Path:
    """grid.json -> grid.journal-0.jsonl, the journal of a process."""
    return path.with_name(f"{path.name.removesuffix('.json')}.journal-{rank}.jsonl")


def journal_paths(path: Path) -> list[Path]:
    """The journals of a results file, of however many processes."""
    stem = path.name.removesuffix(".json")
    found = path.parent.glob(f"{glob_literal(stem)}.journal-*.jsonl")
    return sorted(file for file in found if re.fullmatch(rf"{re.escape(stem)}\.journal-\d+\.jsonl", file.name))


def check_output(name: str) -> Path:
    """The path of a results file to write, its folder made. Errors: no .json; a file that cannot be written, or that
    was not made here and would be overwritten."""
    path = Path(name)
    if path.suffix != ".json" or path.is_dir():
        raise ValueError(f"--out is {name!r}: give the name of a file that ends in .json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"--out {name} cannot be written: give a place where you may write")
    return path


def remove_results(path: Path) -> None:
    """Remove a results file, what stands beside it and its journals."""
    for file in (path, meta_path(path), *journal_paths(path)):
        file.unlink(missing_ok=True)


def glob_literal(text: str) -> str:
    """A text as a glob pattern for itself."""
    return re.sub(r"([*?\[])", r"[\1]", text)


# ---------------------------------------------------------------- the journal


class Journal:
    """Appends records to a file; each is on the disk when `append` returns.

    Errors: a file that cannot be written, or that another process writes to.
    """

    def __init__(self, path: Path, settings: dict):
        self.file = path.open("a+b")
        with contextlib.suppress(ImportError):  # where there is no fcntl nothing is locked
            import fcntl

            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{path} is being written by another run: wait for it, or give another --out"
                ) from None
        self.file.seek(0)
        whole = self.file.read().rfind(b"\n") + 1
        self.file.truncate(whole)  # a kill may have left a part of a line
        if not whole:
            self.append({"kind": "settings", "format": FORMAT, "settings": settings})
            _sync_folder(path.parent)

    def append(self, record: dict) -> None:
        """Write a record as one line."""
        self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def read_journal(path: Path) -> list[dict]:
    """The whole records of a journal, its settings first; [] where a kill came before the first was written.

    Errors: a line in the middle that does not parse; another format.
    """
    records = []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was not finished
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"{path}, line {number} is damaged and not the last: take it out, or begin again (--fresh)"
            ) from None
    if records and (records[0].get("kind") != "settings" or records[0].get("format") != FORMAT):
        raise ValueError(
            f"{path} is of format {records[0].get('format')!r} and this version of dlm writes {FORMAT}: go on with the "
            "version that wrote it, give another --out, or begin again (--fresh)"
        )
    return records


def read_journals(path: Path, settings: dict) -> list[dict]:
    """All records of the journals beside a results file, settings left out, in order of time.

    Errors: as `read_journal`; settings other than these, by name; a results file without a journal.
    """
    records: list[dict] = []
    journals = journal_paths(path)
    if path.exists() and not journals:
        raise ValueError(
            f"{path} is there without its journal, so that nothing can be added to it: give another --out, or begin "
            "again (--fresh)"
        )
    for file in journals:
        found = read_journal(file)
        if found:
            _refuse_changes(file, found[0]["settings"], settings)
            records += found[1:]
    return sorted(records, key=lambda record: record["time"])


def _refuse_changes(file: Path, before: dict, now: dict) -> None:
    now = json.loads(json.dumps(now))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        told = "; ".join(f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}" for name in changed)
        raise ValueError(
            f"{file} was begun with other settings ({told}): give those, another --out, or begin again (--fresh)"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=indent)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------- reading results


@dataclass(frozen=True)
class Setting:
    """A cell over all its questions. latency: median over repeats, mean over questions, in seconds; perplexity: the
    geometric mean (None: nobody judged); accuracy in 0 to 1 and its error; degenerate: at least half of the answers
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
        if not isinstance(cell.get("latency"), int | float) or not 0 < cell["latency"] < math.inf:
            raise ValueError(f"{path}: {_where(cell)} has latency {cell.get('latency')!r}: it must be seconds, above 0")
    beside = meta_path(path)
    meta = _load(beside) if path.suffix == ".json" and beside.is_file() else {}
    return Grid(path.stem, cells, meta)


def _where(cell: dict) -> str:
    return f"{cell['method']}, block {cell['block_length']}, steps {cell['steps']}"


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or no JSON ({error}): run dlm bench grid again, which makes it anew from its journal"
        ) from None


def _from_json(path: Path) -> Iterable[dict]:
    found = _load(path)
    try:
        for method, questions in found.items():
            for entry in questions:
                for block, row in entry["result"].items():
                    for steps, cell in row.items():
                        place = {"method": method, "question": entry["question"]}
                        yield cell | place | {"block_length": int(block), "steps": int(steps)}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} is no grid: it should be {{method: [{{question, result: {{block: {{steps: cell}}}}}}]}}"
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
