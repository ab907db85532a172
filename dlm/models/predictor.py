"""The mask predictor: what the sampler, the objectives and the scorer call, whatever wraps the model.

Shapes: B batch, Q queried tokens, T slots of the canvas, N or M places asked about, V embedding_size.

A mask predictor is any callable `(tokens, positions=None, *, visible=None, cache=None, valid=None,
logits_to_keep=None) -> logits`. A model has transformers' `forward` and is a mask predictor through `predict`, which
is a forward pass too: it goes through `__call__`, where FSDP2, DeepSpeed, DDP, autocast and adapters do their work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from dlm.models.attention import Visible
from dlm.models.head import Targets

__all__ = ["MaskPredictor", "PredictCall", "as_predictor"]


class PredictCall:
    """The arguments of one `MaskPredictor.predict`, as one argument of `forward`.

    embeds (B, Q, D): embeddings in the place of tokens. hidden_states: a list that takes them, one a layer.
    No dataclass on purpose: FSDP2 would look into one and round the weights of the targets to bf16.
    """

    def __init__(
        self,
        tokens: Tensor | None,
        positions: Tensor | None = None,
        *,
        visible: Visible | None = None,
        cache=None,
        valid: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        targets: Targets | None = None,
        embeds: Tensor | None = None,
        hidden_states: list[Tensor] | None = None,
    ):
        self.tokens, self.positions, self.visible, self.cache, self.valid = tokens, positions, visible, cache, valid
        self.logits_to_keep, self.targets, self.embeds, self.hidden_states = (
            logits_to_keep, targets, embeds, hidden_states,
        )  # fmt: skip


class MaskPredictor:
    """Gives a module `predict`; its `forward` takes `call`, a `PredictCall`, in place of transformers' arguments."""

    def predict(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        visible: Visible | None = None,
        cache=None,
        valid: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        targets: Targets | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits at the places asked about, or with `targets` the loss there.

        tokens (B, Q) ids; positions (B, Q) their slots, by default 0..Q-1; visible: a rule of `attention`, by
        default the one that the checkpoint was trained with (full, or block-causal where config.block_length is
        set); cache: a `KVCache`, and then attention reads all its slots; valid (B, T) which slots exist.
        logits_to_keep: None for all, (B, Q, V); a bool (B, Q) for those, flat in row order, (N, V); int64 (B, M)
        indices into Q for those, (B, M, V). V is config.embedding_size; the type is that of the weights.
        targets: of the N places asked about, in row order; gives (sum of weighted cross entropies (), cross entropies
        (N,) without a gradient), both fp32, and holds the logits of `targets.chunk` places at a time.
        """
        return self(
            call=PredictCall(
                tokens, positions, visible=visible, cache=cache, valid=valid, logits_to_keep=logits_to_keep,
                targets=targets,
            )
        )  # fmt: skip


def as_predictor(model) -> Callable:
    """The mask predictor that `model` is or wraps: `predict` for a module with a `MaskPredictor` in it, and anything
    else (a packed copy, a plain function) as it is."""
    if isinstance(model, nn.Module) and any(isinstance(module, MaskPredictor) for module in model.modules()):
        return partial(MaskPredictor.predict, model)
    return model
