"""SDAR (arXiv:2510.06303) and TraDo: Qwen3's layout, block-causal, without a shift; SDAR-30B-A3B is Qwen3's mixture."""

from __future__ import annotations

from typing import ClassVar

from dlm.models.families.base import BiasedConfig, Family
from dlm.models.families.names import EXPERTS, USUAL, layer_names, register_names
from dlm.models.moe import Experts
from dlm.models.transformer import LLaDAModelLM


class SDARConfig(BiasedConfig):
    """`model_type` sdar. `block_size` is the trained block length; queries and keys are normed in each head."""

    model_type = "sdar"
    written_as: ClassVar[str] = "SDARForCausalLM"
    reads_sliding_window: ClassVar[bool] = True
    qk_norm: ClassVar[str] = "head"
    natural: ClassVar = {"block_length": 4, "mask_token_id": 151_669}
    attribute_map = {**BiasedConfig.attribute_map, "block_length": "block_size"}

    block_size: int | None = None


class SDARMoEConfig(SDARConfig):
    """`model_type` sdar_moe: Qwen3-MoE's fields. A layer is a mixture unless `mlp_only_layers` names it or
    `decoder_sparse_step` passes it over."""

    model_type = "sdar_moe"
    written_as: ClassVar[str] = "SDARMoeForCausalLM"

    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: list | None = None

    @property
    def experts(self) -> Experts:
        step, dense = self.decoder_sparse_step, self.mlp_only_layers or ()
        return Experts(
            layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(self.num_hidden_layers)),
            number=self.num_experts,
            chosen=self.num_experts_per_tok,
            width=self.moe_intermediate_size,
            normalise=self.norm_topk_prob,
        )


class SDARLM(LLaDAModelLM):
    config_class = SDARConfig


class SDARMoELM(LLaDAModelLM):
    config_class = SDARMoEConfig


register_names(SDARLM, layer_names(USUAL))
register_names(SDARMoELM, [*layer_names({**USUAL, "mlp.gate.weight": "moe.router"}), *EXPERTS])

# block_diffusion_generate with low_confidence_dynamic.
SAMPLING = {
    "method": "block_causal",
    "commit": "dynamic",
    "threshold": 0.85,
    "temperature": 1.0,
    "tempered_confidence": True,
    "whole_blocks": True,
    "stop_at_eos": True,
}
FAMILIES = (
    Family("sdar", SDARConfig, SDARLM, SAMPLING),
    Family("sdar_moe", SDARMoEConfig, SDARMoELM, SAMPLING),
)
