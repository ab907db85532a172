"""How the slots of a region are shared over blocks, and its tokens over forward passes.

Shapes: B rows, T slots of the canvas.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dlm.models.attention import Visible, full
from dlm.sampling.canvas import Canvas

__all__ = ["SPLITS", "apportion", "lay_out", "schedule"]


# ---------------------------------------------------------------- which slots form a block


def lay_out(
    canvas: Canvas, block_length: int, visible: Visible, *, revised: bool = False
) -> tuple[Tensor, list[list[int]]]:
    """(B, T) the block of every slot, -1 outside of the region, and the number of places of every row's blocks.

    Left to right, a block is block_length places in order; for a block-causal model, the slots of one of its blocks,
    which count from slot 0. The places are the masked ones, or with `revised` all that may be written, since a rule
    may give them their mask back.
    """
    places = canvas.editable & canvas.valid if revised else canvas.masked
    if visible is full:
        layout = torch.where(places, (places.cumsum(dim=1) - 1) // block_length, -1)
    else:
        cell = torch.arange(places.shape[1], device=places.device) // block_length
        busy = torch.zeros(places.shape[0], int(cell[-1]) + 1, dtype=torch.int64, device=places.device)
        busy = busy.index_add(1, cell, places.long()) > 0
        layout = torch.where(busy, busy.cumsum(dim=1) - 1, -1)[:, cell].masked_fill(~canvas.valid, -1)
    return layout, [torch.bincount(row[here]).tolist() for row, here in zip(layout, places, strict=True)]


# ---------------------------------------------------------------- how many passes, and how many tokens in each


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` passes shared over blocks of these sizes by largest remainder, at least one each, earlier first.

    Raises ValueError where there are fewer passes than blocks.
    """
    if total < len(sizes):
        raise ValueError(
            f"steps is {total} but there are {len(sizes)} blocks, and each needs a pass: "
            f"give steps >= {len(sizes)}, or a larger block_length"
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
    """masked // passes tokens each and one more in the first passes, as LLaDA splits: 8 over 3 is 3, 3, 2."""
    base, extra = divmod(masked, passes)
    return [base + (i < extra) for i in range(passes)]


def rounded(masked: int, passes: int) -> list[int]:
    """What is left over the passes left, rounded half to even, as dllm splits: 8 over 3 is 3, 2, 3."""
    shares = []
    for left in range(passes, 0, -1):
        shares.append(round(masked / left))
        masked -= shares[-1]
    return shares


SPLITS: dict[str, Callable[[int, int], list[int]]] = {"remainder_first": remainder_first, "rounded": rounded}


def schedule(steps: int | None, sizes: Sequence[int], split: str = "remainder_first") -> list[list[int]]:
    """The quotas of every block: `steps` passes in all over blocks of these sizes; None is one token a pass.

    A quota of zero costs no pass, so it is left out.
    """
    passes = apportion(sum(sizes) if steps is None else steps, sizes)
    return [[quota for quota in SPLITS[split](size, n) if quota] for size, n in zip(sizes, passes, strict=True)]
