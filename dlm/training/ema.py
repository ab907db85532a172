"""The moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dlm.training.sharding import reshard
from dlm.training.zero import held


class EMA:
    """An exponential moving average of what this process holds of the trained parameters, in fp32.

    After update n (0-based) the decay is min(decay, (1 + n) / (10 + n)), so that early steps do not hold the
    starting weights for long.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights: dict[str, Tensor] = {
            name: held(parameter).float().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's weights after optimizer step `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        new = [held(parameter).float() for parameter in model.parameters() if parameter.requires_grad]
        torch._foreach_lerp_(list(self.weights.values()), new, 1.0 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average and the model's weights; a second call puts both back, bit for bit (fp32)."""
        reshard(model)
        for name, parameter in model.named_parameters():
            if name not in self.weights:
                continue
            average, own = self.weights[name], held(parameter)
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """The average stands in the model's weights meanwhile."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)
