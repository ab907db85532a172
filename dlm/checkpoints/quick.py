"""A packed copy straight from a checkpoint's file, without transformers' modelling code, whose import takes seconds.

What `open_model` would read into a model and `kernels.packed` would copy from there goes from the file to the copy.
That holds for the commonest case; any other, an error too, is left to the model, which knows what to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dlm.checkpoints.folder import WEIGHTS, Tensors
from dlm.kernels.linear import kind_for
from dlm.kernels.packed import Packed
from dlm.kernels.packing import LARGEST
from dlm.models.fields import LLaDAFields

if TYPE_CHECKING:
    from dlm.checkpoints.load import Placing

__all__ = ["fits", "packed_from"]

BODY = "model.transformer"
NORMS, QKV, MLP = ("attn_norm", "ff_norm"), ("q_proj", "k_proj", "v_proj"), ("ff_proj", "up_proj", "ff_out")


def packed_from(folder: Path, config: Any, tensors: Tensors, placing: Placing) -> Packed | None:
    """The predictor of a checkpoint of LLaDA's layout with its weights in one file, to run in float32 on a CPU with
    this machine's usual attention; else None. tensors: the headers of its files."""
    cpu = torch.device("cpu")
    device = str(placing.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    whole = placing.whole == torch.float32 or (placing.whole == "auto" and 4 * tensors.parameters <= LARGEST)
    elsewhere = placing.device_map is not None or placing.cuda_graphs or placing.tensor_parallel or placing.bits
    usual = device == "cpu" and whole and not elsewhere and placing.attn_implementation in (None, "sdpa")
    plain = isinstance(config, LLaDAFields) and config.layer_repeats == 1 and config.grid_width is None
    if not plain or not usual or kind_for(cpu, torch.float32) is None:
        return None
    if 4 * tensors.parameters > LARGEST or not fits(config, tensors) or not (folder / WEIGHTS).is_file():
        return None
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            weights = {name: file.get_tensor(name).float() for name in tensors.shapes}
    except (OSError, SafetensorError):
        return None
    if not bool(torch.stack([weight.sum() for weight in weights.values()]).isfinite().all()):
        return None
    config._attn_implementation = "sdpa"
    skeleton = _skeleton(config, weights, cpu)
    skeleton.compiled = placing.compile
    weights.clear()  # the skeleton alone holds them, and lets them go one by one
    return Packed(skeleton, release=True)


def fits(config: LLaDAFields, tensors: Tensors) -> bool:
    """Whether the files hold what the configuration asks for, neither more nor less, in a type that is read here."""
    if config.n_layers > len(tensors.shapes) or not tensors.dtypes <= {"F32", "BF16", "F16"}:
        return False
    return dict(tensors.shapes) == expected(config)


def expected(config: LLaDAFields) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint with this configuration, and their shapes."""
    size, width, kv = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    hidden = config.mlp_hidden_size
    linears = {name: (rows, size, config.qkv_bias) for name, rows in zip(QKV, (width, kv, kv), strict=True)}
    linears |= {"attn_out": (size, width, config.out_bias)}
    linears |= dict.fromkeys(MLP[:2], (hidden, size, config.mlp_bias)) | {"ff_out": (size, hidden, config.mlp_bias)}
    shapes: dict[str, tuple[int, ...]] = {f"{BODY}.wte.weight": (config.embedding_size, size)}
    shapes[f"{BODY}.ln_f.weight"] = (size,)
    if not config.weight_tying:
        shapes[f"{BODY}.ff_out.weight"] = (config.embedding_size, size)
        if config.include_bias:
            shapes[f"{BODY}.ff_out.bias"] = (config.embedding_size,)
    norms = dict.fromkeys(NORMS, size)
    if config.qk_norm is not None:
        norms |= {"q_norm": width, "k_norm": kv}
    for layer in range(config.n_layers):
        block = f"{BODY}.blocks.{layer}"
        shapes |= {f"{block}.{name}.weight": (length,) for name, length in norms.items()}
        shapes |= {f"{block}.{name}.weight": (rows, columns) for name, (rows, columns, _) in linears.items()}
        shapes |= {f"{block}.{name}.bias": (rows,) for name, (rows, _, bias) in linears.items() if bias}
    return shapes


@dataclass(eq=False)
class _Weights:
    """A module's weights, under the names that the module has."""

    weight: Tensor | None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Block:
    """A layer as `Packed` reads it."""

    config: LLaDAFields
    head_dim: int
    qk_norm: str | None
    parts: dict[str, _Weights]
    mixture: bool = field(default=False, init=False)

    def __getattr__(self, name: str) -> _Weights:
        try:
            return self.parts[name]
        except KeyError:
            raise AttributeError(name) from None


def _skeleton(config: LLaDAFields, weights: dict[str, Tensor], device: torch.device) -> SimpleNamespace:
    """What `Packed` reads of a model."""

    def part(name: str) -> _Weights:
        return _Weights(weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    names = [*NORMS, *QKV, "attn_out", *MLP, *(("q_norm", "k_norm") if config.qk_norm is not None else ())]
    head_dim, qk_norm = config.head_dim, config.qk_norm
    blocks = [
        _Block(config, head_dim, qk_norm, {name: part(f"{BODY}.blocks.{layer}.{name}") for name in names})
        for layer in range(config.n_layers)
    ]
    body = SimpleNamespace(wte=part(f"{BODY}.wte"), ln_f=part(f"{BODY}.ln_f"), blocks=blocks)
    if not config.weight_tying:
        body.ff_out = part(f"{BODY}.ff_out")
    return SimpleNamespace(config=config, device=device, model=SimpleNamespace(transformer=body))
