"""What moves the weights: optimizers with decay groups, the learning-rate schedule, the moving average."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from dlm.training.muon import Muon

# ------------------------------------------------------------------------------------------------------- schedule


def wsd(progress: float, decay_fraction: float) -> float:
    """Warm-up, stable, decay: 1, then linearly to 0 over the last `decay_fraction` (arXiv 2404.06395)."""
    return 1.0 if progress <= 1.0 - decay_fraction else (1.0 - progress) / decay_fraction


def cosine(progress: float, decay_fraction: float) -> float:
    """Half a cosine from 1 to 0; `decay_fraction` is not used."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(progress: float, decay_fraction: float) -> float:
    """Always 1."""
    return 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {"wsd": wsd, "cosine": cosine, "constant": constant}


def schedule_factor(
    name: str, step: int, max_steps: int, *, warmup_steps: int, decay_fraction: float, final_factor: float,
    time_share: float = 0.0,
) -> float:  # fmt: skip
    """Factor on the learning rate in step `step` (0-based): linear warm-up, then final + (1 - final) * shape.

    Step `warmup_steps` has factor 1 and step `max_steps` (the one after the last) has `final_factor`. It depends on
    the step alone, so that a resumed run follows the same curve, but for time_share: the share of the run's time that
    is over, where time limits it, counts where it is further than the steps.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = max(time_share, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return final_factor + (1.0 - final_factor) * SCHEDULES[name](min(progress, 1.0), decay_fraction)


# ----------------------------------------------------------------------------------------------------- optimizers


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters in three groups: `matrices` (hidden, 2-D), `head` (output, untied), `plain` (no decay).

    `plain` holds norms, biases and embeddings, and the output projection where it is tied to an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = id(output.weight) if output is not None else None
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "head": [], "plain": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            groups["plain"].append(parameter)
        elif id(parameter) == head:
            groups["head"].append(parameter)
        else:
            groups["matrices"].append(parameter)
    return groups


def build_optimizers(
    model: nn.Module,
    optimizer: str,
    *,
    learning_rate: float,
    muon_learning_rate: float | None,
    weight_decay: float,
    betas: tuple[float, float],
    momentum: float,
) -> list[torch.optim.Optimizer]:
    """AdamW for everything (`adamw`), or Muon for the hidden matrices and AdamW for the rest (`muon`), among them the
    experts of a mixture, which share one tensor of three dimensions.

    Muon's update is scaled to AdamW's size (arXiv 2502.16982), so one learning rate can serve both;
    `muon_learning_rate` sets its own. Each group remembers its rate as `base_lr` for the schedule.
    """
    groups = parameter_groups(model)
    muon = optimizer == "muon"
    matrices = [one for one in groups["matrices"] if muon and one.ndim == 2]
    decayed = groups["head"] + [one for one in groups["matrices"] if not muon or one.ndim > 2]
    sets = [(decayed, weight_decay), (groups["plain"], 0.0)]
    adam_groups = [{"params": params, "weight_decay": decay} for params, decay in sets if params]
    built: list[torch.optim.Optimizer] = []
    if adam_groups:
        fused = all(p.device.type in ("cpu", "cuda") for g in adam_groups for p in g["params"])
        built.append(torch.optim.AdamW(adam_groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused))
    if matrices:
        rate = learning_rate if muon_learning_rate is None else muon_learning_rate
        built.append(
            Muon(
                matrices,
                lr=rate,
                weight_decay=weight_decay,
                momentum=momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for one in built:
        for group in one.param_groups:
            group["base_lr"] = group["lr"]
    return built


def set_learning_rates(optimizers, factor: float) -> None:
    """Set every group's rate to `factor` times its base rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
