"""LLaDA-MoE (arXiv:2509.24389): LLaDA's `model_type`, Qwen3's layout, a softmax router that is not renormalised."""

from __future__ import annotations

from typing import ClassVar

from dlm.models.families.base import BiasedConfig, Family
from dlm.models.families.names import EXPERTS, USUAL, layer_names, register_names
from dlm.models.moe import Experts
from dlm.models.transformer import LLaDAModelLM


class LLaDAMoEConfig(BiasedConfig):
    """`model_type` llada with `num_experts`. `norm_topk_prob`, `moe_router_score_function`, `routed_scaling_factor` and
    groups are not read, as in the authors' code; a router bias enters weights too."""

    model_type = "llada"
    written_as: ClassVar[str] = "LLaDAMoEModelLM"
    natural: ClassVar = {"mask_token_id": 156_895, "eos_token_id": 156_892}
    attribute_map = {**BiasedConfig.attribute_map, "mlp_hidden_size": "dense_intermediate_size"}

    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    intermediate_size: int | None = None
    dense_intermediate_size: int | None = None
    expert_intermediate_size: int = 1024
    shared_expert_intermediate_size: int | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_layer_freq: list[int] | None = None
    moe_router_enable_expert_bias: bool | None = False
    qk_layernorm: bool | None = False
    partial_rotary_factor: float | None = 1.0

    @classmethod
    def label(cls) -> str:
        return "LLaDA-MoE"

    @property
    def partial_rotary(self) -> float:
        return 1.0 if self.partial_rotary_factor is None else self.partial_rotary_factor

    @property
    def qk_norm(self) -> str | None:
        return "head" if self.qk_layernorm else None

    @property
    def experts(self) -> Experts:
        layers = self.moe_layer_freq or [1] * self.num_hidden_layers
        if len(layers) != self.num_hidden_layers:
            raise ValueError(
                f"config has moe_layer_freq for {len(layers)} layers and num_hidden_layers={self.num_hidden_layers}: "
                "give one number a layer, 1 for a mixture"
            )
        return Experts(
            layers=tuple(bool(kind) for kind in layers),
            number=self.num_experts,
            chosen=self.num_experts_per_tok,
            width=self.expert_intermediate_size,
            shared=self.shared_expert_intermediate_size or 0,
            score="softmax",
            bias="weigh" if self.moe_router_enable_expert_bias else None,
        )


class LLaDAMoELM(LLaDAModelLM):
    config_class = LLaDAMoEConfig


NAMES = {
    **USUAL,
    "mlp.gate.weight": "moe.router",
    "mlp.expert_bias": "moe.router_bias",
    "shared_expert.gate_proj": "moe.shared.ff_proj",
    "shared_expert.up_proj": "moe.shared.up_proj",
    "shared_expert.down_proj": "moe.shared.ff_out",
}
register_names(LLaDAMoELM, [*layer_names(NAMES), *EXPERTS])

FAMILY = Family(name="llada", config=LLaDAMoEConfig, model=LLaDAMoELM)
