"""What surrounds a run: the accelerator, the model and its optimizers made ready for it."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch

from dlm.kernels.linear import has_kernels
from dlm.training import zero
from dlm.training.config import TrainingConfig
from dlm.training.logging import tracker_of
from dlm.training.optim import build_optimizers
from dlm.training.sharding import check_sharding, keep_sums_exact, tables_in_root

Config = TypeVar("Config", bound=TrainingConfig)
WAITING = timedelta(hours=12)  # for the first process, which tokenizes or has a teacher write; NCCL's own: 10 minutes


def with_precision(config: Config) -> Config:
    """The config with precision auto replaced: bf16 where the device has instructions for it, else no (fp32).

    A run records what it was, so that it is not resumed in another precision without a word.
    """
    if config.precision != "auto":
        return config
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    quick = {
        "cpu": lambda: has_kernels(torch.bfloat16),
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "mps": lambda: False,
    }.get(device.type, lambda: True)()
    return replace(config, precision="bf16" if quick else "no")


def make_accelerator(config: TrainingConfig):
    """The Accelerator for a config; a recipe makes it early to know which process it is."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise processes on CPUs would not join, and each train alone
        mixed_precision=with_precision(config).precision,
        log_with=tracker_of(config),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAITING)],
        project_config=ProjectConfiguration(project_dir=config.output, logging_dir=config.output),
    )


def checkpoint_activations(model) -> None:
    """Have every layer keep only its input, and compute the rest again in the backward pass."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # its name in later releases of transformers
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def prepare_model(accelerator, model, config: TrainingConfig):
    """(model, optimizers) as Accelerate prepares them, on the device.

    Errors: settings that sharding does not allow.
    """
    if hasattr(model, "config"):  # what it sees from now on, and says in its checkpoint
        model.config.objective, model.config.block_length = config.objective, config.block_length
        model.config.full_attention = config.full_share > 0
    if config.activation_checkpointing:
        checkpoint_activations(model)
    model.to(accelerator.device)  # before the optimizers: they look at where the parameters are
    optimizers = build_optimizers(
        model,
        config.optimizer,
        learning_rate=config.learning_rate,
        muon_learning_rate=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        momentum=config.momentum,
    )
    if config.compile:
        for module in model.modules():
            if type(module).__name__ in (getattr(model, "_no_split_modules", None) or ()):
                module.compile(dynamic=False)  # layer by layer: one compilation a shape
    check_sharding(accelerator, optimizers)
    keep_sums_exact(accelerator, config.precision)
    zero.configure(accelerator, config)
    with tables_in_root(model):
        prepared, *optimizers = accelerator.prepare(model, *optimizers)
    return prepared, optimizers


def sum_over_processes(accelerator, values: list[float]) -> list[float]:
    """The sum of each value over all processes, which all call this."""
    if accelerator.num_processes == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float32 if accelerator.device.type == "mps" else torch.float64)
    return accelerator.reduce(tensor.to(accelerator.device), reduction="sum").tolist()
