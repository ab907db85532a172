"""Objectives that learn from a model's own texts, so that several tokens a pass stay good.

Shapes: B rows, T slots, L target tokens of an example, N scored places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dlm.objectives.losses import BlockDiffusion, Loss, block_diffusion, masked_diffusion
from dlm.objectives.noise import Noise
from dlm.utils.random import ORDER, example_generator


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

    passes: of each written text, the examples from number 0 on, the pass at which each token was committed, (L,); the
    entropy of these examples alone counts. None: of all. ordered: the share of them whose masked places are those that
    were committed last, as many as the noise masks in each block: the states that decoding comes by.
    """

    def __init__(self, certainty: float, passes: Sequence[np.ndarray] | None = None, ordered: float = 0.0):
        if not certainty >= 0:
            raise ValueError(f"certainty is {certainty}: it weighs an entropy, 0 or more")
        if not 0 <= ordered <= 1:
            raise ValueError(f"ordered is {ordered}: it is a share, from 0 to 1")
        self.certainty, self.passes, self.ordered = certainty, passes, ordered
        self.identity = f"certainty {certainty}, ordered {ordered}"

    def noise(self, batch, settings, seed, strata=None) -> Noise:
        """As the objectives below it; in `ordered` of the written examples what was committed last is masked."""
        noise = super().noise(batch, settings, seed, strata)
        if not self.ordered or not self.passes:
            return noise
        masked, weight = noise.masked.clone(), noise.weight.clone()
        units = batch.segments if noise.units is None else noise.units
        for number, key in enumerate(zip(batch.epoch.tolist(), batch.index.tolist(), strict=True)):
            if key[1] >= len(self.passes) or example_generator(seed, *key, ORDER).random() >= self.ordered:
                continue
            places = (batch.segments == number) & batch.target  # (B, T)
            when = torch.from_numpy(self.passes[key[1]])[batch.positions[places]]
            masked[places], weight[places] = latest(masked[places], units[places], when, weight[places])
        return replace(noise, masked=masked, weight=weight)

    def loss(self, model, batch, noise, mask_id, chunk=None) -> Loss:
        """As the objectives below it; all logits are held at a time, whatever `chunk` says."""
        base = masked_diffusion if noise.block_length is None else block_diffusion
        return base(model, batch, noise, mask_id, extra=partial(self._extra, self._written(batch, noise)))

    def _written(self, batch, noise: Noise) -> Tensor | None:
        """(N,) bool: which scored places are of written texts; None: all."""
        if self.passes is None:
            return None
        return (batch.index < len(self.passes))[batch.segments[noise.scored]]

    def _extra(self, written: Tensor | None, logits: Tensor, truth: Tensor) -> Tensor:
        if written is not None:
            logits, truth = logits[written], truth[written]
        return self.certainty * entropy_where_right(logits, truth)


def latest(masked: Tensor, units: Tensor, when: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Masks as many places of each unit as are masked, but those with the largest `when`; ties from the right.

    masked, units, when, weight (L,): of the target places of one example. Returns masked and weight, (L,).
    """
    chosen, factor = torch.zeros_like(masked), torch.zeros_like(weight)
    for unit in units.unique().tolist():
        here = (units == unit).nonzero()[:, 0]
        before = here[masked[here]]
        if not len(before):
            continue
        last = here.flip(0)[when[here].flip(0).sort(descending=True, stable=True).indices[: len(before)]]
        chosen[last], factor[last] = True, weight[before].max()
    return chosen, factor
