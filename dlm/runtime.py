"""What surrounds a run: the accelerator, the tracker, activation checkpointing, and a polite stop."""

from __future__ import annotations

import importlib.util
import signal
import threading
from contextlib import contextmanager
from dataclasses import asdict

import torch

from dlm.training_config import TrainingConfig


def make_accelerator(config: TrainingConfig):
    """The Accelerator for a config; a recipe makes it early to know which process it is."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise processes on CPUs would not join, and each train alone
        mixed_precision=config.precision,
        log_with=tracker_of(config),
        project_config=ProjectConfiguration(project_dir=config.output, logging_dir=config.output),
    )


def checkpoint_activations(model) -> None:
    """Have every layer keep only its input, and compute the rest again in the backward pass."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # its name in later releases of transformers
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def check_sharding(accelerator, optimizers) -> None:
    """Errors: what this loop cannot do with FSDP1, or with the one optimizer that sharding leaves room for."""
    kind = str(accelerator.distributed_type.value)
    if kind not in ("FSDP", "DEEPSPEED"):
        return
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("FSDP1 flattens the weights that decay and moving average tell apart: set fsdp_version to 2")
    if len(optimizers) > 1:
        raise ValueError(
            "under FSDP and DeepSpeed Accelerate keeps the state of one optimizer alone, and muon is two with the "
            "AdamW beside it: use optimizer adamw"
        )


def check_processes(accelerator, before: int, folder) -> None:
    """Errors: DeepSpeed, and a checkpoint of another number of processes."""
    if accelerator.distributed_type.value == "DEEPSPEED" and before != accelerator.num_processes:
        raise ValueError(
            f"{folder} was made by {before} processes, now there are {accelerator.num_processes}: DeepSpeed's own "
            f"files need the same number; those of FSDP2 and DDP do not"
        )


def keep_sums_exact(accelerator, precision: str) -> None:
    """Under FSDP2 in bf16: weights travel in bf16, gradients are summed in fp32 (Accelerate's own default is bf16)."""
    if accelerator.distributed_type.value == "FSDP" and precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


@contextmanager
def tables_in_root(model):
    """While Accelerate prepares `model` for FSDP2: a tied table belongs to the root's group, whole from first to last.

    Accelerate looks for the modules of both tables and expects two; one that is input and output at once is used before
    and after all layers, which is what the root's group is for.
    """
    tied = model.get_input_embeddings() is model.get_output_embeddings()
    names = ("get_input_embeddings", "get_output_embeddings") if tied else ()
    for name in names:
        setattr(model, name, lambda: None)  # shadows the class's method
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


def tracker_of(config: TrainingConfig) -> str | None:
    """The tracker that is used. Errors: one that was named and is not installed."""
    if config.tracker == "none":
        return None
    name = "tensorboard" if config.tracker == "auto" else config.tracker
    if importlib.util.find_spec(name) is not None:
        return name
    if config.tracker == "auto":
        return None
    raise ValueError(f"tracker is {name!r}, which is not installed: pip install {name}, or use --tracker none")


def start_tracker(accelerator, config: TrainingConfig) -> None:
    """Open the tracker, if there is one, and note the settings in it."""
    if accelerator.log_with:
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in asdict(config).items()}
        accelerator.init_trackers("dlm", config=plain)


def finish_tracker(accelerator) -> None:
    """Close the tracker. (Accelerate's end_training would take down the process group too, which is still needed.)"""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            tracker.finish()


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second Ctrl-C stops at once."""

    def __enter__(self) -> StopSignal:
        self.requested = False
        self.name = ""
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
