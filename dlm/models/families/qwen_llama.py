"""Llama, Qwen2, Qwen3 and SmolLM3: autoregressive as they are released, bidirectional as dllm's `a2d-*` turns them.

SmolLM and SmolLM2 carry Llama's `model_type`; dllm itself turns no SmolLM3.
"""

from __future__ import annotations

from typing import ClassVar

from dlm.models.families.base import BiasedConfig, Family, FamilyConfig
from dlm.models.families.names import USUAL, layer_names, register_names
from dlm.models.transformer import LLaDAModelLM


class LlamaConfig(BiasedConfig):
    """`model_type` llama: next-token prediction; biases by `attention_bias` and `mlp_bias`."""

    model_type = "llama"
    written_as: ClassVar[str] = "LlamaForCausalLM"
    attention: ClassVar[str] = "causal"

    mlp_bias: bool = False


class Qwen2Config(FamilyConfig):
    """`model_type` qwen2: next-token prediction; biases of q, k and v."""

    model_type = "qwen2"
    written_as: ClassVar[str] = "Qwen2ForCausalLM"
    attention: ClassVar[str] = "causal"
    reads_sliding_window: ClassVar[bool] = True
    qkv_bias: ClassVar[bool] = True


class Qwen3Config(BiasedConfig):
    """`model_type` qwen3: next-token prediction; queries and keys normed in each head."""

    model_type = "qwen3"
    written_as: ClassVar[str] = "Qwen3ForCausalLM"
    attention: ClassVar[str] = "causal"
    reads_sliding_window: ClassVar[bool] = True
    qk_norm: ClassVar[str] = "head"


class SmolLM3Config(LlamaConfig):
    """`model_type` smollm3: Llama with layers without positions (NoPE), those with a 0 in `no_rope_layers`, by default
    every `no_rope_layer_interval`-th (transformers' SmolLM3Config, whose defaults these are)."""

    model_type = "smollm3"
    written_as: ClassVar[str] = "SmolLM3ForCausalLM"
    reads_sliding_window: ClassVar[bool] = True

    tie_word_embeddings: bool = True
    rope_theta: int | float = 2_000_000.0
    no_rope_layers: list | None = None
    no_rope_layer_interval: int = 4

    def _check_sizes(self) -> None:
        super()._check_sizes()
        layers, interval = self.no_rope_layers, self.no_rope_layer_interval
        if layers is not None and len(layers) < self.num_hidden_layers:
            raise ValueError(
                f"config has no_rope_layers of length {len(layers)} for {self.num_hidden_layers} layers: the file is "
                "incomplete"
            )
        if layers is None and interval < 1:
            raise ValueError(f"config field no_rope_layer_interval={interval}: it must be 1 or more")

    @property
    def rope_layers(self) -> tuple[bool, ...]:
        if self.no_rope_layers is not None:
            return tuple(bool(turned) for turned in self.no_rope_layers[: self.num_hidden_layers])
        return tuple((layer + 1) % self.no_rope_layer_interval != 0 for layer in range(self.num_hidden_layers))


class Converted:
    """An autoregressive family as dllm turns it: bidirectional, or block-causal where `block_length` is set."""

    attention = FamilyConfig.attention
    block_lengths: ClassVar[str] = "any"


class A2DLlamaConfig(Converted, LlamaConfig):
    """dllm's bidirectional Llama."""

    model_type = "a2d-llama"
    written_as: ClassVar[str] = "A2DLlamaLMHeadModel"


class A2DQwen2Config(Converted, Qwen2Config):
    """dllm's bidirectional Qwen2."""

    model_type = "a2d-qwen2"
    written_as: ClassVar[str] = "A2DQwen2LMHeadModel"


class A2DQwen3Config(Converted, Qwen3Config):
    """dllm's bidirectional Qwen3."""

    model_type = "a2d-qwen3"
    written_as: ClassVar[str] = "A2DQwen3LMHeadModel"


class A2DSmolLM3Config(Converted, SmolLM3Config):
    """A bidirectional SmolLM3."""

    model_type = "a2d-smollm3"
    written_as: ClassVar[str] = "A2DSmolLM3LMHeadModel"


class LlamaLM(LLaDAModelLM):
    config_class = LlamaConfig


class Qwen2LM(LLaDAModelLM):
    config_class = Qwen2Config


class Qwen3LM(LLaDAModelLM):
    config_class = Qwen3Config


class SmolLM3LM(LLaDAModelLM):
    config_class = SmolLM3Config


class A2DLlamaLM(LLaDAModelLM):
    config_class = A2DLlamaConfig


class A2DQwen2LM(LLaDAModelLM):
    config_class = A2DQwen2Config


class A2DQwen3LM(LLaDAModelLM):
    config_class = A2DQwen3Config


class A2DSmolLM3LM(LLaDAModelLM):
    config_class = A2DSmolLM3Config


TWINS = (LlamaLM, Qwen2LM, Qwen3LM, SmolLM3LM)  # predict the next token
CONVERTED = (A2DLlamaLM, A2DQwen2LM, A2DQwen3LM, A2DSmolLM3LM)
for model in (*TWINS, *CONVERTED):
    register_names(model, layer_names(USUAL))

FAMILIES = (
    *(Family(m.config_class.model_type, m.config_class, m, autoregressive=True) for m in TWINS),
    *(Family(m.config_class.model_type, m.config_class, m, {"split": "rounded"}) for m in CONVERTED),
)
