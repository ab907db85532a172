"""The mask predictor: what the sampler, the objectives and the scorer call, whatever wraps the model.

Shapes: B batch, Q queried tokens, T slots of the canvas, N or M places asked about, V embedding_size.

A mask predictor is any callable `(tokens, positions=None, *, visible=None, cache=None, valid=None,
logits_to_keep=None) -> logits`. A model has transformers' `forward` and is a mask predictor through `predict`, which
is a forward pass too: it goes through `__call__`, where FSDP2, DeepSpeed, DDP, autocast and adapters do their work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dlm.models.attention import Visible
from dlm.models.head import Targets

__all__ = ["MaskPredictor", "PredictCall", "as_predictor", "guess_places"]


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
        every_repeat: bool = False,
    ):
        self.tokens, self.positions, self.visible, self.cache, self.valid = tokens, positions, visible, cache, valid
        self.logits_to_keep, self.targets, self.embeds, self.hidden_states, self.every_repeat = (
            logits_to_keep, targets, embeds, hidden_states, every_repeat,
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
        every_repeat: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits at the places asked about, or with `targets` the loss there.

        tokens (B, Q) ids; positions (B, Q) their slots, by default 0..Q-1; visible: a rule of `attention`, by
        default the one that the checkpoint was trained with (full, or block-causal where config.block_length is
        set); cache: a `KVCache`, and then attention reads all its slots; valid (B, T) which slots exist.
        logits_to_keep: None for all, (B, Q, V); a bool (B, Q) for those, flat in row order, (N, V); int64 (B, M)
        indices into Q for those, (B, M, V); int64 (N,) indices into B * Q for those, (N, V). V is
        config.embedding_size; the type is that of the weights.
        targets: of the N places asked about, in row order; gives (sum of weighted cross entropies (), cross entropies
        (N,) without a gradient), both fp32, and holds the logits of `targets.chunk` places at a time.
        every_repeat: of what each of the R = config.layer_repeats rounds of the layers puts out, not of the last alone:
        B becomes R * B and N becomes R * N, the first round first (`targets` and `cache` too are of R * N and of one).
        """
        return self(
            call=PredictCall(
                tokens, positions, visible=visible, cache=cache, valid=valid, logits_to_keep=logits_to_keep,
                targets=targets, every_repeat=every_repeat,
            )
        )  # fmt: skip


def guess_places(model, scored: Tensor, positions: Tensor, block_length: int | None = None) -> Tensor:
    """Where the guesses for the scored places stand, as `logits_to_keep`, N of them in row order.

    scored (B, T) bool; positions (B, T): each token's place in its document. A model whose logits are shifted
    (`config.shift_logits`) says of the place before what stands here, and of a document's first place at that place
    itself (Dream, arXiv:2508.15487). block_length: the input is [x_t ; x_0], whose scored places are of x_t, and the
    place before the first of a block is clean (Fast-dLLM v2, arXiv:2509.26328).
    Gives `scored` where nothing is shifted, with as many unscored places behind it where there are two copies.
    """
    copies = 1 if block_length is None else 2
    modules = model.modules() if isinstance(model, nn.Module) else [model]
    config = next((module.config for module in modules if hasattr(module, "config")), None)
    if not getattr(config, "shift_logits", None):
        return scored if copies == 1 else torch.cat([scored, torch.zeros_like(scored)], dim=1)
    rows, slots = scored.nonzero(as_tuple=True)
    here, width = positions[rows, slots], scored.shape[1]
    before = torch.where(here > 0, slots - 1, slots)
    if block_length is not None:
        before = before + width * ((here > 0) & (here % block_length == 0))
    return rows * copies * width + before


def as_predictor(model) -> Callable:
    """The mask predictor that `model` is or wraps: `predict` for a module with a `MaskPredictor` in it, and anything
    else (a packed copy, a plain function) as it is."""
    if isinstance(model, nn.Module) and any(isinstance(module, MaskPredictor) for module in model.modules()):
        return partial(MaskPredictor.predict, model)
    return model
