"""The fields of LLaDA's configuration file, what each may be and what follows from them, without transformers."""

from __future__ import annotations

from dataclasses import dataclass

from dlm.models.choices import check_grid
from dlm.models.rotary import Rotary

__all__ = ["LLaDAFields"]

_OBJECTIVES = ("diffusion", "block_diffusion", "autoregressive")

# Field -> the only values we implement, and what the field would do otherwise.
_ONLY = {
    "alibi": ((False,), "ALiBi position biases"),
    "rope": ((True,), "learned absolute positions"),
    "block_type": (("llama",), "a block other than LLaMA's (sequential or parallel, with fused projections)"),
    "block_group_size": ((1,), "blocks saved in groups, under other tensor names"),
    "activation_type": (("silu",), "another activation in the MLP"),
    "layer_norm_type": (("rms",), "another normalisation than RMSNorm"),
    "layer_norm_with_affine": ((True,), "norms without weights"),
    "attention_layer_norm_with_affine": ((True,), "query and key norms without weights"),
    "bias_for_layer_norm": ((False, None), "norms with biases"),
}


@dataclass(kw_only=True, repr=False, eq=False)
class LLaDAFields:
    """What config.json says of a mask predictor in LLaDA's layout: what packed inference reads of it.

    `LLaDAConfig` is the same with what transformers adds, and says what the fields are. Whoever opens a checkpoint to
    generate text gets these alone, since transformers takes a second to import.
    Raises ValueError, naming the field, for a variant that is not implemented and for sizes that do not fit.
    """

    model_type = "llada"

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    n_layers: int = 32
    mlp_ratio: int | float = 4
    mlp_hidden_size: int | None = None
    activation_type: str = "silu"
    block_type: str = "llama"
    block_group_size: int = 1
    alibi: bool = False
    alibi_bias_max: float = 8.0
    rope: bool = True
    rope_full_precision: bool = True
    rope_theta: float = 500000.0
    flash_attention: bool = False
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    multi_query_attention: bool | None = None
    attention_layer_norm: bool = False
    attention_layer_norm_with_affine: bool = True
    input_emb_norm: bool = False
    layer_norm_type: str = "rms"
    layer_norm_with_affine: bool = True
    rms_norm_eps: float = 1e-5
    max_sequence_length: int = 4096
    include_qkv_bias: bool | None = False
    include_bias: bool = False
    bias_for_layer_norm: bool | None = False
    scale_logits: bool = False
    vocab_size: int = 126464
    embedding_size: int | None = None
    weight_tying: bool = False
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    mask_token_id: int | None = 126336
    init_device: str | None = None
    init_fn: str = "mitchell"
    init_std: float = 0.02
    init_cutoff_factor: float | None = None
    precision: str | None = None
    use_cache: bool = False
    block_length: int | None = None
    full_attention: bool = False
    objective: str | None = None
    shift_logits: bool | None = None
    layer_repeats: int = 1
    grid_width: int | None = None

    def __post_init__(self):
        self.complete()

    def complete(self) -> None:
        """Checks the fields and fills in those that follow from others. Raises ValueError as the class."""
        for field, (allowed, meaning) in _ONLY.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(
                    f"config field {field}={value!r} asks for {meaning}, which dlm does not implement; "
                    f"it loads checkpoints with {field}={allowed[0]!r}"
                )
        if self.include_bias and self.bias_for_layer_norm is None:
            raise ValueError(
                "config has include_bias=true and bias_for_layer_norm=null, which asks for norms with biases; "
                "dlm implements bias_for_layer_norm=false"
            )
        if self.multi_query_attention:
            if self.n_kv_heads not in (None, 1):
                raise ValueError(
                    f"config has multi_query_attention=true and n_kv_heads={self.n_kv_heads}: give one of them"
                )
            self.n_kv_heads = 1
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = int(self.mlp_ratio * self.d_model)
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        if self.objective is None:
            self.objective = "diffusion" if self.block_length is None else "block_diffusion"
        self._check_sizes()
        self._check_objective()

    def _check_sizes(self) -> None:
        sizes = (
            "d_model",
            "n_heads",
            "n_kv_heads",
            "n_layers",
            "mlp_hidden_size",
            "vocab_size",
            "max_sequence_length",
            "layer_repeats",
        )
        for field in sizes:
            if getattr(self, field) < 1:
                raise ValueError(f"config field {field}={getattr(self, field)}: it must be 1 or more")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"config has d_model={self.d_model} and n_heads={self.n_heads}: "
                "the head size d_model / n_heads must be an even whole number for rotary positions"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"config has n_heads={self.n_heads} and n_kv_heads={self.n_kv_heads}: "
                "the number of key heads must divide the number of heads"
            )
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"config has embedding_size={self.embedding_size} below vocab_size={self.vocab_size}: "
                "every token needs an embedding"
            )
        if self.grid_width is not None:
            check_grid(self.grid_width, self.n_heads)
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"config field block_length={self.block_length}: give 1 or more, or leave it out")

    def _check_objective(self) -> None:
        if self.objective not in _OBJECTIVES:
            raise ValueError(f"config field objective={self.objective!r}: it is one of {', '.join(_OBJECTIVES)}")
        if (self.objective == "block_diffusion") != (self.block_length is not None):
            raise ValueError(
                f"config has objective={self.objective!r} and block_length={self.block_length}: "
                "a block_length belongs to block_diffusion, and to no other"
            )
        if self.full_attention and self.block_length is None:
            raise ValueError("config has full_attention=true without a block_length: it belongs beside one")

    @property
    def layers_applied(self) -> int:
        """Layers that a token passes through, each of which has keys and values of its own."""
        return self.n_layers * self.layer_repeats

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def rotary(self) -> Rotary:
        return Rotary(self.head_dim, self.rope_theta, precise=self.rope_full_precision)

    @property
    def qk_norm(self) -> str | None:
        """Whether queries and keys are normed: `all` heads together, or not at all."""
        return "all" if self.attention_layer_norm else None

    @property
    def qkv_bias(self) -> bool:
        return bool(self.include_bias or self.include_qkv_bias)

    @property
    def out_bias(self) -> bool:
        return self.include_bias

    @property
    def mlp_bias(self) -> bool:
        return self.include_bias

    @property
    def experts(self) -> None:
        return None

    @property
    def rope_layers(self) -> None:
        """For each layer whether it turns queries and keys by their positions; None: every one does."""
        return None

    @property
    def attention(self) -> str:
        """What a slot sees unless something else is asked for: `full`, `block_causal` or `causal`."""
        return "full" if self.block_length is None or self.full_attention else "block_causal"
