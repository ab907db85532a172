"""The journal of a sweep: one line a finished cell, safe against a kill."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from dlm.utils.files import _sync_folder, try_lock
from dlm.utils.jsonio import to_json

FORMAT = 1
NUMBER = int | float
FIELDS = {  # kinds of records, and the entries without which none can be read
    "settings": {"settings": dict},
    "launch": {"time": NUMBER},
    "reference": {"time": NUMBER},
    "cell": {"time": NUMBER, "key": str},
    "judgement": {"time": NUMBER, "key": str, "fields": dict},
}


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
    """The path of a results file to write, its folder made. Errors: no .json; a file that cannot be written."""
    path = Path(name)
    if path.suffix != ".json" or path.is_dir():
        raise ValueError(f"--out is {name!r}: give the name of a file that ends in .json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"--out {name} cannot be written: give a place where you may write")
    return path


def remove_results(path: Path, keep: int) -> None:
    """Remove a results file, what stands beside it, and the journals of other processes than the first `keep`.

    Errors: a journal that another process writes to; nothing is removed then.
    """
    own = {journal_path(path, rank) for rank in range(keep)}
    with contextlib.ExitStack() as held:
        others = [file for file in journal_paths(path) if file not in own]
        for file in others:
            if not try_lock(held.enter_context(file.open("rb"))):
                raise ValueError(f"{file} is being written by another run: wait for it, or give another --out")
        for file in (path, meta_path(path), *others):
            file.unlink(missing_ok=True)


def glob_literal(text: str) -> str:
    """A text as a glob pattern for itself."""
    return re.sub(r"([*?\[])", r"[\1]", text)


# ---------------------------------------------------------------- the journal


class Journal:
    """Appends records to a file; each is on the disk when `append` returns.

    fresh: begin again; nothing is removed before the file is locked.
    Errors: a file that cannot be written, or that another process writes to.
    """

    def __init__(self, path: Path, settings: dict, fresh: bool = False):
        self.path, self.file = path, path.open("a+b")
        if not try_lock(self.file):
            raise ValueError(f"{path} is being written by another run: wait for it, or give another --out")
        self.file.seek(0)
        whole = 0 if fresh else self.file.read().rfind(b"\n") + 1
        self.file.truncate(whole)  # a kill may have left a part of a line
        if not whole:
            self.append({"kind": "settings", "format": FORMAT, "settings": settings})
            _sync_folder(path.parent)

    def append(self, record: dict) -> None:
        """Write a record as one line."""
        self.file.write(to_json(record, ascii_only=False).encode() + b"\n")
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
            records.append(_record(json.loads(line)))
        except (ValueError, RecursionError):
            raise ValueError(
                f"{path}, line {number} is damaged and not the last: take it out, or begin again (--fresh)"
            ) from None
    if records and (records[0].get("kind") != "settings" or records[0].get("format") != FORMAT):
        raise ValueError(
            f"{path} is of format {records[0].get('format')!r} and this version of dlm writes {FORMAT}: go on with the "
            "version that wrote it, give another --out, or begin again (--fresh)"
        )
    return records


def _record(record) -> dict:
    """A line of a journal. Errors: another type than a line has, or an entry of one."""
    kind = record.get("kind") if isinstance(record, dict) else None
    fields = FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None or not all(isinstance(record.get(name), of) for name, of in fields.items()):
        raise ValueError(f"{kind!r} is no record of a journal")
    return record


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
        lines = read_journal(file)
        if lines:
            _refuse_changes(file, lines[0]["settings"], settings)
            records += lines[1:]
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
