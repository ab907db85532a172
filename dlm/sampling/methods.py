"""Keys and values of the canvas, and the planners that say which slots to compute again at a pass.

Shapes: B rows, T slots, Q slots computed now, H key heads, D head size.

A cache is storage and nothing else: what is computed is scattered to its slots, what is not keeps its old value.
Which decoding method it serves is decided by the planner alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm.models.attention import Visible, block_causal, full

__all__ = ["METHODS", "Method", "methods_for", "visibility"]


# ---------------------------------------------------------------- planners: (span, signals) -> slots


@dataclass(frozen=True)
class Signals:
    """What a planner may know beside the span: the blocks that were done since their slots were computed (the block
    before, all False at a row's first pass), and vicinity's window."""

    before: Tensor
    window: int


Planner = Callable[[Tensor, Signals], Tensor | None]


def _hull(span: Tensor, left: int = 0, right: int = 0) -> Tensor:
    """bool (B, T): from `left` slots before a row's first slot of `span` to `right` after its last."""
    slots = torch.arange(span.shape[1], device=span.device)
    first = torch.where(span, slots, span.shape[1]).amin(dim=1, keepdim=True)
    last = torch.where(span, slots, -1).amax(dim=1, keepdim=True)
    return (slots >= first - left) & (slots <= last + right)


def everything(span: Tensor, signals: Signals) -> Tensor | None:
    """All slots."""
    return None


def the_block(span: Tensor, signals: Signals) -> Tensor | None:
    """The block alone."""
    return span


def to_the_end(span: Tensor, signals: Signals) -> Tensor | None:
    """From the block's start to the end."""
    return _hull(span, right=span.shape[1])


def the_vicinity(span: Tensor, signals: Signals) -> Tensor | None:
    """The block and `window` slots either side."""
    return _hull(span, left=signals.window, right=signals.window)


def the_open_blocks(span: Tensor, signals: Signals) -> Tensor | None:
    """The blocks that are written and what is given between them."""
    return _hull(span)


def since_the_block_before(span: Tensor, signals: Signals) -> Tensor | None:
    """This block and the one before, whose stored keys still saw masks; for a first block, all before it."""
    started = signals.before.any(dim=1, keepdim=True)
    return torch.where(started, _hull(span | signals.before), _hull(span, left=span.shape[1]))


@dataclass(frozen=True)
class Method:
    """A row of the table of decoding methods: the order, what a block's first pass computes, what later ones do."""

    first: Planner
    later: Planner
    coarse: bool = False  # the block is chosen by confidence anywhere in the region, not left to right
    block_causal: bool = False  # exact for block-causal models and for those alone
    several: bool = False  # the next block opens when the one before is half done, and both are written

    @property
    def cached(self) -> bool:
        return self.later is not everything


METHODS: dict[str, Method] = {
    "none": Method(everything, everything),
    "prefix": Method(everything, to_the_end),  # Fast-dLLM, arXiv:2505.22618
    "dual": Method(everything, the_block),  # Fast-dLLM, arXiv:2505.22618
    "vicinity": Method(everything, the_vicinity),
    "c2f": Method(everything, the_block, coarse=True),
    "block_causal": Method(since_the_block_before, the_block, block_causal=True),  # BD3-LM, arXiv:2503.09573
    # Several blocks at once: D2F, arXiv:2508.09192; d3LLM, arXiv:2601.07568. The first has no cache and suits every
    # model; the second keeps the keys of finished blocks, which is exact for block-causal models.
    "pipeline": Method(everything, everything, several=True),
    "pipeline_causal": Method(since_the_block_before, the_open_blocks, block_causal=True, several=True),
}
DEFAULT_BLOCK_LENGTH = 32


def methods_for(settings) -> list[str]:
    """The methods that suit a checkpoint, by its configuration (None for a bare callable: all of them)."""
    if settings is None:
        return list(METHODS)
    free = getattr(settings, "block_length", None) is None and getattr(settings, "block_lengths", "own") == "any"
    if getattr(settings, "full_attention", False) or free:
        return list(METHODS)
    if getattr(settings, "block_length", None) is None:
        return [name for name, method in METHODS.items() if not method.block_causal]
    return [name for name, method in METHODS.items() if method.block_causal or not method.cached]


def visibility(model, name: str, block_length: int | None) -> tuple[int, Visible]:
    """The block length and the visibility rule in force: the checkpoint's where it is block-causal, the method's where
    it was trained under both.

    Raises ValueError where the method does not suit the model, or the block length is not what it was trained with.
    """
    settings = getattr(model, "config", None)
    if getattr(settings, "objective", None) == "autoregressive":
        raise ValueError(
            "this model predicts the next token, and cannot fill in masks: give a diffusion model "
            "(`dlm eval generative` writes text with either)"
        )
    trained = getattr(settings, "block_length", None)
    if name not in methods_for(settings):
        kind, other = ("full-attention", "block-causal") if trained else ("block-causal", "full-attention")
        raise ValueError(
            f"method {name!r} is for {kind} models, and this is a {other} one"
            f"{f' (blocks of {trained})' if trained else ''}: use {', '.join(methods_for(settings))}"
        )
    if trained is not None and (METHODS[name].block_causal or not getattr(settings, "full_attention", False)):
        length, kind = block_length or trained, getattr(settings, "block_lengths", "own")
        if length != trained and (kind == "own" or (kind == "divisors" and trained % length)):
            divisors = " or give a number that divides it" if kind == "divisors" else ""
            raise ValueError(
                f"block_length is {length}, but this model was trained with blocks of {trained}: leave it out{divisors}"
            )
        return length, block_causal(length)
    length = block_length or DEFAULT_BLOCK_LENGTH
    return length, block_causal(length) if METHODS[name].block_causal else full
