"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


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


def read_object(file: Path) -> dict[str, Any]:
    """The object {...} in a JSON file; a byte order mark at its beginning is skipped.

    Raises ValueError, naming the file, for anything else; OSError where it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply: copy the file again") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({_first(error)}): copy the file again") from None
    if not isinstance(content, dict):
        kind = "null" if content is None else type(content).__name__
        raise ValueError(f"{file} must hold an object {{...}}, and holds {kind}: copy the file again")
    return content


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` (replacing it) when the block ends without an error.

    Errors: a disk that is full or cannot be written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder, "")
    temporary = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*.safetensors"):  # written for their owner alone, whatever the umask
            file.chmod(temporary.stat().st_mode & 0o666)
        replace_folder(temporary, folder)
        _remove_stale(folder, "old-")  # only now: one may have been all that a kill between two renames left
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        raise ValueError(
            f"{folder} cannot be written, the disk may be full ({_first(error)}): make room, then go on with --resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_of_the_disk(error: Exception) -> bool:
    """Whether a file could not be written: each library has its own word for it, tokenizers no class but Exception."""
    words = ("os error", "Writer", "iostream", "inline_container")  # Rust's; torch's
    return isinstance(error, OSError | SafetensorError) or any(word in str(error) for word in words)


def _remove_stale(folder: Path, kind: str) -> None:
    """Remove what a killed process left while it wrote this folder."""
    name = re.compile(rf"\.{re.escape(folder.name)}-{kind}[0-9a-f]{{12}}")
    for child in folder.parent.iterdir():
        if name.fullmatch(child.name):
            shutil.rmtree(child, ignore_errors=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; what was there goes once the new one is in place."""
    if not folder.exists():
        os.rename(temporary, folder)
        return
    old = folder.parent / f".{folder.name}-old-{uuid.uuid4().hex[:12]}"
    os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _first(error: Exception, lines: int = 1) -> str:
    """The first lines of a library's message, as one."""
    return " ".join(" ".join(str(error).strip().splitlines()[:lines]).split()) or type(error).__name__
