"""Folders on disk: a model as other tools load it, and the state of a training run. Both appear whole or not at all.

Everything is written to a hidden folder beside the final one and renamed, so a kill during a write loses nothing.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dlm import zero
from dlm.models import quiet
from dlm.optim import reshard

STEP_FOLDER = re.compile(r"step-(\d{8})")
STATE_FILE = "trainer.json"  # written last: a folder that has it is complete
EMA_FILE = "ema.safetensors"


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


def save_model(
    model: nn.Module,
    folder: str | os.PathLike,
    tokenizer=None,
    *,
    state: dict[str, Tensor] | None = None,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    notes: dict | None = None,
) -> Path:
    """Write a model folder: config, safetensors, tokenizer, and `training.json` where `notes` are given.

    state: the model's state, where the model holds a part of it alone (`whole_state`). weights: parameters by name to
    write in place of the model's own (its moving average). dtype: the type on disk.
    The model itself is not touched. Errors: those of `whole_folder`.
    """
    fresh = type(model)(copy.deepcopy(model.config))
    fresh.load_state_dict(model.state_dict() if state is None else state)
    if weights is not None:
        copy_weights(weights, fresh)
    if dtype is not None:
        fresh = fresh.to(dtype)
    fresh.config.dtype = next(fresh.parameters()).dtype
    with whole_folder(folder) as temporary, quiet():
        fresh.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if notes is not None:
            (temporary / "training.json").write_text(json.dumps(notes, indent=2) + "\n")
    return Path(folder)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor alone (a DTensor, as FSDP2 makes them, or ZeRO-3's)."""
    return hasattr(tensor, "full_tensor") or zero.is_divided(tensor)


def whole(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors with the parts of all processes, which all call this; sharded ones go to the CPU of those that keep.

    One tensor at a time is whole on a device, and where `keep` is false nothing of a sharded one stays.
    """
    made = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            full = tensor.full_tensor()
            if not keep:
                continue
            tensor = full.cpu()
        made[name] = tensor
    return made


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state of a model, as `whole` gives it."""
    if zero.divides(model):
        return zero.gathered(model, keep)
    reshard(model)
    return whole(model.state_dict(), keep)


def whole_average(ema, model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The moving average of a model, as `whole` gives it."""
    if not zero.divides(model):
        return whole(ema.weights, keep)
    ema.swap(model)  # ZeRO-3 puts together what stands in the model's place
    try:
        made = zero.gathered(model, keep)
    finally:
        ema.swap(model)
    return {name: tensor for name, tensor in made.items() if name in ema.weights}


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, laid out as `like` is."""
    if zero.is_divided(like):
        return zero.share_of(tensor, like)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def copy_weights(weights: dict[str, Tensor], model: nn.Module) -> None:
    """Copy parameters by name into a model. Errors: a name or a shape that does not fit."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise ValueError(f"the weights are of another model: {', '.join(odd[:4])} on one side only")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(weights[name].shape)} in the checkpoint and "
                f"{tuple(parameter.shape)} in the model: use the settings of the first run"
            )
        parameter.copy_(weights[name])


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


def _first(error: Exception, lines: int = 1) -> str:
    """The first lines of a library's message, as one."""
    return " ".join(" ".join(str(error).strip().splitlines()[:lines]).split()) or type(error).__name__
