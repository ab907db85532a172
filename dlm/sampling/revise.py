"""Which committed tokens a pass changes or masks again: the third rule beside propose and commit.

Shapes: R rows of one forward pass, M places asked about.

A rule sees the places of the block that are being denoised: its slots are computed again at every pass until the block
is done, and the pass that opens a later block computes this one with what it became, so that no cached key of a
revised place is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dlm.sampling.config import SamplingConfig
    from dlm.sampling.row import Row

__all__ = ["REVISIONS", "Revision", "Slate"]


@dataclass(frozen=True)
class Slate:
    """The places of a pass, (R, M) each. held: the token before the pass; token: the one proposed; chosen: which are
    committed; revisable: which held a token that the loop may change; best, certain: the most probable token and its
    probability. again: which places a draw masks again; shadow: the probability of what is held, seen from everything
    but itself; None where the rule reads neither. config and rows: whose pass it is."""

    held: Tensor
    token: Tensor
    chosen: Tensor
    revisable: Tensor
    best: Tensor
    certain: Tensor
    again: Tensor | None
    shadow: Tensor | None
    mask_id: int
    config: SamplingConfig
    rows: Sequence[Row]


@dataclass(frozen=True)
class Revision:
    """A row of the table: the rule, Slate -> (token, revised) (R, M) each, where token is what is written at the places
    chosen or revised. settles: whether a block goes on after its last mask, until a pass changes nothing. compares:
    whether it reads best and certain."""

    rule: Callable[[Slate], tuple[Tensor, Tensor]]
    settles: bool = False
    compares: bool = False


def edit(slate: Slate) -> tuple[Tensor, Tensor]:
    """A committed place takes the most probable token where it is another and its probability is above
    `edit_threshold` (LLaDA2.1, arXiv:2602.08676).

    LLaDA2.1 was trained to correct what it sees. A model that was trained on masks alone repeats it: with `edit_shadow`
    the prediction is that of a mask at the place (WINO's shadow, arXiv:2507.18578).
    """
    revised = slate.revisable & (slate.best != slate.held) & (slate.certain > slate.config.edit_threshold)
    return torch.where(revised, slate.best, slate.token), revised


def remask(slate: Slate) -> tuple[Tensor, Tensor]:
    """Committed places are masked again by chance (ReMDM, arXiv:2503.00307; `remask`)."""
    return torch.where(slate.again, slate.mask_id, slate.token), slate.again


def verify(slate: Slate) -> tuple[Tensor, Tensor]:
    """A token that everything else makes less probable than `verify_threshold` is masked again: the least probable
    first, and always fewer than the pass committed (WINO, arXiv:2507.18578).

    In a block that came without a mask all its tokens count as committed by the first pass, so that a text written
    elsewhere is repaired.
    """
    doubted = slate.revisable & (slate.shadow < slate.config.verify_threshold)
    order = slate.shadow.masked_fill(~doubted, torch.inf).argsort(dim=1, stable=True)
    rank = torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    filled = torch.tensor([[row.turn == 0 and row.left == 0] for row in slate.rows], device=rank.device)
    drafted = torch.where(filled, slate.revisable, slate.chosen).sum(dim=1, keepdim=True)
    again = doubted & (rank < drafted - 1)
    return torch.where(again, slate.mask_id, slate.token), again


REVISIONS: dict[str, Revision | None] = {
    "none": None,
    "edit": Revision(edit, settles=True, compares=True),
    "remask": Revision(remask),
    "verify": Revision(verify),
}
