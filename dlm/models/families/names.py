"""Names of tensors: the authors' in files, the transformer's in memory, in both directions.

transformers renames while it reads and writes (`WeightRenaming`, `WeightConverter`), so that sharded folders,
device maps and types work as for its own models. `\\1` in a pattern on the left stands for the group on the right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)

__all__ = ["EXPERTS", "USUAL", "expected_tensors", "fused_qkv", "layer_names", "register_names"]

LAYER, BLOCK = r"^model.layers.\1", r"^model.transformer.blocks.(\d+)"

# The usual names of the hub (Llama, Qwen): of a layer, theirs and ours; then those outside of layers.
USUAL = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
OUTSIDE = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}


def layer_names(names: dict[str, str], outside: dict[str, str] | None = None) -> list:
    """Renamings for the parts of a layer, theirs -> ours, and for what stands outside of layers."""
    inside = [WeightRenaming(f"{LAYER}.{theirs}", f"{BLOCK}.{ours}") for theirs, ours in names.items()]
    return inside + [WeightRenaming(f"^{a}", f"^{b}") for a, b in (OUTSIDE if outside is None else outside).items()]


# Experts one by one in files, stacked in memory.
EXPERTS = [
    WeightRenaming(f"{LAYER}.mlp.experts", f"{BLOCK}.moe.each"),
    WeightConverter(
        ["moe.each.*.gate_proj.weight", "moe.each.*.up_proj.weight"],
        "moe.gate_up",
        [MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter("moe.each.*.down_proj.weight", "moe.down", [MergeModulelist(dim=0)]),
]


class _Rows(ConversionOps):
    """One tensor with the rows of queries, keys and values <-> three."""

    def __init__(self, joined: bool = False):
        self.joined = joined

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], source_patterns, target_patterns, config=None, **_):
        if self.joined:
            pieces = [input_dict[name] for name in source_patterns]
            pieces = [piece[0] if isinstance(piece, list) else piece for piece in pieces]
            return {target_patterns[0]: torch.cat(pieces)}
        fused = next(iter(input_dict.values()))
        fused = fused[0] if isinstance(fused, list) else fused
        kv = config.n_kv_heads * config.head_dim
        sizes = [config.n_heads * config.head_dim, kv, kv]
        return {
            name: piece.contiguous() for name, piece in zip(target_patterns, fused.split(sizes, dim=0), strict=True)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return _Rows(not self.joined)


def fused_qkv(theirs: str) -> list[WeightConverter]:
    """One projection `theirs` of a layer <-> ours of queries, keys and values."""
    return [
        WeightConverter(f"{theirs}.{kind}", [f"{name}_proj.{kind}" for name in "qkv"], [_Rows()])
        for kind in ("weight", "bias")
    ]


def register_names(model: type, mapping: list) -> None:
    """Makes transformers read and write the class's tensors by the names of its authors."""
    register_checkpoint_conversion_mapping(model.__name__, mapping, overwrite=True)


def expected_tensors(model: type, config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that files of this configuration hold, by the names of the authors.

    Computed on the meta device: no memory is taken.
    """
    with torch.device("meta"):
        empty = model(config)
    state: dict[str, Tensor] = dict(empty.state_dict())
    if config.weight_tying:
        state.pop("model.transformer.ff_out.weight", None)
    if get_model_conversion_mapping(empty, add_legacy=False):
        state = revert_weight_conversion(empty, state)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
