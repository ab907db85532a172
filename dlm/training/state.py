"""The state of a run on disk: checkpoints that are written whole, found again and loaded."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlm.utils.files import _first, _is_of_the_disk, replace_folder

STEP_FOLDER = re.compile(r"step-(\d{8})")
STATE_FILE = "trainer.json"  # written last: a folder that has it is complete
EMA_FILE = "ema.safetensors"


# --------------------------------------------------------------------------------------------------- training state


def step_folder(output: str | os.PathLike, step: int) -> Path:
    """The checkpoint folder of a step, under the run's output folder."""
    return Path(output) / "checkpoints" / f"step-{step:08d}"


def checkpoints(output: str | os.PathLike) -> list[tuple[int, Path]]:
    """Complete checkpoints (step, folder) of a run, oldest first."""
    found = []
    folder = Path(output) / "checkpoints"
    for child in folder.iterdir() if folder.is_dir() else ():
        match = STEP_FOLDER.fullmatch(child.name)
        if match and (child / STATE_FILE).is_file():
            found.append((int(match.group(1)), child))
    return sorted(found)


def save_state(accelerator, output, state: dict, ema: dict[str, Tensor] | None, keep_last: int) -> Path:
    """Write the run's state after `state['step']` steps: weights, optimizers, random numbers, EMA, position.

    Every process calls this. Afterwards only the newest `keep_last` checkpoints are left.
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
        if accelerator.is_main_process and ema is not None:
            save_file({name: tensor.contiguous() for name, tensor in ema.items()}, temporary / EMA_FILE)
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        kept = checkpoints(output)
        raise ValueError(
            f"the checkpoint of step {state['step']} cannot be written, the disk may be full ({_first(error)}); "
            f"the last good one is {kept[-1][1] if kept else 'none yet'}. Make room, then go on with --resume"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        replace_folder(temporary, final)
        for _, old in checkpoints(output)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def read_state(folder: str | os.PathLike) -> dict:
    """The small part of a checkpoint: step, data position, counters, and the settings it was made with.

    Errors: a damaged file.
    """
    try:
        return json.loads((Path(folder) / STATE_FILE).read_text())
    except ValueError as error:
        raise _damaged(folder, error) from error


def load_state(accelerator, folder: str | os.PathLike) -> dict[str, Tensor] | None:
    """Load weights, optimizers and random numbers into what the accelerator prepared; returns the EMA weights.

    Errors: a checkpoint of a model or an optimizer of another shape, a file of it that is damaged or missing.
    """
    folder = Path(folder)
    try:
        accelerator.load_state(str(folder))
        return load_file(folder / EMA_FILE) if (folder / EMA_FILE).is_file() else None
    except (SafetensorError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(folder, error) from error
    except (RuntimeError, ValueError, KeyError) as error:
        if "PytorchStreamReader" in str(error):
            raise _damaged(folder, error) from error
        raise ValueError(
            f"the checkpoint {folder} does not fit this model and optimizer ({_first(error, 2)}); "
            f"resume with the settings of the first run"
        ) from error


def _damaged(folder, error: Exception) -> ValueError:
    return ValueError(
        f"the checkpoint {folder} is damaged ({_first(error)}): remove that folder, and --resume goes on from the one "
        f"before"
    )
