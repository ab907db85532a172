"""The output of an offline batch: JSON lines in the order of the prompts, which a run after a kill goes on with.

One process writes OUT.jsonl itself. Process r of N writes OUT.part-r-of-N.jsonl, the texts r, r + N, r + 2N, ...; the
process that finds all parts whole makes OUT.jsonl of them, in the order of the index. OUT.meta.json beside it says what
was asked, so that nothing is mixed: it is written before the first line.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from dlm.utils.files import try_lock, write_json
from dlm.utils.jsonio import read_object, to_json

__all__ = ["Output", "merge", "meta_path", "part_path"]

FORMAT = "dlm-offline-1"


def meta_path(out: Path) -> Path:
    """OUT.jsonl -> OUT.meta.json."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.meta.json")


def part_path(out: Path, rank: int, size: int) -> Path:
    """The file that process `rank` of `size` writes."""
    stem = out.name.removesuffix(".jsonl")
    return out if size == 1 else out.with_name(f"{stem}.part-{rank}-of-{size}.jsonl")


class Output:
    """The file of one process, open to be appended to; its texts are `rank`, `rank + size`, ... below `total`.

    done: lines that are there; what a kill left of the last one is cut off.
    Raises ValueError, in one line, for a file that was begun with other settings, that this command did not begin, that
    another process writes to, or that is damaged; OSError where it cannot be written.
    """

    def __init__(self, out: Path, settings: dict[str, Any], total: int, rank: int = 0, size: int = 1):
        self.out, self.total, self.rank, self.size = out, total, rank, size
        if out.suffix != ".jsonl" or out.is_dir():
            raise ValueError(f"--out is {str(out)!r}: give the name of a file that ends in .jsonl")
        out.parent.mkdir(parents=True, exist_ok=True)
        self.path = part_path(out, rank, size)
        self.merged = size > 1 and out.exists() and meta_path(out).exists()
        if self.merged:
            check_settings(out, settings)
            self.done = self.share
            return
        self.file = self.path.open("a+b", buffering=0)
        try:
            if not try_lock(self.file):
                raise ValueError(f"{self.path} is being written by another run: wait for it, or give another --out")
            self._begin(settings)
            self.done = self._read()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_) -> None:
        if not self.merged:
            os.fsync(self.file.fileno())
            self.file.close()

    @property
    def share(self) -> int:
        """Texts of this process."""
        return len(range(self.rank, self.total, self.size))

    def append(self, record: dict[str, Any]) -> None:
        """Writes the next line; it survives a kill of the process once this returns."""
        assert record["index"] == self.rank + self.done * self.size, "lines are written in the order of the prompts"
        line = to_json(record, ascii_only=False).encode("utf-8", "backslashreplace") + b"\n"
        written = self.file.write(line)
        if written != len(line):
            raise OSError(f"{self.path} cannot be written, the disk may be full: make room; the same command goes on")
        self.done += 1

    def _begin(self, settings: dict[str, Any]) -> None:
        written = os.fstat(self.file.fileno()).st_size
        if meta_path(self.out).exists() and (written or self.size > 1):  # without a line nothing would be mixed
            check_settings(self.out, settings)
        elif written or (self.size > 1 and self.out.exists()):
            raise ValueError(f"{self.out} is there, and this command did not begin it: give another --out")
        else:
            write_json(meta_path(self.out), {"format": FORMAT, **settings}, indent=1)

    def _read(self) -> int:
        """How many lines there are, each of them checked; cuts a torn one at the end off."""
        self.file.seek(0)
        whole = lines = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if index_of(line) != self.rank + lines * self.size or lines == self.share:
                    raise ValueError(
                        f"{self.path}, line {lines + 1} is not the text {self.rank + lines * self.size} of these "
                        "prompts: the file was changed; remove it and its .meta.json, or give another --out"
                    )
                whole, lines = whole + len(line), lines + 1
        self.file.truncate(whole)
        return lines


def index_of(line: bytes) -> int | None:
    """The index of a line, None of one that is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record.get("index") if isinstance(record, dict) else None


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where a file was begun with other settings, naming them."""
    before, now = _flat(read_object(meta_path(out))), _flat(json.loads(json.dumps({"format": FORMAT, **settings})))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        said = "; ".join(f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}" for name in changed)
        raise ValueError(f"{out} was begun with other settings ({said}): give those, or another --out")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of sampling one by one."""
    sampling = settings.get("sampling")
    return settings | (sampling | {"sampling": None} if isinstance(sampling, dict) else {})


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def merge(out: Path, total: int, size: int) -> bool:
    """Makes OUT.jsonl of the parts, in the order of the index, and removes them; False where a part is not whole yet.

    A process that ends later does it then. With one process there is nothing to do.
    """
    parts = [part_path(out, rank, size) for rank in range(size)]
    if size == 1:
        return True
    temporary = out.with_name(f".{out.name}.partial")
    with temporary.open("a+b") as target:
        if not try_lock(target):
            return False  # another process is about it
        if out.exists():
            _remove(parts, temporary)
            return True
        target.truncate(0)
        if not _copy(parts, target, total):
            temporary.unlink()
            return False
        target.flush()
        os.fsync(target.fileno())
        os.replace(temporary, out)
    _remove(parts)
    return True


def _copy(parts: Sequence[Path], target: BinaryIO, total: int) -> bool:
    with contextlib.ExitStack() as stack:
        try:
            files = [stack.enter_context(part.open("rb")) for part in parts]
        except FileNotFoundError:
            return False
        for count, line in enumerate(_interleaved(files), 1):
            if line is None or not line.endswith(b"\n"):
                return False
            target.write(line)
            if count == total:
                return True
    return total == 0


def _interleaved(files: Sequence[BinaryIO]) -> Iterator[bytes | None]:
    """A line of each file in turn, None where one has no more."""
    for lines in zip_longest(*files):
        yield from lines


def _remove(paths: Sequence[Path], *more: Path) -> None:
    for path in (*paths, *more):
        path.unlink(missing_ok=True)
