"""What a run of the loop could have decided otherwise: commits within rounding of a tie, and the error of caches.

Shapes: R rows of a pass, M places asked about, V vocabulary.

Rounding: two logits of a place are taken as level where they differ by less than ROUNDING units in the last place of
the place's largest logit, which is what other kernels, batches or processors change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlm.sampling.step import Request, branches, compute, guided

if TYPE_CHECKING:
    from dlm.models.attention import Visible
    from dlm.sampling.rows import Batch, Row

__all__ = ["Telemetry"]

ROUNDING = 4  # units in the last place


class Telemetry:
    """Watches the passes of a run; what it computes changes nothing.

    every: of the passes that read a cache one in so many is computed again without it.
    """

    def __init__(self, every: int = 4):
        self.every = every
        self.commits = self.tied = self.cached = 0
        self.places = self.same = 0
        self.squares = self.nats = 0.0

    def facts(self) -> dict[str, float | int | None]:
        """ties: share of the commits within rounding of a tie (their token, or that they were chosen). cache_rms: root
        mean square of cached logits minus fresh ones, each with mean 0 over the vocabulary; cache_nats: mean KL
        divergence of the cached prediction from the fresh one; cache_same: share of places with the same most probable
        token; cache_places: how many were compared. None where there was nothing to compare."""
        shared = self.places or None
        return {
            "ties": self.tied / self.commits if self.commits else None,
            "cache_rms": shared and (self.squares / shared) ** 0.5,
            "cache_nats": shared and self.nats / shared,
            "cache_same": shared and self.same / shared,
            "cache_places": self.places,
        }

    @torch.inference_mode()
    def note(
        self,
        batch: Batch,
        rows: Sequence[Row],
        request: Request,
        visible: Visible,
        logits: Tensor,
        confidence: Tensor,
        chosen: Tensor,
        choose: Callable[[Tensor], Tensor],
        allowed: Tensor | None,
    ) -> None:
        """A pass of these rows: logits (R, M, V), confidence and chosen (R, M); choose: confidence -> what is chosen;
        allowed (R, M, V): which tokens may be proposed, None for all."""
        config = rows[0].config
        seen = guided(*branches(logits, config), config)
        level = ROUNDING * _unit(batch.predictor, logits) * seen.abs().nan_to_num(0.0, 0.0, 0.0).amax(dim=-1)
        self._count_ties(batch, config, seen, confidence, chosen, choose, allowed, level)
        if request.positions is not None and rows[0].method.cached:
            self.cached += 1
            if self.cached % self.every == 1 or self.every == 1:
                self._compare(batch, rows, request, visible, seen)

    def _count_ties(self, batch, config, seen, confidence, chosen, choose, allowed, level) -> None:
        tied = torch.zeros_like(chosen)
        if config.temperature == 0:  # above 0 a token is drawn
            open_logits = seen.clone() if allowed is None else seen.masked_fill(~allowed, -torch.inf)
            open_logits[..., batch.canvas.mask_id] = -torch.inf
            if batch.vocab_size is not None:
                open_logits[..., batch.vocab_size :] = -torch.inf
            first, second = open_logits.topk(2, dim=-1).values.unbind(-1)
            tied |= first - second < level
        if config.commit not in ("ancestral", "origin") and config.ordering != "random":  # whose places are drawn
            moved = level * (confidence.abs() if config.ordering == "probability" else 1.0)
            tied |= ~choose(torch.where(chosen, confidence - moved, confidence + moved))
        self.commits += int(chosen.sum())
        self.tied += int((chosen & tied).sum())

    def _compare(self, batch: Batch, rows: Sequence[Row], request: Request, visible: Visible, seen: Tensor) -> None:
        """Adds a cached pass's difference from the same pass without the cache."""
        canvas = batch.canvas if request.rows is None else batch.canvas.rows(request.rows)
        whole = Request(None, None, request.slots, request.counts, request.eligible, request.valid)
        shift = bool(getattr(getattr(batch.predictor, "config", None), "shift_logits", None))
        again = rows[0].branches == 2
        logits = compute(batch.predictor, canvas, whole, guided=again, visible=visible, cache=None, shifted=shift)
        config = rows[0].config
        fresh = guided(*branches(logits, config), config)[request.eligible]
        cached = seen[request.eligible]
        away = (cached - cached.mean(-1, keepdim=True)) - (fresh - fresh.mean(-1, keepdim=True))
        log_p, log_q = fresh.log_softmax(-1), cached.log_softmax(-1)
        self.places += len(fresh)
        self.squares += float(away.double().pow(2).mean(-1).sum())
        self.nats += float((log_p.exp() * (log_p - log_q)).sum().clamp_min(0))
        self.same += int((cached.argmax(-1) == fresh.argmax(-1)).sum())


def _unit(predictor, logits: Tensor) -> float:
    """The relative rounding of the coarser of the logits' type and the model's."""
    types = [logits.dtype, getattr(predictor, "dtype", logits.dtype)]
    return max(torch.finfo(kind).eps for kind in types if isinstance(kind, torch.dtype) and kind.is_floating_point)
