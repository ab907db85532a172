"""Objectives that learn from a model's own texts, so that several tokens a pass stay good.

Shapes: N scored places, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlm.objectives.losses import BlockDiffusion, Loss, block_diffusion, masked_diffusion


def entropy_where_right(logits: Tensor, truth: Tensor) -> Tensor:
    """() the sum over the places of logits (N, V) whose argmax is the true token of the prediction's entropy, in nats.

    Where the argmax is wrong nothing is asked for: certainty there would make errors certain.
    """
    log_p = logits.float().log_softmax(dim=-1)
    right = logits.argmax(dim=-1) == truth
    return (torch.special.entr(log_p.exp()).sum(dim=-1) * right).sum()


class CertaintyForcing(BlockDiffusion):
    """The bound of either visibility plus `certainty` times the entropy of the predictions whose argmax is right
    (dParallel, arXiv:2509.26488, eqs. 6 to 8), on texts that a teacher or the model itself wrote.

    The paper takes the mean entropy over the right places, at temperature 0.5, of one partly masked block; here it is
    the sum, at temperature 1, over all masked places.

    Where a prediction is right already, its probability goes up until a threshold commits it. The logged loss holds the
    second term, so it is no bound.
    """

    def __init__(self, certainty: float):
        if not certainty >= 0:
            raise ValueError(f"certainty is {certainty}: it weighs an entropy, 0 or more")
        self.certainty, self.identity = certainty, f"certainty {certainty}"

    def loss(self, model, batch, noise, mask_id, chunk=None) -> Loss:
        """As the objectives below it; all logits are held at a time, whatever `chunk` says."""
        base = masked_diffusion if noise.block_length is None else block_diffusion
        return base(model, batch, noise, mask_id, extra=self._extra)

    def _extra(self, logits: Tensor, truth: Tensor) -> Tensor:
        return self.certainty * entropy_where_right(logits, truth)
