"""Which slots a token may look at, written once and read by every attention kernel.

Shapes: B batch, Q queried tokens, K keys (slots of the canvas), H heads, D head size.

A visibility rule answers `rule(b, q, k) -> bool` for row `b`, query slot `q` and key slot `k`, three integer
tensors that broadcast. It is FlexAttention's mask_mod without the head, so the same function becomes a BlockMask on
a GPU and a dense mask for SDPA on a CPU.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from dlm.models.kv_cache import Beside

__all__ = [
    "Visible",
    "attention_mask",
    "block_causal",
    "block_causal_from",
    "block_diffusion",
    "both",
    "causal",
    "document",
    "full",
    "grid_views",
    "usable_kernel",
    "visible_of",
]

Visible = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Everything sees everything: the mask predictor of LLaDA."""
    return (q >= 0) & (k >= 0)


def causal(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A slot sees itself and what is before it: the autoregressive twin."""
    return k <= q


@lru_cache(maxsize=256)  # a server is asked for any length of blocks
def block_causal(block_length: int) -> Visible:
    """Slots see their own block of `block_length` slots, counted from slot 0, and every earlier one (BD3-LM)."""
    if block_length < 1:
        raise ValueError(f"block_length is {block_length}: a block holds at least one token; give 1 or more")

    def rule(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k // block_length <= q // block_length

    rule.block_length, rule.offsets = block_length, None  # for kernels that need no mask
    return rule


@lru_cache(maxsize=64)
def block_causal_from(block_length: int, offsets: tuple[int, ...]) -> Visible:
    """`block_causal` in which the blocks of row b begin `offsets[b]` slots before slot 0: the first may be short."""

    def rule(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ahead = torch.tensor(offsets, device=q.device)[b]
        return (k + ahead) // block_length <= (q + ahead) // block_length

    rule.block_length, rule.offsets = block_length, offsets
    return rule


def visible_of(config) -> Visible:
    """The rule that a checkpoint was trained with, by its configuration's `attention` and `block_length`."""
    if config.attention == "block_causal":
        return block_causal(config.block_length)
    return causal if config.attention == "causal" else full


def document(segments: Tensor) -> Visible:
    """Slots see only their own document; `segments` (B, T) numbers the documents packed into each row."""

    def rule(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return segments[b, q] == segments[b, k]

    return rule


def block_diffusion(segments: Tensor, positions: Tensor, block_length: int) -> Visible:
    """Slots of [x_t ; x_0], 2T of them for rows of T (BD3-LM, arXiv:2503.09573).

    segments, positions (B, T): each token's document and its place in it, from which blocks are counted. x_t sees its
    own block in x_t and earlier blocks in x_0; x_0 sees the blocks up to its own in x_0. What x_0 sees is what
    `block_causal` shows at generation, so that its keys are those of a cache.
    """
    blocks, width = positions // block_length, segments.shape[1]

    def rule(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        clean_q, clean_k = q >= width, k >= width
        slot_q, slot_k = q % width, k % width
        block_q, block_k = blocks[b, slot_q], blocks[b, slot_k]
        noisy = (block_k == block_q) & ~clean_k & ~clean_q
        clean = clean_k & ((block_k < block_q) | ((block_k == block_q) & clean_q))
        return (segments[b, slot_q] == segments[b, slot_k]) & (noisy | clean)

    return rule


def both(first: Visible, second: Visible) -> Visible:
    """What both rules allow."""

    def rule(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return first(b, q, k) & second(b, q, k)

    return rule


GRID_VIEWS = {  # name: (row, column, cells on a box's side) -> the unit of a cell; cells of one unit see each other
    "row": lambda row, column, side: row,
    "column": lambda row, column, side: column,
    "box": lambda row, column, side: row // side * (side + 1) + (column + side - 1) // side,
    "all": lambda row, column, side: torch.zeros_like(row),
}


def grid_views(positions: Tensor, cache, width: int, heads: int) -> Tensor:
    """Which slots of a grid each head sees, (B or 1, H, Q, K) bool: the views of `GRID_VIEWS` in turn.

    positions (B or 1, Q): of the queries. The keys are the queries, or the slots of `cache`, with the queries behind
    them where it is a `kv_cache.Beside`. width: tokens of a row, the first of which is its label and stands in a column
    and a box column of its own.
    """
    slots = positions
    if cache is not None:
        stored = cache.length - (cache.count if isinstance(cache, Beside) else 0)
        slots = torch.arange(stored, device=positions.device)[None]
        if isinstance(cache, Beside):
            slots = torch.cat([slots.expand(len(positions), -1), positions], dim=1)
    side = math.isqrt(width - 1)
    views = []
    for unit in GRID_VIEWS.values():
        mine, theirs = (unit(where // width, where % width, side) for where in (positions, slots))
        views.append(mine[:, :, None] == theirs[:, None, :])
    return torch.stack([views[head % len(views)] for head in range(heads)], dim=1)


def usable_kernel(
    implementation: str | None, visible: Visible, valid: Tensor | None, device: torch.device, by_head: bool = False
) -> str:
    """The kernel for this call: `implementation`, or SDPA (the same result) where that one cannot do it.

    flash-attn takes no general mask, and FlexAttention on a CPU needs a C++ compiler at run time. by_head: the heads
    have different masks, which SDPA and the reference take.
    """
    implementation = implementation or "eager"
    if by_head:
        return implementation if implementation == "eager" else "sdpa"
    hidden = visible is not full or valid is not None
    if implementation.startswith("flash_attention") and hidden:
        return "sdpa"
    return "sdpa" if implementation == "flex_attention" and device.type == "cpu" else implementation


def attention_mask(
    implementation: str,
    visible: Visible,
    valid: Tensor | None,
    slots: Tensor | None,
    shape: tuple[int, int, int],
    device: torch.device,
):
    """The mask that a kernel wants for a rule.

    valid (B, K) or None: which keys exist. slots (B, Q) or None: the slot of each query; None means query i stands
    in slot i. shape is (B, Q, K). Returns None (nothing is hidden), a BlockMask for flex_attention, or a bool
    (B or 1, 1, Q, K) that is True where a key may be seen.
    """
    batch, queries, keys = shape
    if visible is full and valid is None:
        return None
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def mask_mod(b, h, q, k):
            seen = visible(b, q if slots is None else slots[b, q], k)
            return seen if valid is None else seen & valid[b, k]

        return create_block_mask(mask_mod, batch, None, queries, keys, device=device)
    if visible is full:
        return valid[:, None, None, :].expand(batch, 1, queries, keys)
    rows = torch.arange(batch, device=device)[:, None, None]
    if slots is None:
        slots = torch.arange(queries, device=device)[None]
    seen = visible(rows, slots[:, :, None], torch.arange(keys, device=device)[None, None, :])
    if valid is not None:
        seen = seen & valid[:, None, :]
    return seen[:, None]
