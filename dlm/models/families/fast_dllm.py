"""Fast-dLLM v2 (arXiv:2509.26328): Qwen2's layout, block-causal with blocks of 32, logits shifted."""

from __future__ import annotations

from typing import ClassVar

from dlm.models.families.base import Family, FamilyConfig
from dlm.models.families.names import USUAL, layer_names, register_names
from dlm.models.transformer import LLaDAModelLM


class FastDLLMConfig(FamilyConfig):
    """`model_type` Fast_dLLM_Qwen. `bd_size` is the trained block length."""

    model_type = "Fast_dLLM_Qwen"
    written_as: ClassVar[str] = "Fast_dLLM_QwenForCausalLM"
    reads_sliding_window: ClassVar[bool] = True
    qkv_bias: ClassVar[bool] = True
    block_lengths: ClassVar[str] = "divisors"
    natural: ClassVar = {"block_length": 32, "shift_logits": True, "mask_token_id": 151_665, "eos_token_id": 151_645}
    attribute_map = {**FamilyConfig.attribute_map, "block_length": "bd_size"}

    bd_size: int | None = None


class FastDLLMLM(LLaDAModelLM):
    config_class = FastDLLMConfig


register_names(FastDLLMLM, layer_names(USUAL))

# generate: sub-blocks of 8; the first token of a block comes from the block before.
FAMILY = Family(
    name="Fast_dLLM_Qwen",
    config=FastDLLMConfig,
    model=FastDLLMLM,
    sampling={
        "method": "block_causal",
        "commit": "dynamic",
        "threshold": 0.9,
        "sub_block_length": 8,
        "commit_first": True,
        "whole_blocks": True,
        "stop_at_eos": True,
    },
)
