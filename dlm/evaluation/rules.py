"""Decoding rules by name, as experiments compare them: `verify:0.001` -> fields of SamplingConfig."""

from __future__ import annotations

from dlm.utils.names import check_name

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

    Raises ValueError for an unknown rule, a value that is no number, and a number after a rule that takes none.
    """
    name, colon, value = rule.partition(":")
    check_name("rules", name, RULES)
    fields, number = RULES[name]
    if not colon:
        return dict(fields)
    if number is None:
        raise ValueError(f"rule {rule!r}: {name} takes no number")
    try:
        return fields | {number: float(value)}
    except ValueError:
        raise ValueError(f"rule {rule!r}: what follows the colon must be a number, as in verify:0.01") from None
