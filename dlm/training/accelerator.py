"""What surrounds a run: the accelerator, the tracker, activation checkpointing, and a polite stop."""

from __future__ import annotations

import signal
import threading

import torch

from dlm.training.config import TrainingConfig
from dlm.training.logging import tracker_of


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
