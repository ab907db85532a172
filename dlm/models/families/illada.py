"""iLLaDA (arXiv:2606.25331): Llama's layout with grouped heads and full attention, trained from scratch."""

from __future__ import annotations

from typing import ClassVar

from dlm.models.families.base import BiasedConfig, Family
from dlm.models.families.names import USUAL, layer_names, register_names
from dlm.models.transformer import LLaDAModelLM


class ILLaDAConfig(BiasedConfig):
    """`model_type` illada. The file names no mask token: 5, as the authors' page says. `layer_norm_eps` would ask for
    LayerNorm in place of RMSNorm, `resid_pdrop` for dropout in training."""

    model_type = "illada"
    written_as: ClassVar[str] = "ILLaDAForCausalLM"
    only: ClassVar = {**BiasedConfig.only, "layer_norm_eps": (None,)}
    natural: ClassVar = {"mask_token_id": 5}

    max_position_embeddings: int = 8192
    mlp_bias: bool = False
    layer_norm_eps: float | None = None


class ILLaDALM(LLaDAModelLM):
    config_class = ILLaDAConfig


register_names(ILLaDALM, layer_names(USUAL))

# LLaDA's generate, of variable length: a block more until end-of-text.
FAMILY = Family(name="illada", config=ILLaDAConfig, model=ILLaDALM, sampling={"grow": "block", "stop_at_eos": True})
