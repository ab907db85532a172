"""Dream (arXiv:2508.15487), DiffuCoder and DreamOn: Qwen2's layout with full attention and shifted logits."""

from __future__ import annotations

from typing import ClassVar

from dlm.models.families.base import Family, FamilyConfig
from dlm.models.families.names import USUAL, layer_names, register_names
from dlm.models.transformer import LLaDAModelLM


class DreamConfig(FamilyConfig):
    """`model_type` Dream. Biases of q, k and v alone; `use_sliding_window` is not read, as in the authors' code."""

    model_type = "Dream"
    written_as: ClassVar[str] = "DreamModel"
    qkv_bias: ClassVar[bool] = True
    natural: ClassVar = {"shift_logits": True, "mask_token_id": 151_666}


class DreamLM(LLaDAModelLM):
    config_class = DreamConfig


register_names(DreamLM, layer_names(USUAL))

# diffusion_generate: the whole region at once, counts by time, confidence of what is sampled from.
FAMILY = Family(
    name="Dream",
    config=DreamConfig,
    model=DreamLM,
    sampling={
        "block_length": 131_072,
        "split": "time",
        "confidence": "entropy",
        "tempered_confidence": True,
        "temperature": 0.2,
        "top_p": 0.95,
    },
)
