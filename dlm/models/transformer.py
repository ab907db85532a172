"""The mask predictor: a bidirectional transformer in LLaDA's layout that computes any subset of the canvas.

Shapes: B batch, Q queried tokens, T slots of the canvas, D d_model, H heads, V embedding_size.

There is one path. Q tokens at given positions are computed; with a cache, their keys (after RoPE) and values are
scattered to those positions and attention reads the whole canvas; without one, the Q tokens are the whole canvas.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dlm.models.attention import attention_mask, grid_views, usable_kernel, visible_of
from dlm.models.configuration import LLaDAConfig
from dlm.models.head import Head, weighted_cross_entropy, weighted_sum
from dlm.models.kv_cache import Further
from dlm.models.moe import MoE
from dlm.models.predictor import MaskPredictor, PredictCall
from dlm.models.rotary import rotary_angles, rotate
from dlm.models.surface import Surface, given, labels_loss, refuse_outputs

__all__ = ["LLaDAModel", "LLaDAModelLM"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean in fp32 and the product in the input's type, as LLaDA computes it."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """softmax(q k^T) v written out: the reference for the fused kernels; the mask is bool, True where seen."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    weights = F.dropout(wide.softmax(dim=-1).to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class LLaDABlock(GradientCheckpointingLayer):
    """One layer: x + attn_out(attention(norm(x))), then x + ff_out(silu(ff_proj(norm(x))) * up_proj(norm(x)))."""

    is_causal = False

    def __init__(self, config: LLaDAConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        # Attributes of a transformers configuration take microseconds each to read: what a pass needs is kept here.
        self.head_dim, self.qk_norm, self.experts = config.head_dim, config.qk_norm, config.experts
        self.rope = config.rope_layers is None or config.rope_layers[layer]
        self.attention_dropout, self.residual_dropout = config.attention_dropout, config.residual_dropout
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        size, width, kv_width = config.d_model, config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        self.attn_norm = RMSNorm(size, config.rms_norm_eps)
        self.q_proj = nn.Linear(size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, kv_width, bias=config.qkv_bias)
        if self.qk_norm is not None:  # of all heads together, or of each head
            self.q_norm = RMSNorm(width if self.qk_norm == "all" else self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(kv_width if self.qk_norm == "all" else self.head_dim, config.rms_norm_eps)
        self.attn_out = nn.Linear(width, size, bias=config.out_bias)
        self.ff_norm = RMSNorm(size, config.rms_norm_eps)
        self.mixture = self.experts is not None and self.experts.layers[layer]
        if self.mixture:
            self.moe = MoE(size, self.experts)
        else:
            self.ff_proj = nn.Linear(size, config.mlp_hidden_size, bias=config.mlp_bias)
            self.up_proj = nn.Linear(size, config.mlp_hidden_size, bias=config.mlp_bias)
            self.ff_out = nn.Linear(config.mlp_hidden_size, size, bias=config.mlp_bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], kernel: str, mask, positions, cache) -> Tensor:
        x = x + self._drop(self.attn_out(self._attend(self.attn_norm(x), rotary, kernel, mask, positions, cache)))
        y = self.ff_norm(x)
        y = self.moe(y) if self.mixture else self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))
        return x + self._drop(y)

    def _attend(self, x: Tensor, rotary, kernel, mask, positions, cache) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))  # (B, Q, H, D)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if not q.numel():  # no row or no token: kernels refuse it
            return q.flatten(2)
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v)  # (B, T, H, D)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scale = self.head_dim**-0.5
        out, _ = attend(self, q, k, v, mask, scaling=scale, dropout=dropout, is_causal=False)  # (B, Q, H, D)
        return out.flatten(2)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.residual_dropout, self.training) if self.residual_dropout else x


class LLaDAPreTrainedModel(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """`normal` (std init_std, residual outputs over sqrt(2 layers)), `fan_in` or `mitchell`, in LLaDA's names."""
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        if isinstance(module, MoE):
            for weight in (module.router, module.gate_up, module.down):
                init.normal_(weight, std=self.config.init_std)
            if module.router_bias is not None:
                init.zeros_(module.router_bias)
        if not isinstance(module, nn.Linear | nn.Embedding):
            return
        layer, kind = getattr(module, "_residual_layer", None), self.config.init_fn
        fan_in = module.in_features if isinstance(module, nn.Linear) else self.config.d_model
        if kind == "normal":
            std = self.config.init_std / (math.sqrt(2 * self.config.n_layers) if layer is not None else 1.0)
        elif kind in ("mitchell", "fan_in"):
            std = fan_in**-0.5
            if kind == "mitchell" and layer is not None:
                std /= math.sqrt(2 * (layer + 1))
        else:
            raise ValueError(
                f"config field init_fn={kind!r} has no rule here for new weights; use normal, mitchell or fan_in"
            )
        cutoff = 3.0 if kind == "mitchell" else self.config.init_cutoff_factor
        if cutoff is None:
            init.normal_(module.weight, std=std)
        else:
            init.trunc_normal_(module.weight, std=std, a=-cutoff * std, b=cutoff * std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)


class LLaDAModel(LLaDAPreTrainedModel):
    """Embeddings and layers; the output projection hangs here too because that is where LLaDA's files keep it."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(LLaDABlock(config, layer) for layer in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            }
        )
        if not config.weight_tying:
            self.transformer["ff_out"] = Head(config.d_model, config.embedding_size, bias=config.include_bias)
        for block in self.transformer.blocks:
            block.attn_out._residual_layer = block.layer
            if not block.mixture:
                block.ff_out._residual_layer = block.layer
        self.rotary = config.rotary
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        call: PredictCall | None = None,
    ) -> BaseModelOutput | tuple | Tensor:
        """Hidden states after the last norm: transformers' output for transformers' arguments (as in
        `LLaDAModelLM.forward`), (B, Q, D) for a `call`."""
        if call is not None:
            return self._hidden(call)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        call = given(input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states)
        last, layers = self._hidden(call), call.hidden_states
        output = BaseModelOutput(last_hidden_state=last, hidden_states=None if layers is None else tuple(layers))
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _hidden(self, call: PredictCall) -> Tensor:
        visible, cache, positions = call.visible, call.cache, call.positions
        if visible is None:
            visible = visible_of(self.config)
        if cache is not None and positions is None:
            raise ValueError("a cache needs positions (B, Q): the slots whose keys and values are computed now")
        x = self.transformer.wte(call.tokens) if call.embeds is None else call.embeds
        batch, queries, device = *x.shape[:2], x.device
        if self.config.input_emb_norm:
            x = x * self.config.d_model**0.5
        if self.config.embedding_dropout:
            x = F.dropout(x, self.config.embedding_dropout, self.training)
        where = torch.arange(queries, device=device)[None] if positions is None else positions
        rotary = rotary_angles(where, self.rotary, x.dtype)
        keys = queries if cache is None else cache.length
        slots = None if cache is None else positions
        grid = self.config.grid_width is not None
        kernel = usable_kernel(self.config._attn_implementation, visible, call.valid, device, by_head=grid)
        mask = attention_mask(kernel, visible, call.valid, slots, (batch, queries, keys), device)
        if grid:
            views = grid_views(where, cache, self.config.grid_width, self.config.n_heads)
            mask = views if mask is None else mask & views
        ends = []  # what each round puts out, where all are asked for
        for repeat in range(self.config.layer_repeats):
            stored = cache if repeat == 0 or cache is None else Further(cache, repeat * len(self.transformer.blocks))
            for block in self.transformer.blocks:
                if call.hidden_states is not None:
                    call.hidden_states.append(x)
                x = block(x, rotary, kernel, mask, positions, stored)
            if call.every_repeat:
                ends.append(x)
        x = self.transformer.ln_f(torch.cat(ends) if call.every_repeat else x)
        if call.hidden_states is not None:
            call.hidden_states.append(x)
        return x

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value


class LLaDAModelLM(MaskPredictor, Surface, LLaDAPreTrainedModel):
    """p(x0 | xt) for absorbing-state diffusion: logits over the vocabulary at every place asked for.

    No time is given to the model (LLaDA, arXiv:2502.09992, section 2): the mask rate shows in the input.
    """

    _tied_weights_keys = {}
    cuda_graphs = False  # whether generation on a GPU replays its passes (`graphs`)
    compiled = False  # whether generation on a CPU compiles a layer's operations (`native`)

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        num_items_in_batch: int | Tensor | None = None,
        output_attentions: bool | None = None,
        use_cache: bool | None = None,
        call: PredictCall | None = None,
    ) -> MaskedLMOutput | tuple | Tensor:
        """transformers' forward: the mask predictor's logits, and with `labels` a loss.

        input_ids (B, Q), or inputs_embeds (B, Q, D) in their place; attention_mask (B, Q), 0 at padding;
        position_ids (B, Q) or (1, Q), by default 0..Q-1. labels (B, Q): the mean cross entropy in nats of those
        that are not -100 (`labels_loss`); its sum over num_items_in_batch where that is given. Returns logits
        (B, Q, V), V = config.embedding_size, and with output_hidden_states the embeddings and every layer's output,
        the last one normed. output_attentions and use_cache are for other models: true is refused.
        call: from `predict`, in place of all others; the output is then that of `predict`.
        Raises ValueError for arguments that do not fit.
        """
        if call is not None:
            return self._asked(call)
        refuse_outputs(output_attentions, use_cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        call = given(input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states)
        logits, layers = self._asked(call), call.hidden_states
        output = MaskedLMOutput(
            loss=None if labels is None else labels_loss(logits, labels, self.config, num_items_in_batch),
            logits=logits,
            hidden_states=None if layers is None else tuple(layers),
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _asked(self, call: PredictCall) -> Tensor | tuple[Tensor, Tensor]:
        """What `predict` returns."""
        x, keep, targets = self.model(call=call), call.logits_to_keep, call.targets
        if keep is not None:
            if call.every_repeat:
                keep = _in_every_repeat(keep, self.config.layer_repeats, call)
            if keep.dtype == torch.bool:
                x = x[keep]  # (N, D)
            elif keep.ndim == 1:
                x = x.flatten(0, 1)[keep]  # (N, D)
            else:
                x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))  # (B, M, D)
        scale = self.config.d_model**-0.5 if self.config.scale_logits else 1.0
        table, head = self.model.transformer.wte, None if self.config.weight_tying else self.model.transformer.ff_out
        if targets is not None and head is None:
            return weighted_cross_entropy(x, table.weight, None, targets, scale)
        if targets is not None and isinstance(head, Head):
            return head(x, targets, scale)
        logits = F.linear(x, table.weight) if head is None else head(x)
        logits = logits * scale if self.config.scale_logits else logits
        if targets is not None:  # the head was replaced, by an adapter or a quantised layer: it knows logits alone
            return weighted_sum(logits.flatten(0, -2), targets.tokens, targets.weight)
        return logits


def _in_every_repeat(keep: Tensor, repeats: int, call: PredictCall) -> Tensor:
    """`logits_to_keep` of a batch as those of `repeats` batches one after another."""
    if keep.dtype == torch.bool or keep.ndim == 2:
        return keep.repeat(repeats, 1)
    batch, queries = (call.tokens if call.embeds is None else call.embeds).shape[:2]
    first = torch.arange(repeats, device=keep.device) * batch * queries
    return (first[:, None] + keep).flatten()
