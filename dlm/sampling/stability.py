"""How much the prediction at a place changed over the last passes, for commit rule `stable`.

Shapes: R rows of a pass, M places asked about, V vocabulary, N passes looked back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dlm.sampling.config import SamplingConfig
    from dlm.sampling.row import Row

__all__ = ["Past", "stable_places"]


@dataclass(frozen=True)
class Past:
    """What a row's last pass predicted. slots (M,), ascending; log_p (M, V); changes (M, N): the divergences of its
    last passes, the newest first, infinite where there was no pass."""

    slots: Tensor
    log_p: Tensor
    changes: Tensor


def stable_places(
    rows: Sequence[Row], slots: Tensor, eligible: Tensor, log_p: Tensor, config: SamplingConfig
) -> Tensor:
    """bool (R, M): the places where each of the last `kl_passes` divergences is below `kl_bound`.

    A divergence is KL(now || the pass before), in nats (KLASS, arXiv:2511.05664, alg. 1). log_p (R, M, V). Every
    row keeps what this pass predicted at its eligible places.
    """
    stable = torch.zeros_like(eligible)
    for i, row in enumerate(rows):
        here = eligible[i].nonzero()[:, 0]
        now, mine = log_p[i, here], slots[i, here]
        changes = now.new_full((len(here), config.kl_passes), torch.inf)
        if row.past is not None and len(row.past.slots) and len(here):
            at = torch.searchsorted(row.past.slots, mine).clamp_max(len(row.past.slots) - 1)
            known = row.past.slots[at] == mine
            before = row.past.log_p[at]
            change = (now.exp() * (now - before)).nan_to_num(0.0).sum(dim=-1)  # 0 log 0 is 0
            fresh = torch.cat([change[:, None], row.past.changes[at, :-1]], dim=1)
            changes = torch.where(known[:, None], fresh, changes)
        stable[i, here] = (changes < config.kl_bound).all(dim=-1)
        row.past = Past(mine, now, changes)
    return stable
