"""SDAR (arXiv:2510.06303) and TraDo: Qwen3's layout, block-causal, without a shift."""

from __future__ import annotations

from typing import ClassVar

from dlm.models.families.base import BiasedConfig, Family
from dlm.models.families.names import USUAL, layer_names, register_names
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


class SDARLM(LLaDAModelLM):
    config_class = SDARConfig


register_names(SDARLM, layer_names(USUAL))

# block_diffusion_generate with low_confidence_dynamic.
FAMILY = Family(
    name="sdar",
    config=SDARConfig,
    model=SDARLM,
    sampling={
        "method": "block_causal",
        "commit": "dynamic",
        "threshold": 0.85,
        "temperature": 1.0,
        "tempered_confidence": True,
        "whole_blocks": True,
        "stop_at_eos": True,
    },
)
