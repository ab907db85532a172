"""Rotary positions: angles for slots, full or partial, and the known ways to stretch them to longer texts.

Shapes: B rows, Q slots, H heads, D head size, R rotary size (the first R of D dimensions turn).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SCALINGS", "Rotary", "rotary_angles", "rotary_of", "rotate"]


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of one model.

    size: how many of a head's first dimensions turn, even. theta: the base. scaling: a name in `SCALINGS`, with
    `factor` and what that one reads; `trained` is the length before stretching. precise: angles stay in fp32.
    Raises ValueError for sizes and names that cannot work.
    """

    size: int
    theta: float
    scaling: str = "default"
    factor: float = 1.0
    trained: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    precise: bool = True

    def __post_init__(self):
        if self.size < 0 or self.size % 2:
            raise ValueError(f"rotary positions turn {self.size} dimensions of a head: it must be an even number")
        if self.scaling not in SCALINGS:
            raise ValueError(f"rope scaling {self.scaling!r} is not one of {', '.join(SCALINGS)}")
        if self.factor < 1 or (self.scaling != "default" and self.scaling != "linear" and self.trained < 1):
            raise ValueError(
                f"rope scaling {self.scaling!r} has factor {self.factor} and trained length {self.trained}: "
                "give a factor of 1 or more, and the length it was trained with"
            )


def unscaled(rotary: Rotary, inverse: Tensor) -> Tensor:
    return inverse


def linear(rotary: Rotary, inverse: Tensor) -> Tensor:
    """Position interpolation (arXiv:2306.15595): every frequency over `factor`."""
    return inverse / rotary.factor


def llama3(rotary: Rotary, inverse: Tensor) -> Tensor:
    """Llama 3.1's rule: long waves over `factor`, short ones as they are, a linear blend between."""
    waves = 2 * math.pi / inverse
    blend = (rotary.trained / waves - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inverse / rotary.factor + blend * inverse


def yarn(rotary: Rotary, inverse: Tensor) -> Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): interpolate the dimensions that turn less than `beta_slow` times over the
    trained length, keep those above `beta_fast`, a ramp between."""

    def dimension(turns: float) -> float:
        size, base = rotary.size, math.log(rotary.theta)
        return size * math.log(rotary.trained / (turns * 2 * math.pi)) / (2 * base)

    low, high = dimension(rotary.beta_fast), dimension(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.size - 1)
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(len(inverse), device=inverse.device, dtype=inverse.dtype) - low) / (high - low)).clamp(0, 1)
    return inverse / rotary.factor * ramp + inverse * (1 - ramp)


# Name of a scaling -> frequencies (R / 2,) as stretched. `dynamic` changes the base with the length: `_base`.
SCALINGS = {"default": unscaled, "linear": linear, "llama3": llama3, "yarn": yarn, "dynamic": unscaled}


def rotary_of(size: int, theta: float, scaling: dict | None, length: int, *, precise: bool = True) -> Rotary:
    """Rotary positions from a configuration's `rope_theta`, `rope_scaling` and `max_position_embeddings`.

    Raises ValueError for a scaling that is not known, or that lacks what it needs.
    """
    fields = {} if scaling is None else dict(scaling)
    kind = fields.get("rope_type", fields.get("type", "default")) or "default"
    if kind in ("default", "mrope"):
        if kind == "mrope":
            raise ValueError("rope scaling 'mrope' is for images and video, which dlm does not read")
        return Rotary(size, float(theta), precise=precise)
    if kind not in SCALINGS:
        raise ValueError(f"rope scaling {kind!r} is not one of {', '.join(SCALINGS)}")
    if not isinstance(fields.get("factor"), int | float):
        raise ValueError(f"rope scaling {kind!r} has no factor: give rope_scaling a number named factor")
    needed = {"llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    for name in needed.get(kind, ()):
        if name not in fields:
            raise ValueError(f"rope scaling {kind!r} has no {name}: the checkpoint's config.json is incomplete")
    factor = float(fields["factor"])
    more = {
        name: fields[name]
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate")
        if fields.get(name) is not None
    }
    if kind == "yarn":
        more["attention_factor"] = _yarn_attention(fields, factor)
    trained = int(fields.get("original_max_position_embeddings") or length)
    return Rotary(size, float(theta), kind, factor, trained, precise=precise, **more)


def _yarn_attention(fields: dict, factor: float) -> float:
    """What multiplies cos and sin, so that scores grow with the length (arXiv:2309.00071, eq. 22)."""

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return grown(fields["mscale"]) / grown(fields["mscale_all_dim"])
    return grown(1.0)


def rotary_angles(positions: Tensor, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, Q, 1, R / 2), of the angles at these positions (RoFormer, arXiv:2104.09864, eq. 15).

    With `dynamic` scaling the base of a row grows with its last position, beyond the trained length.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, rotary.size, 2, device=positions.device, dtype=wide) / max(1, rotary.size)
    places = positions.to(wide)[..., None, None]
    if rotary.scaling == "default":
        angles = places / rotary.theta**exponents
    elif rotary.scaling == "dynamic":
        angles = places / _base(positions, rotary, wide) ** exponents
    else:
        angles = places * SCALINGS[rotary.scaling](rotary, 1 / rotary.theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    if rotary.attention_factor != 1:
        cos, sin = cos * rotary.attention_factor, sin * rotary.attention_factor
    return (cos, sin) if rotary.precise else (cos.to(dtype), sin.to(dtype))


def _base(positions: Tensor, rotary: Rotary, dtype: torch.dtype) -> Tensor:
    """The base of each row (B, 1, 1, 1) under dynamic NTK scaling: theta up to the trained length, above it
    theta * (factor * length / trained - (factor - 1)) ^ (R / (R - 2))."""
    length = (positions.amax(dim=-1, keepdim=True) + 1).clamp_min(rotary.trained).to(dtype)
    grown = rotary.factor * length / rotary.trained - (rotary.factor - 1)
    return (rotary.theta * grown ** (rotary.size / max(1, rotary.size - 2)))[..., None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + R/2}) of x (B, Q, H, D) by their angles, in the angles' precision; dimensions from
    R on pass."""
    size = 2 * cos.shape[-1]
    wide = x.to(cos.dtype)
    first, second = wide[..., :size].chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned if size == x.shape[-1] else (*turned, wide[..., size:]), dim=-1).to(x.dtype)
