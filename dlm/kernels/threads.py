"""How many threads the passes of a small model take, measured when it is opened: on cores that others use too, one is
often quicker than all.

Shapes: Q slots of a pass.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from dlm.kernels.packed import Packed

__all__ = ["settle_threads", "thread_counts"]

SMALL = 100_000_000  # parameters up to which a pass is short enough to try, and threads wait for each other
SLOTS = (8, 64)  # of the passes that are timed: a block, and a prompt
BETTER = 0.9  # of the time of torch's own number that another must stay below
SLOW = 0.25  # seconds of passes after which a number is given up


def thread_counts(most: int) -> list[int]:
    """The numbers that are tried, torch's own first: all, four, one."""
    return list(dict.fromkeys((most, min(4, most), 1)))


def settle_threads(predictor, clock: Callable[[], float] = time.perf_counter) -> int:
    """Sets torch's threads to the number whose passes are quickest, and returns it.

    torch's own number stays where OMP_NUM_THREADS says it, for other predictors than a small `Packed` in float32 on a
    CPU, and where another number would change a bit of the logits.
    """
    most = torch.get_num_threads()
    small = isinstance(predictor, Packed) and predictor.exact_rows
    small = small and predictor.embedding.dtype == torch.float32 and _numbers(predictor) <= SMALL
    if most == 1 or "OMP_NUM_THREADS" in os.environ or not small:
        return most
    best = kept = None
    chosen = most
    for count in thread_counts(most):
        torch.set_num_threads(count)
        logits, seconds = _timed(predictor, clock)
        if best is None:
            best, kept = BETTER * seconds, logits
        elif seconds < best and all(map(torch.equal, logits, kept)):
            best, chosen = seconds, count
    torch.set_num_threads(chosen)
    return chosen


def _numbers(predictor: Packed) -> int:
    """Numbers that a pass reads of the weights."""
    linears = [linear for layer in predictor.layers for linear in vars(layer).values() if hasattr(linear, "weight")]
    return sum(linear.weight.numel() for linear in [*linears, predictor.head])


def _timed(predictor: Packed, clock: Callable[[], float]) -> tuple[list[torch.Tensor], float]:
    """Logits of a pass of each of `SLOTS`, and the least seconds of both in three runs; the first wakes threads."""
    vocabulary, least, begin = len(predictor.embedding), float("inf"), clock()
    slots = [min(count, predictor.limit) for count in SLOTS]
    passes = [(torch.arange(count) % vocabulary)[None] for count in slots]
    for _ in range(3):
        start = clock()
        logits = [predictor(tokens) for tokens in passes]
        least = min(least, clock() - start)
        if clock() - begin > SLOW:
            break
    return logits, least
