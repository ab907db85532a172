"""How the slots of a region are shared over blocks, and its tokens over forward passes.

Shapes: B rows, T slots of the canvas.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dlm.models.attention import Visible, full
from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SCHEDULED, SamplingConfig

__all__ = ["SPLITS", "apportion", "chances", "lay_out", "quotas_of", "schedule", "share_out"]


# ---------------------------------------------------------------- which slots form a block


def lay_out(
    canvas: Canvas, block_length: int, visible: Visible, *, revised: bool = False, offsets: Sequence[int] = ()
) -> tuple[Tensor, list[list[int]]]:
    """(B, T) the block of every slot, -1 outside of the region, and the number of places of every row's blocks.

    Left to right, a block is block_length places in order; for a block-causal model, the slots of one of its blocks,
    which count from slot 0, or from `offsets[i]` slots before it. The places are the masked ones, or with `revised` all
    that may be written, since a rule may give them their mask back.
    """
    places = canvas.editable & canvas.valid if revised else canvas.masked
    if visible is full:
        layout = torch.where(places, (places.cumsum(dim=1) - 1) // block_length, -1)
    else:
        ahead = torch.tensor(list(offsets) or [0] * len(places), device=places.device)[:, None]
        cell = (torch.arange(places.shape[1], device=places.device) + ahead) // block_length  # (B, T)
        busy = torch.zeros(places.shape[0], int(cell.max()) + 1, dtype=torch.int64, device=places.device)
        busy = busy.scatter_add(1, cell, places.long()) > 0
        layout = torch.where(busy, busy.cumsum(dim=1) - 1, -1).gather(1, cell).masked_fill(~canvas.valid, -1)
    return layout, [torch.bincount(row[here]).tolist() for row, here in zip(layout, places, strict=True)]


# ---------------------------------------------------------------- how many passes, and how many tokens in each


MOST_PASSES = 100_000  # of one block, where each of them has to be listed


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` passes shared over blocks of these sizes by largest remainder, at least one each, earlier first.

    Raises ValueError where there are fewer passes than blocks.
    """
    if total < len(sizes):
        raise ValueError(
            f"steps is {total} but there are {len(sizes)} blocks, and each needs a pass: "
            f"give {len(sizes)} or more, or a larger block_length"
        )
    ideal = [total * size / sum(sizes) for size in sizes]
    shares = [max(1, int(share)) for share in ideal]
    while sum(shares) < total:
        shares[max(range(len(sizes)), key=lambda i: (ideal[i] - shares[i], -i))] += 1
    while sum(shares) > total:
        large = [i for i in range(len(sizes)) if shares[i] > 1]
        shares[min(large, key=lambda i: (ideal[i] - shares[i], -i))] -= 1
    return shares


def remainder_first(masked: int, passes: int) -> list[int]:
    """masked // passes tokens each and one more in the first passes, as LLaDA splits: 8 over 3 is 3, 3, 2.

    Passes beyond the number of masked tokens would commit nothing, and are not listed.
    """
    passes = min(passes, max(masked, 1))
    base, extra = divmod(masked, passes)
    return [base + (i < extra) for i in range(passes)]


def rounded(masked: int, passes: int) -> list[int]:
    """What is left over the passes left, rounded half to even, as dllm splits: 8 over 3 is 3, 2, 3.

    The share 1 / left is the fp32 difference of a linear schedule, whose error decides at exact halves: 4 over 3 is
    1, 1, 2.
    """
    shares, one = [], torch.ones((), dtype=torch.float32)
    for left in range(passes, 0, -1):
        now, then = (torch.tensor(n / passes, dtype=torch.float32) for n in (left, left - 1))
        share = 1 - ((one - (one - then)) / (one - (one - now))).double()
        shares.append(int((masked * share).round()))
        masked -= shares[-1]
    return shares


def floored(masked: int, passes: int) -> list[int]:
    """What stays masked is the share of the passes that are left, rounded down, as RND1 splits: 8 over 5 is 2, 2, 1, 2,
    1. The product is taken in fp32, as there."""
    left = [
        masked,
        *(int(masked * torch.tensor(now / passes, dtype=torch.float32)) for now in range(passes - 1, 0, -1)),
        0,
    ]
    return [before - after for before, after in pairwise(left)]


def timed(masked: int, passes: int, *, eps: float = 1e-3, start: int = 0) -> list[int]:
    """As Dream splits: time goes from 1 to `eps` in equal steps, a pass from t to s commits the share 1 - s / t of what
    is masked, rounded down, and the last pass all of it. start: passes that were spent before."""
    times, shares = torch.linspace(1, eps, passes + 1, dtype=torch.float32), []
    for i in range(start, passes):
        last = i == passes - 1
        shares.append(masked if last else int(masked * (1 - times[i + 1] / times[i])))
        masked -= shares[-1]
    return shares if masked == 0 else [*shares, masked]


def chances(passes: int, *, eps: float = 1e-3) -> list[float]:
    """The probability with which each pass commits a masked place under Dream's times; the last commits all."""
    times = torch.linspace(1, eps, passes + 1, dtype=torch.float32)
    return [*(1 - times[1:-1] / times[:-2]).tolist(), 1.0]


SPLITS: dict[str, Callable[[int, int], list[int]]] = {
    "remainder_first": remainder_first,
    "rounded": rounded,
    "floored": floored,
    "time": timed,
}


def check_passes(passes: int) -> None:
    """Raises ValueError for more than `MOST_PASSES` of one block, before their list is made."""
    if passes > MOST_PASSES:
        raise ValueError(f"steps asks for {passes:,} passes of one block: give {MOST_PASSES:,} at most")


def share_out(
    masked: int, passes: int, split: str = "remainder_first", *, eps: float = 1e-3, lead: bool = False
) -> list[int]:
    """The quotas of a block over `passes` passes; with `lead` its first pass commits one place. eps: for `time`.

    A quota of zero costs no pass, so it is left out. Raises ValueError for more passes than a list may hold.
    """
    if split != "remainder_first":
        check_passes(passes)
    if split == "time":
        quotas = [1, *timed(masked - 1, passes, eps=eps, start=1)] if lead else timed(masked, passes, eps=eps)
    else:
        rule = SPLITS[split]
        quotas = [1, *rule(masked - 1, max(1, passes - 1))] if lead else rule(masked, passes)
    return [quota for quota in quotas if quota]


def schedule(
    steps: int | None,
    sizes: Sequence[int],
    split: str = "remainder_first",
    *,
    eps: float = 1e-3,
    leads: Sequence[bool] = (),
) -> list[list[int]]:
    """The quotas of every block: `steps` passes in all over blocks of these sizes; None is one token a pass. split, eps
    and leads (one a block): as in `share_out`."""
    passes = apportion(sum(sizes) if steps is None else steps, sizes)
    return [
        share_out(size, n, split, eps=eps, lead=lead)
        for size, n, lead in zip(sizes, passes, leads or [False] * len(sizes), strict=True)
    ]


def quotas_of(
    config: SamplingConfig,
    masked: Sequence[int],
    spans: Sequence[int],
    leads: Sequence[bool],
    places: Sequence[int] = (),
) -> list[list]:
    """What each pass of each block of a row may commit by its settings; [] where the commit rule reads no quota.

    masked: places without a token in each block; spans: the slots of each, given ones too; leads: whether its first
    pass commits its first place alone. For commit `origin` these are probabilities; for `ancestral` they count passes,
    and a block that came without a mask has its share of them for its `places`, which `remask` masks again.
    """
    quotas: list[list] = [[] for _ in masked]
    if config.commit == "ancestral" and config.revise == "remask":
        masked = [count or size for count, size in zip(masked, places, strict=True)]
    if config.commit not in (*SCHEDULED, "ancestral") or not sum(masked):
        return quotas
    busy = [block for block, size in enumerate(masked) if size]
    if config.commit in ("origin", "ancestral"):
        steps = config.steps_per_block
        passes = [steps] * len(busy) if steps else apportion(config.steps or sum(masked), [masked[b] for b in busy])
        check_passes(max(passes))
        per_block = [chances(n, eps=config.time_eps) if config.commit == "origin" else [1] * n for n in passes]
    elif config.steps_per_block is not None:
        per_block = [
            share_out(spans[b], config.steps_per_block, config.split, eps=config.time_eps, lead=leads[b]) for b in busy
        ]
    else:
        sizes, marks = [masked[b] for b in busy], [leads[b] for b in busy]
        per_block = schedule(config.steps, sizes, config.split, eps=config.time_eps, leads=marks)
    for block, shares in zip(busy, per_block, strict=True):
        quotas[block] = shares
    return quotas
