"""Going on from a checkpoint: what must be the same, and how a run takes the state over."""

from __future__ import annotations

from pathlib import Path

import torch

from dlm.training.config import TrainingConfig
from dlm.training.sharding import check_processes, shard_like
from dlm.training.state import checkpoints, load_state, read_state

# What decides the data, the noise and the loss of a step: a resumed run needs the same.
EXACT = (
    "batch_size", "seed", "objective", "estimator", "noise_schedule", "noise_exponent", "diffusion_steps",
    "lowest_rate", "highest_rate", "block_length", "random_length", "packing", "eos_padding", "dropout_prompt",
)  # fmt: skip


def check_same(folder: Path, state: dict, config: TrainingConfig, signature: str) -> None:
    """Errors: settings or data that differ from those the checkpoint was made with."""
    for name in EXACT:
        before = state["config"].get(name, getattr(TrainingConfig, name, None))
        if before != getattr(config, name):
            raise ValueError(
                f"{folder} was made with {name} {before}, now it is {getattr(config, name)}: "
                f"an exact resume needs the same; start a new output folder to change it"
            )
    made_on = state.get("data", "data that an earlier version did not name")
    if made_on != signature:
        raise ValueError(
            f"{folder} was made on {made_on}, the data now gives {signature}: "
            f"an exact resume needs the same data and sequence length"
        )


def load_newest(run) -> None:
    """Have a run take over its newest complete checkpoint; one without starts from the beginning."""
    found = checkpoints(run.output)
    if not found:
        run.report(f"no checkpoint in {run.output} yet: starting from the beginning")
        return
    step, folder = found[-1]
    state = read_state(folder)
    check_same(folder, state, run.config, run.batches.data.signature)
    check_processes(run.accelerator, state["processes"], folder)
    weights = load_state(run.accelerator, folder)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:  # a rate given anew holds from here on; the state keeps the old one
            group["base_lr"] = _base_rate(optimizer, run.config)
    if run.ema is not None:
        if weights is None:
            raise ValueError(
                f"{folder} has no moving average, and ema is {run.config.ema}: go on with --ema 0, as it was made"
            )
        for name, parameter in run.plain.named_parameters():
            if name in run.ema.weights:
                run.ema.weights[name].copy_(shard_like(weights[name], parameter))
    run.step, run.tokens, run.seconds = state["step"], state["tokens"], state["seconds"]
    run.position = state["position"]
    run.batches.go_to(run.position)
    run.last_checkpoint = folder
    run.metrics.forget_after(step)
    run.report(f"resumed from {folder} at step {step}")


def _base_rate(optimizer, config: TrainingConfig) -> float:
    inner = getattr(optimizer, "optimizer", optimizer)
    muon = isinstance(inner, torch.optim.Muon) and config.muon_learning_rate is not None
    return config.muon_learning_rate if muon else config.learning_rate
