"""Settings of the sampler from words `name=value`, as recipes and their YAML give them. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from dlm.sampling.config import SamplingConfig
from dlm.sampling.options import NEEDS, SAMPLING
from dlm.utils.names import nearest
from dlm.utils.settings import refuse_idle

__all__ = ["sampling_of"]

SWITCH = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


def sampling_of(words: Sequence[str]) -> SamplingConfig:
    """The settings that words such as `gen_length=64` give; fields may also be written with hyphens.

    Raises ValueError for a word without =, an unknown field (with the nearest name), a value of another type, and a
    setting that has no effect beside the others.
    """
    fields = {}
    for word in words:
        name, sign, text = str(word).strip().partition("=")
        name = name.strip().replace("-", "_")
        if not sign or name not in SAMPLING:
            near = nearest(name, SAMPLING)
            raise ValueError(f"sampling has {word!r}: give name=value; the nearest name is {near!r}")
        fields[name] = _value(name, text.strip())
    made = SamplingConfig(**fields)
    refuse_idle(fields, made, NEEDS)
    return made


def _value(name: str, text: str):
    kind = SAMPLING[name][0]
    try:
        return SWITCH[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = "true or false" if kind is bool else {int: "a whole number", float: "a number"}.get(kind, "a text")
        raise ValueError(f"sampling has {name}={text}: it must be {wanted}") from None
