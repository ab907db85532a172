"""Blocks that grow while a model is trained: which block length a step has.

LLaDA2 (arXiv:2512.15745) turns an autoregressive model into a diffusion one with blocks of 1, 4, 32, 64, the whole
row, and then 32 again: a block of one is next-token prediction, so the first steps stay near what the model knows.
"""

from __future__ import annotations

from itertools import accumulate

__all__ = ["block_at", "plan", "read_growth"]


def read_growth(text: str) -> list[tuple[int, float]]:
    """`1:0.1,4:0.2` -> [(1, 0.1), (4, 0.2)]: block lengths, each with its share of the steps.

    Raises ValueError for what is no such list, and for shares that leave no step for the last block length.
    """
    stages = []
    for word in text.split(","):
        length, colon, share = word.strip().partition(":")
        try:
            stages.append((int(length), float(share)))
        except ValueError:
            colon = ""
        if not colon or stages[-1][0] < 1 or not 0 < stages[-1][1] < 1:
            raise ValueError(
                f"block_growth is {text!r}, and {word.strip()!r} is no block length with its share of the steps: "
                "write 1:0.1,4:0.2 for blocks of 1 in the first tenth and of 4 in the next fifth"
            )
    if sum(share for _, share in stages) >= 1:
        raise ValueError(f"block_growth is {text!r}: its shares leave no step for block_length; make them less than 1")
    return stages


def block_at(text: str, block_length: int, step: int, steps: int) -> int:
    """The block length of step `step` (0-based) of `steps`: that of its stage in `text`, at the end block_length."""
    for length, end in _ends(text, steps):
        if step < end:
            return length
    return block_length


def plan(text: str, block_length: int, steps: int) -> str:
    """The stages in words, with the steps at which they end."""
    stages = ", ".join(f"of {length} to step {end:,}" for length, end in _ends(text, steps))
    return f"blocks: {stages}, then of {block_length}"


def _ends(text: str, steps: int) -> list[tuple[int, int]]:
    """(block length, the step before which its stage ends) of every stage."""
    stages = read_growth(text)
    ends = accumulate(share for _, share in stages)
    return [(length, round(end * steps)) for (length, _), end in zip(stages, ends, strict=True)]
