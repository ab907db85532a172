"""What the configurations of all families share, and what a family says of itself.

A family's `config.json` keeps its own fields; the transformer reads them under LLaDA's names (`attribute_map`) and
through the properties below, which a family's class overrides. Shapes are told by configurations alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PretrainedConfig

from dlm.models.moe import Experts
from dlm.models.rotary import Rotary, rotary_of

__all__ = ["REFUSED", "BiasedConfig", "Family", "FamilyConfig"]

# Field of any config.json -> what it would do: fields that change the result, and that no family here reads. One that
# is null, false or 0 (1 for a multiplier) does nothing.
REFUSED = {
    "vision_config": "an image encoder",
    "audio_config": "a sound encoder",
    "text_config": "a model of several parts",
    "mm_vision_tower": "an image encoder",
    "mm_projector_type": "an image encoder",
    "is_encoder_decoder": "an encoder and a decoder",
    "quantization_config": "quantised weights",
    "attn_logit_softcapping": "capped attention scores",
    "final_logit_softcapping": "capped logits",
    "query_pre_attn_scalar": "another attention scale",
    "embedding_multiplier": "scaled embeddings",
    "residual_multiplier": "scaled residuals",
    "attention_multiplier": "another attention scale",
    "logits_scaling": "scaled logits",
    "logit_scale": "scaled logits",
    "no_rope_layers": "layers without positions",
    "clip_qkv": "clipped queries, keys and values",
    "alibi": "ALiBi position biases",
    "kv_lora_rank": "latent attention",
    "mamba_d_state": "state-space layers",
}


class FamilyConfig(PretrainedConfig):
    """A decoder in the usual layout of the Hugging Face hub: pre-norm, rotary positions, SwiGLU.

    Fields not named here are kept and written back as they came. Ours beside them, written only where they are not
    what the family says: `block_length` (trained block-causal with blocks of so many slots),
    `full_attention` (under full attention too), `shift_logits` and `objective`.
    Raises ValueError, naming the field, for a variant that is not implemented and for sizes that do not fit.
    """

    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "weight_tying": "tie_word_embeddings",
        "embedding_size": "vocab_size",
        "init_std": "initializer_range",
    }
    # What a family fixes. `only`: field -> the values that are implemented. written_as: its class in the authors' code.
    only: ClassVar[Mapping[str, tuple]] = {"hidden_act": ("silu",)}
    written_as: ClassVar[str] = ""
    reads_sliding_window: ClassVar[bool] = False
    # What LLaDA's configuration may vary and these families do not.
    scale_logits: ClassVar[bool] = False
    input_emb_norm: ClassVar[bool] = False
    rope_full_precision: ClassVar[bool] = True
    residual_dropout: ClassVar[float] = 0.0
    embedding_dropout: ClassVar[float] = 0.0
    include_bias: ClassVar[bool] = False
    init_fn: ClassVar[str] = "normal"
    init_cutoff_factor: ClassVar[None] = None
    qk_norm: ClassVar[str | None] = None
    qkv_bias: ClassVar[bool] = False
    out_bias: ClassVar[bool] = False
    mlp_bias: ClassVar[bool] = False
    partial_rotary: ClassVar[float] = 1.0
    # Which block lengths beside its own suit the family: `own` alone, `divisors` of it, or `any`.
    block_lengths: ClassVar[str] = "own"
    # What holds where config.json does not say: known of the family, and not written back.
    natural: ClassVar[Mapping[str, Any]] = {}

    vocab_size: int = 32_000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: int | float = 10_000.0
    rope_scaling: dict | None = None
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    block_length: int | None = None
    full_attention: bool = False
    shift_logits: bool | None = None
    objective: str | None = None

    def __post_init__(self, **kwargs: Any):
        given = kwargs.pop("rope_parameters", None)  # how transformers 5 writes rope_theta and rope_scaling
        if given:
            fields = dict(given)
            self.rope_theta = fields.pop("rope_theta", self.rope_theta)
            self.rope_scaling = None if fields.get("rope_type", "default") == "default" else fields
        self._one_rope_field = bool(given)
        for name, meaning in REFUSED.items():
            if name not in self.own_fields() and kwargs.get(name) not in (None, False, 0, 1, {}, []):
                label = self.label()
                raise ValueError(f"config field {name} asks for {meaning}, which dlm does not implement in {label}")
        for name, allowed in self.only.items():
            value = getattr(self, name, kwargs.get(name))
            if value not in allowed:
                raise ValueError(
                    f"config field {name}={value!r}: dlm implements {self.label()} with {name}="
                    f"{' or '.join(map(repr, allowed))}"
                )
        self._check_window(kwargs)
        self._written_as = list(self.architectures or [self.written_as])
        super().__post_init__(**kwargs)
        self._filled = {}
        heads = max(1, self.num_attention_heads)
        known = {"num_key_value_heads": heads, "head_dim": self.hidden_size // heads, **self.natural}
        for name, value in known.items():
            if getattr(self, name) is None and self._fits(name, value):
                setattr(self, name, value)
                self._filled[self.attribute_map.get(name, name)] = value
        if self.objective is None:
            kinds = {"full": "diffusion", "block_causal": "block_diffusion", "causal": "autoregressive"}
            self.objective = self._filled["objective"] = kinds[self.attention]
        self._check_sizes()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As in transformers."""
        given = set(config_dict)
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result)._given = given
        return result

    def _fits(self, name: str, value: Any) -> bool:
        """Whether a token id of the released vocabulary is one of this checkpoint's too."""
        return not name.endswith("_token_id") or value < self.vocab_size

    @classmethod
    def own_fields(cls) -> set[str]:
        """The fields that this configuration reads."""
        return set(cls.__dataclass_fields__)

    @classmethod
    def label(cls) -> str:
        return f"family {cls.model_type!r}"

    def _check_window(self, fields: Mapping[str, Any]) -> None:
        window, length = fields.get("sliding_window"), self.max_position_embeddings
        asked = fields.get("use_sliding_window", False) or "sliding_attention" in (fields.get("layer_types") or ())
        if self.reads_sliding_window and asked and window is not None and window < length:
            raise ValueError(
                f"config has use_sliding_window=true with sliding_window={window} below max_position_embeddings="
                f"{length}: dlm does not implement windows; use a checkpoint without one"
            )

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "block_length",
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"config field {name}={value!r}: it must be a whole number, 1 or more")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config has num_attention_heads={self.num_attention_heads} and num_key_value_heads="
                f"{self.num_key_value_heads}: the number of key heads must divide the number of heads"
            )
        if "head_dim" in self._filled and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config has hidden_size={self.hidden_size} and num_attention_heads={self.num_attention_heads}: "
                "the heads must divide it, or give head_dim"
            )
        mask = self.mask_token_id
        if mask is not None and not 0 <= mask < self.vocab_size:
            raise ValueError(
                f"config has mask_token_id={mask}, outside of its vocab_size={self.vocab_size} embeddings: "
                "give the id of the token that stands for a masked place"
            )
        assert self.rotary and (self.experts is None or self.experts)  # both refuse numbers that do not fit

    @property
    def rotary(self) -> Rotary:
        size = int(self.head_dim * self.partial_rotary)
        return rotary_of(size, self.rope_theta, self.rope_scaling or None, self.max_position_embeddings)

    @property
    def experts(self) -> Experts | None:
        return None

    @property
    def rope_layers(self) -> tuple[bool, ...] | None:
        """For each layer whether it turns queries and keys by their positions; None: every one does."""
        return None

    @property
    def layers_applied(self) -> int:
        """Layers that a token passes through."""
        return self.n_layers

    @property
    def layer_repeats(self) -> int:
        """Every layer is applied once."""
        return 1

    @property
    def grid_width(self) -> None:
        """The canvas is a line, not a grid."""
        return None

    @property
    def attention(self) -> str:
        """What a slot sees: `full`, `block_causal` or `causal`."""
        return "full" if self.block_length is None or self.full_attention else "block_causal"

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: the fields that came, by their own names."""
        fields = super().to_diff_dict()
        for name in [name for name in fields if name.startswith("_")]:
            del fields[name]
        for name, value in self._filled.items():
            if fields.get(name) == value:
                fields.pop(name, None)
        for name in self.own_fields() - getattr(self, "_given", set()):
            if name in fields and fields[name] is None:
                del fields[name]
        if not fields.get("full_attention"):
            fields.pop("full_attention", None)
        if fields.get("dtype") is not None:
            fields["torch_dtype"] = fields.pop("dtype")
        if self._one_rope_field:
            scaling = fields.pop("rope_scaling", None) or {"rope_type": "default"}
            fields["rope_parameters"] = {"rope_theta": fields.pop("rope_theta"), **scaling}
        fields["architectures"] = self._written_as
        return fields


class BiasedConfig(FamilyConfig):
    """A family whose `attention_bias` gives all four projections of attention a bias."""

    attention_bias: bool = False

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def out_bias(self) -> bool:
        return self.attention_bias


@dataclass(frozen=True)
class Family:
    """A family of checkpoints, one row of `FAMILIES`.

    name: as its `model_type`. config: its configuration. model: its class, whose weights are written by the names of
    the authors. sampling: what the authors' script does, as `SamplingConfig` fields. required: fields without which
    config.json is incomplete. autoregressive: predicts the next token.
    """

    name: str
    config: type[PretrainedConfig]
    model: type
    sampling: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    autoregressive: bool = False
