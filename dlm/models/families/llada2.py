"""LLaDA2.0 and 2.1 (arXiv:2512.15745, arXiv:2602.08676): mixtures of experts, half rotary, block-causal."""

from __future__ import annotations

from typing import ClassVar

from dlm.models.families.base import Family, FamilyConfig
from dlm.models.families.names import EXPERTS, fused_qkv, layer_names, register_names
from dlm.models.moe import Experts
from dlm.models.transformer import LLaDAModelLM


class LLaDA2Config(FamilyConfig):
    """`model_type` llada2_moe.

    A sigmoid router chooses by groups and a bias; `norm_topk_prob` and `score_function` are not read, as in the
    authors' code. No block length stands in the file: 32 is what the released models were trained with.
    """

    model_type = "llada2_moe"
    written_as: ClassVar[str] = "LLaDA2MoeModelLM"
    reads_sliding_window: ClassVar[bool] = True
    block_lengths: ClassVar[str] = "any"
    only: ClassVar = {
        **FamilyConfig.only,
        "use_rmsnorm": (True, None),
        "using_split_qkv_in_self_attention": (False, None),
        "norm_head": (False, None),
        "router_dtype": ("fp32", None),
        # LLaDA2.2: experts are limited for each block, and two tokens insert and delete.
        "expert_capacity": (None,),
        "delete_token_id": (None,),
        "split_token_id": (None,),
    }
    natural: ClassVar = {"block_length": 32, "mask_token_id": 156_895, "eos_token_id": 156_892}

    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 16_384
    partial_rotary_factor: float = 0.5
    first_k_dense_replace: int = 0
    num_experts: int | None = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    num_shared_experts: int | None = 0
    n_group: int | None = 8
    topk_group: int | None = 4
    routed_scaling_factor: float = 2.5
    use_qk_norm: bool | None = None
    use_qkv_bias: bool = False
    use_bias: bool = True

    @property
    def partial_rotary(self) -> float:
        return self.partial_rotary_factor

    @property
    def qk_norm(self) -> str | None:
        return None if self.use_qk_norm is False else "head"

    @property
    def qkv_bias(self) -> bool:
        return self.use_qkv_bias

    @property
    def out_bias(self) -> bool:
        return self.use_bias

    @property
    def experts(self) -> Experts | None:
        if self.num_experts is None:
            return None
        width = self.moe_intermediate_size or self.intermediate_size
        return Experts(
            layers=tuple(layer >= self.first_k_dense_replace for layer in range(self.num_hidden_layers)),
            number=self.num_experts,
            chosen=self.num_experts_per_tok,
            width=width,
            shared=width * (self.num_shared_experts or 0),
            score="sigmoid",
            bias="choose",
            groups=self.n_group or 1,
            kept=self.topk_group or 1,
            normalise=True,
            scale=self.routed_scaling_factor,
        )


class LLaDA2LM(LLaDAModelLM):
    config_class = LLaDA2Config


NAMES = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "query_key_value",
    "attention.query_layernorm": "q_norm",
    "attention.key_layernorm": "k_norm",
    "attention.dense": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "mlp.gate.weight": "moe.router",
    "mlp.gate.expert_bias": "moe.router_bias",
    "mlp.shared_experts.gate_proj": "moe.shared.ff_proj",
    "mlp.shared_experts.up_proj": "moe.shared.up_proj",
    "mlp.shared_experts.down_proj": "moe.shared.ff_out",
}
OUTSIDE = {
    "model.word_embeddings": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
register_names(LLaDA2LM, [*layer_names(NAMES, OUTSIDE), *EXPERTS, *fused_qkv("query_key_value")])

# generate: all above the threshold, or else the quota of one in 32; stops after the block that holds end-of-text.
FAMILY = Family(
    name="llada2_moe",
    config=LLaDA2Config,
    model=LLaDA2LM,
    sampling={
        "method": "block_causal",
        "commit": "dynamic",
        "threshold": 0.95,
        "whole_blocks": True,
        "stop_at_eos": True,
    },
)
