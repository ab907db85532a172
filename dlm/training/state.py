"""The state of a run on disk: checkpoints that are written whole, checked, found again and loaded.

A checkpoint is a folder that appears by one rename, after every file in it was forced to the disk. `trainer.json` holds
the SHA-256 of every other file, and of itself without that entry; whatever changed afterwards is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlm.utils.files import _first, _is_of_the_disk, _sync_folder, replace_folder
from dlm.utils.jsonio import finite, to_json

STEP_FOLDER = re.compile(r"step-(\d{8,})")
STATE_FILE = "trainer.json"
EMA_FILE = "ema.safetensors"
OBJECTIVE_FILE = "objective.safetensors"  # what an objective holds that changes, such as a teacher
SET_ASIDE = ".damaged"  # what a folder that was skipped is called from then on
FORMAT = 2  # 1 had no checksums and no digest of the data


class Damaged(ValueError):
    """A checkpoint whose files are not what was written."""


def step_folder(output: str | os.PathLike, step: int) -> Path:
    """The checkpoint folder of a step, under the run's output folder."""
    return Path(output) / "checkpoints" / f"step-{step:08d}"


def checkpoints(output: str | os.PathLike) -> list[tuple[int, Path]]:
    """The checkpoints (step, folder) of a run, oldest first; whether they are whole, `read_state` says."""
    folder = Path(output) / "checkpoints"
    children = folder.iterdir() if folder.is_dir() else ()
    matches = [(STEP_FOLDER.fullmatch(child.name), child) for child in children]
    return sorted((int(match.group(1)), child) for match, child in matches if match and child.is_dir())


def check_unused(output: str | os.PathLike, resume: bool) -> None:
    """Errors: an output folder with checkpoints, of a run that is not to be resumed."""
    if not resume and checkpoints(output):
        raise ValueError(f"{output} holds checkpoints of a run: --resume it, or choose another --output folder")


# -------------------------------------------------------------------------------------------------------- writing


def save_state(
    accelerator, output, state: dict, ema: dict[str, Tensor] | None, keep_last: int,
    kept: dict[str, dict[str, Tensor]] | None = None,
) -> Path:  # fmt: skip
    """Write the run's state after `state['step']` steps: weights, optimizers, random numbers, EMA, position.

    kept: more files of this process with tensors, by name. Every process calls this. Afterwards only the newest
    `keep_last` checkpoints are left.
    Errors: a disk that is full or cannot be written; the checkpoints before stay.
    """
    final = step_folder(output, state["step"])
    temporary = final.parent / f".{final.name}.partial"  # one name for all processes
    if accelerator.is_main_process:
        for stale in final.parent.glob(".step-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        for name, tensors in (kept or {}).items():
            if tensors:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / name)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if ema is not None:
                save_file({name: tensor.contiguous() for name, tensor in ema.items()}, temporary / EMA_FILE)
            _seal(temporary, state)
            replace_folder(temporary, final)
            _sync_folder(final.parent)
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        kept = checkpoints(output)
        raise ValueError(
            f"the checkpoint of step {state['step']} cannot be written, the disk may be full ({_first(error)}); "
            f"the last good one is {kept[-1][1] if kept else 'none yet'}. Make room, then go on with --resume"
        ) from error
    if accelerator.is_main_process:
        for _, old in checkpoints(output)[:-keep_last]:
            going = old.with_name(f".{old.name}.old")  # a kill in the middle leaves no half of a checkpoint
            os.rename(old, going)
            shutil.rmtree(going, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def _seal(folder: Path, state: dict) -> None:
    """Force every file of a checkpoint to the disk, and write `trainer.json` with their checksums."""
    files = {name: checksum(folder / name, sync=True) for name in _files(folder)}
    whole = finite({"format": FORMAT, **state, "files": files})
    whole["sha256"] = _own_checksum(whole)
    with (folder / STATE_FILE).open("w", encoding="utf-8") as file:
        file.write(to_json(whole, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for place in (folder, *(child for child in folder.rglob("*") if child.is_dir())):
        _sync_folder(place)


def _files(folder: Path) -> list[str]:
    """Names of all files of a checkpoint but `trainer.json`, relative to it."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return sorted(name for name in names if name != STATE_FILE)


def checksum(path: Path, sync: bool = False) -> str:
    """SHA-256 of a file's bytes. sync: force them to the disk first. Errors: OSError."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_checksum(state: dict) -> str:
    rest = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------- reading


def read_state(folder: str | os.PathLike) -> dict:
    """The small part of a checkpoint: step, data position, counters, and the settings it was made with.

    Errors: `Damaged`, naming the file; a file that cannot be read; another format.
    """
    path = Path(folder) / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _damaged(folder, STATE_FILE, "is missing") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, STATE_FILE, f"is not JSON: {_first(error)}") from None
    if isinstance(state, dict) and "sha256" not in state and {"step", "config"} <= state.keys():
        raise ValueError(
            f"{path} was written by an earlier version of dlm, which kept no checksums and no digest of the data, so "
            f"that an exact resume cannot be checked: go on with that version, or begin with a new --output"
        )
    wrong = _what_is_wrong(state, Path(folder))
    if wrong:
        raise _damaged(folder, STATE_FILE, wrong)
    return state


def _what_is_wrong(state, folder: Path) -> str | None:
    """What of the content of `trainer.json` cannot be, in words; None where it can."""
    if not isinstance(state, dict):
        return f"holds a {type(state).__name__} and not an object"
    if state.get("sha256") != _own_checksum(state):
        return "does not have the checksum it was written with"
    if state.get("format") != FORMAT:
        return f"is of format {state.get('format')!r}, and this version reads {FORMAT}"
    numbers = {"step": int, "tokens": int, "processes": int, "seconds": int | float}
    for name, kind in numbers.items():
        value = state.get(name)
        if isinstance(value, bool) or not isinstance(value, kind) or not value >= 0:
            return f"has {name} {value!r}: a number that is not negative belongs there"
    for name, kind in {"config": dict, "identity": dict, "files": dict, "position": list}.items():
        if not isinstance(state.get(name), kind):
            return f"has {name} of type {type(state.get(name)).__name__}, not {kind.__name__}"
    if not _counts(state["position"]):
        return f"has position {state['position']}: whole numbers that are not negative belong there"
    match = STEP_FOLDER.fullmatch(folder.name)
    if match and int(match.group(1)) != state["step"]:
        return f"says step {state['step']}"
    return None


def _counts(value) -> bool:
    """Whether a position holds whole numbers alone, none negative."""
    if isinstance(value, list):
        return all(map(_counts, value))
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def verify(folder: str | os.PathLike) -> dict:
    """Read a whole checkpoint against its checksums; returns its state.

    Errors: `Damaged`, naming the file that is missing or changed; a file that cannot be read.
    """
    folder = Path(folder)
    state = read_state(folder)

    def check(entry: tuple[str, str]) -> Exception | None:
        name, expected = entry
        try:
            if checksum(folder / name) != expected:
                return _damaged(folder, name, "does not have the checksum it was written with")
        except (FileNotFoundError, IsADirectoryError):
            return _damaged(folder, name, "is missing")
        except OSError as error:
            return _unreadable(folder / name, error)
        return None

    with ThreadPoolExecutor(4) as pool:  # hashing lets the interpreter go
        for problem in pool.map(check, state["files"].items()):
            if problem is not None:
                raise problem
    return state


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it no longer counts; nothing of it is deleted."""
    target = folder.with_name(folder.name + SET_ASIDE)
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}{SET_ASIDE}-{number}")
    os.rename(folder, target)
    return target


def load_state(accelerator, folder: str | os.PathLike) -> dict[str, Tensor] | None:
    """Load weights, optimizers and random numbers into what the accelerator prepared; returns the EMA weights.

    Errors: a checkpoint of a model or an optimizer of another shape, a file of it that is damaged or missing.
    """
    folder = Path(folder)
    try:
        accelerator.load_state(str(folder))
        return load_file(folder / EMA_FILE) if (folder / EMA_FILE).is_file() else None
    except PermissionError as error:
        raise _unreadable(folder, error) from error
    except (SafetensorError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(folder, "a file", f"does not load: {_first(error)}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        if "PytorchStreamReader" in str(error):
            raise _damaged(folder, "a file", f"does not load: {_first(error)}") from error
        raise ValueError(
            f"the checkpoint {folder} does not fit this model and optimizer ({_first(error, 2)}); "
            f"resume with the settings of the first run"
        ) from error


def _damaged(folder, name: str, what: str) -> Damaged:
    return Damaged(
        f"the checkpoint {folder} is damaged ({name} {what}): --resume --skip-damaged goes on from the one before it, "
        f"and sets this one aside"
    )


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{error.filename or path} cannot be read ({error.strerror or error}): nothing says that the checkpoint is "
        f"damaged; see to its permissions or its disk, then go on with --resume"
    )
