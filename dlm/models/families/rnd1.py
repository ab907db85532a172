"""RND1 (Radical Numerics, RND1-Base-0910): Qwen3's mixture of experts with full attention and shifted logits."""

from __future__ import annotations

from typing import ClassVar

from dlm.models.families.base import BiasedConfig, Family
from dlm.models.families.names import EXPERTS, USUAL, layer_names, register_names
from dlm.models.moe import Experts
from dlm.models.transformer import LLaDAModelLM


class RND1Config(BiasedConfig):
    """`model_type` rnd1. Every layer is a mixture: `decoder_sparse_step`, `mlp_only_layers`, `intermediate_size` and
    windows are not read, as in the authors' code (which reads no sizes from the file at all, and ours does)."""

    model_type = "rnd1"
    written_as: ClassVar[str] = "RND1LM"
    qk_norm: ClassVar[str] = "head"
    only: ClassVar = {**BiasedConfig.only, "tie_word_embeddings": (False,)}
    natural: ClassVar = {"shift_logits": True, "mask_token_id": 151_669, "eos_token_id": 151_645}

    rope_scaling: dict | bool | None = None  # false is none
    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = True

    @property
    def experts(self) -> Experts:
        return Experts(
            layers=(True,) * self.num_hidden_layers,
            number=self.num_experts,
            chosen=self.num_experts_per_tok,
            width=self.moe_intermediate_size,
            normalise=self.norm_topk_prob,
        )


class RND1LM(LLaDAModelLM):
    config_class = RND1Config


register_names(RND1LM, [*layer_names({**USUAL, "mlp.gate.weight": "moe.router"}), *EXPERTS])

# diffusion_sample as the demo calls it: the whole region at once, the places of least entropy first.
FAMILY = Family(
    name="rnd1",
    config=RND1Config,
    model=RND1LM,
    sampling={
        "block_length": 131_072,
        "split": "floored",
        "confidence": "entropy",
        "tempered_confidence": True,
        "temperature": 0.01,
    },
)
