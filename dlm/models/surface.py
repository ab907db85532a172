"""transformers' arguments -> what the mask predictor is asked, and the loss that transformers' callers expect.

Shapes: B batch, Q tokens of a row, D d_model, V embedding_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.models.predictor import PredictCall

__all__ = ["given", "masked_lm_loss", "refuse_outputs"]

IGNORED = -100  # a label that carries no loss


def given(input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states) -> PredictCall:
    """The call that these arguments of `forward` ask for. Raises ValueError where they do not fit together."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give input_ids or inputs_embeds, one of them")
    source = input_ids if inputs_embeds is None else inputs_embeds
    if source.ndim != (2 if inputs_embeds is None else 3):
        raise ValueError(
            f"{'input_ids has' if inputs_embeds is None else 'inputs_embeds has'} shape {tuple(source.shape)}: "
            f"give {'(rows, tokens)' if inputs_embeds is None else '(rows, tokens, d_model)'}"
        )
    rows, tokens = source.shape[:2]
    if position_ids is not None:
        if position_ids.shape not in ((rows, tokens), (1, tokens)):
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}: give {(rows, tokens)}")
        position_ids = position_ids.expand(rows, tokens)
    return PredictCall(
        input_ids,
        position_ids,
        valid=None if attention_mask is None else _valid(attention_mask, (rows, tokens)),
        embeds=inputs_embeds,
        hidden_states=[] if output_hidden_states else None,
    )


def _valid(attention_mask: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Which tokens exist, (B, Q) bool; None where all do, which lets the fastest kernel run."""
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give {shape}, 1 at tokens and 0 at padding "
            "(what a token may see beyond that is a rule, `visible` of `predict`)"
        )
    valid = attention_mask.bool()
    return None if not torch.compiler.is_compiling() and bool(valid.all()) else valid


def refuse_outputs(output_attentions, use_cache) -> None:
    """Raises ValueError for what the model does not give."""
    if output_attentions:
        raise ValueError("output_attentions is true: the fused kernels keep no attention weights; leave it out")
    if use_cache:
        raise ValueError(
            "use_cache is true: a mask predictor has no cache of the past; leave it out, and choose a method "
            "of `generate` (prefix, dual ...)"
        )


def masked_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """The mean cross entropy () of labels (B, Q) at their own place, in nats, in fp32 at least; -100 carries none.

    num_items_in_batch: the labels of the whole step, by which the sum is divided in place of those here. No label at
    all gives 0.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: give {tuple(logits.shape[:2])}, -100 for no loss")
    labels = labels.to(logits.device).flatten()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
    count = (labels != IGNORED).sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
