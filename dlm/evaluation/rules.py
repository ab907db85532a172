"""Decoding rules by name, as experiments compare them: `verify:0.001` -> fields of SamplingConfig."""

from __future__ import annotations

from dlm.utils.names import name_and_number

__all__ = ["RULES", "fields_of"]

REMASK = {"commit": "ancestral", "revise": "remask"}
# name: (fields of SamplingConfig, the one that a number after a colon sets).
RULES: dict[str, tuple[dict, str | None]] = {
    "none": ({}, None),
    "edit": ({"revise": "edit"}, "edit_threshold"),
    "shadow": ({"revise": "edit", "edit_shadow": True}, "edit_threshold"),
    "verify": ({"revise": "verify"}, "verify_threshold"),
    "ancestral": ({"commit": "ancestral"}, None),
    "cap": ({**REMASK, "remask": "cap"}, "remask_eta"),
    "rescale": ({**REMASK, "remask": "rescale"}, "remask_eta"),
    "confidence": ({**REMASK, "remask": "confidence"}, "remask_eta"),
    "loop": ({**REMASK, "remask": "loop"}, "remask_eta"),
    "threshold": ({"commit": "threshold"}, "threshold"),
    "stable": ({"commit": "stable"}, "threshold"),
    "pipeline": ({"method": "pipeline", "commit": "threshold"}, "threshold"),
}


def fields_of(rule: str) -> dict:
    """`verify:0.01` -> fields of SamplingConfig.

    Raises ValueError as `name_and_number`.
    """
    name, number = name_and_number("rule", rule, {name: field for name, (_, field) in RULES.items()})
    return RULES[name][0] | number
