"""Families of checkpoints: what a `config.json` names -> configuration, model class, names of tensors, sampling.

Everything else works for all of them, because there is one transformer and one loop. The next family is one more
table: a configuration, the names of its tensors, a `Family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from dlm.models.configuration import LLaDAConfig
from dlm.models.families import dream, fast_dllm, illada, llada2, llada_moe, qwen_llama, rnd1, sdar
from dlm.models.families.base import REFUSED, Family, FamilyConfig
from dlm.models.families.names import expected_tensors
from dlm.models.transformer import LLaDAModelLM

__all__ = ["FAMILIES", "LLADA", "Family", "FamilyConfig", "expected_tensors", "family_of", "recognise"]

LLADA = Family("llada", LLaDAConfig, LLaDAModelLM, required=("d_model", "n_layers", "n_heads", "vocab_size"))

# Name of a family, as people say it -> its table. Two share the `model_type` llada: the mixture has `num_experts`.
FAMILIES: dict[str, Family] = {
    "llada": LLADA,
    "llada-moe": llada_moe.FAMILY,
    **{
        family.name: family
        for family in (
            *(table.FAMILY for table in (illada, dream, llada2)),
            *sdar.FAMILIES,
            *(table.FAMILY for table in (fast_dllm, rnd1)),
            *qwen_llama.FAMILIES,
        )
    },
}
# Other spellings of a `model_type`: dllm's class for LLaDA-MoE.
ALIASES = {"lladamoe": "llada-moe"}


def recognise(fields: Any, where: str = "config.json") -> Family:
    """The family of a checkpoint by the fields of its config.json.

    Raises ValueError for one that is not there, that is near but not one of ours (vision, encoder and decoder), or
    whose config.json lacks what it needs.
    """
    name = fields.get("model_type") if isinstance(fields, Mapping) else None
    key = ALIASES.get(name, name)
    if key == "llada" and fields.get("num_experts") is not None:
        key = "llada-moe"
    if not isinstance(key, str) or key not in FAMILIES:
        known = ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))
        raise ValueError(f"{where} holds a model of family {name!r}, which dlm does not read: it reads {known}")
    family = FAMILIES[key]
    for field, meaning in REFUSED.items():
        if field.endswith(("_config", "_tower", "_type", "decoder")) and fields.get(field):
            raise ValueError(
                f"{where} has {field}, which asks for {meaning}: dlm reads text models of family {name!r} alone"
            )
    missing = [field for field in family.required if fields.get(field) is None]
    if missing and family is not LLADA:
        raise ValueError(f"{where} of family {name!r} has no {', '.join(missing)}: the file is incomplete")
    return family


def family_of(model) -> Family:
    """The family of a model, or of a configuration."""
    kind = type(getattr(model, "config", model))
    return next((family for family in FAMILIES.values() if family.config is kind), LLADA)


for family in FAMILIES.values():
    if not family.autoregressive:  # transformers has classes of its own for those
        if family is not FAMILIES["llada-moe"]:
            AutoConfig.register(family.name, family.config, exist_ok=True)
        for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
            auto.register(family.config, family.model, exist_ok=True)
