"""Files and folders that appear whole or not at all, that one process writes at a time, and that replace only what
dlm wrote."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dlm.utils.jsonio import to_json

LOCK = ".lock"  # in a folder that one process writes at a time
MARKER = ".dlm.json"  # in a folder that dlm wrote whole: which files are its own


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file that appears whole or not at all; into a pipe or a device, as it is."""
    text = to_json(content, ascii_only=False, indent=indent) + "\n"
    if path.exists() and not path.is_file():  # a device must not be replaced
        path.write_text(text, encoding="utf-8")
        return
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


# Kinds of files that dlm writes, and how they begin.
BEGINS = {
    "json": (b"{", b"["),
    "jsonl": (b"{",),
    "html": (b"<!doctype html",),
    "svg": (b"<svg",),
    "recording": (b'{"format": "dlm-recording"',),
}


def check_file(name: str | os.PathLike, option: str, kind: str, reads: Iterable[str | os.PathLike] = ()) -> Path:
    """The path of a file that will be written. Raises ValueError, before the work, where that cannot be, or would
    replace what dlm did not write there.

    option: what the user named it by. kind: of `BEGINS`; a file that begins otherwise is not replaced. reads: names of
    files that the same command reads.
    """
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{option} is {name}, which is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"{option} is {name}, and there is no folder {path.parent}: make it, or give another name")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} is {name}, which cannot be written: give a place where you may write")
    if not path.is_file():  # a new name, a pipe, a device
        return path
    if any(os.path.exists(other) and path.samefile(other) for other in reads):
        raise ValueError(f"{option} is {name}, which this command reads: give another name")
    with path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head and not head.startswith(BEGINS[kind]):
        raise ValueError(f"{option} is {name}, which dlm did not write: give another name, or move it away")
    return path


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------------------------------ locks

_HELD: dict[Path, list] = {}  # the lock files that this process holds: [file, how often]


def _leave_locks() -> None:
    """A forked child holds nothing: the lock must go with the parent."""
    for file, _ in _HELD.values():
        file.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder, which is made, for this process; within one process the blocks may nest.

    The lock goes with the process, however it ends. Errors: another process holds it; it cannot be written.
    """
    path = Path(folder).resolve() / LOCK
    if path in _HELD:
        _HELD[path][1] += 1
        try:
            yield
        finally:
            _HELD[path][1] -= 1
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        if not try_lock(file):
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "another process"
            raise ValueError(f"{folder} is being written by {holder}: wait for it, or give another output folder")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        _HELD[path] = [file, 1]
        try:
            yield
        finally:
            _HELD.pop(path, None)


def try_lock(file) -> bool:
    """Lock an open file for this process; False where another has it. Systems without locks lock nothing."""
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
    return True


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept, of one kind: in $DLM_CACHE, else in the user's cache folder."""
    base = os.environ.get("DLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dlm"
    return Path(base) / name


# ---------------------------------------------------------------------------------------------------- whole folders


def check_replaceable(folder: str | os.PathLike) -> None:
    """Errors: a folder that dlm would replace and that holds what it did not write, a file, a symbolic link."""
    folder = Path(folder)
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link to {os.readlink(folder)}: name the folder itself")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the name of a folder")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        ours = {MARKER, *marker["files"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        ours = set()
    foreign = [name for name in names if name not in ours]
    if foreign or (not ours and any(folder.iterdir())):
        shown = ", ".join(foreign[:3]) + (f" … ({len(foreign)} in all)" if len(foreign) > 3 else "")
        raise ValueError(
            f"{folder} holds what dlm did not write ({shown or 'folders'}) and would be replaced: give another folder, "
            f"or move these away"
        )


def _mark(folder: Path) -> None:
    """Write down which files of a folder are ours."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    (folder / MARKER).write_text(to_json({"written_by": "dlm", "files": names}, indent=1) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` (replacing it) when the block ends without an error.

    A marker in it names its files: a folder is replaced only where all that it holds is named by its marker.
    Errors: those of `check_replaceable`; a disk that is full or cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder, "")
    temporary = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*.safetensors"):  # written for their owner alone, whatever the umask
            file.chmod(temporary.stat().st_mode & 0o666)
        _mark(temporary)
        check_replaceable(folder)  # hours may have passed
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
