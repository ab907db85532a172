"""A loss, a gradient or a state that became NaN or infinite ends a run, which says what is left of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dlm.training import zero

if TYPE_CHECKING:
    from dlm.training.trainer import Run, Step

__all__ = ["NonFiniteLoss", "refuse_loss", "refuse_state"]


class NonFiniteLoss(ValueError):
    """The loss or the gradient became NaN or infinite; the message says where and which checkpoint is good."""


def refuse_loss(step: Step, total: float, norm: float, finite: bool, last: Path | None, precision: str) -> None:
    """Raises NonFiniteLoss where a step's loss, the sum over all processes, is not finite, or a gradient is not.

    norm: of this process's gradient; finite: whether all processes' are (precision fp16 skips such steps by itself).
    """
    if math.isfinite(total) and (finite or precision == "fp16"):
        return
    bad = [int(i) for index, losses in step.losses for i in index[~losses.isfinite().cpu()]]
    of = sorted(set(bad or step.examples))
    shown = ", ".join(map(str, of[:16])) + (f" … ({len(of)} in all)" if len(of) > 16 else "")
    raise NonFiniteLoss(
        f"step {step.number}: the loss is {total} and the gradient norm {norm}; examples {shown}. Last "
        f"good checkpoint: {last or 'none yet'}. Lower learning_rate, raise warmup_steps, or look at those examples"
    )


def refuse_state(run: Run) -> None:
    """Raises NonFiniteLoss where the last update left weights, optimizer state or moving average NaN or infinite."""
    held = [(name, zero.held(parameter)) for name, parameter in run.plain.named_parameters()]
    held += [] if run.ema is None else [(f"average of {name}", part) for name, part in run.ema.weights.items()]
    for optimizer in run.optimizers:
        states = getattr(optimizer, "state", None) or {}
        held += [(f"optimizer's {key}", part) for one in states.values() for key, part in one.items()]
    local = [(name, getattr(part, "_local_tensor", part)) for name, part in held if isinstance(part, torch.Tensor)]
    bad = [name for name, part in local if part.is_floating_point() and not part.isfinite().all()]
    if run.sum([float(bool(bad))])[0]:
        names = ", ".join(bad[:3]) + (f" … ({len(bad)} in all)" if len(bad) > 3 else "")
        raise NonFiniteLoss(
            f"step {run.step}: its update left numbers that are not finite in {names or 'another process'}; nothing "
            f"of it is kept. Last good checkpoint: {run.last_checkpoint or 'none yet'}. Go on from there with --resume "
            f"and a lower learning_rate, or more warmup_steps"
        )
