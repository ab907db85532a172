"""Low-rank adapters through PEFT: put on a model, and added to its weights for the checkpoint that is exported."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


def add_lora(model, rank: int, alpha: float, targets: tuple[str, ...], seed: int):
    """A PeftModel around `model` in which only adapters of this rank are trained, scaled by alpha / rank.

    targets: names of the linear layers of a block that get one; the output projection never does, nor do the experts
    of a mixture, which share one tensor. Of `TARGETS` those that the model has.
    Errors: PEFT is not installed; a name that no layer has.
    """
    import torch

    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("--lora needs PEFT; install it with: pip install 'dlm[lora]'") from error
    layers = {name.rpartition(".")[2] for name, _ in model.named_modules() if ".blocks." in name}
    known = [name for name in TARGETS if name in layers]
    targets = tuple(known) if targets == TARGETS else targets
    for target in targets:
        if target not in layers:
            raise ValueError(f"lora_targets has {target!r}, which no layer is called; choose from {', '.join(known)}")
    torch.manual_seed(seed)
    # not the output projection, which is called ff_out too
    pattern = rf".*\.blocks\.\d+\.(moe\.shared\.)?({'|'.join(targets)})"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what has another name by now
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, lora_dropout=0.0))


def merged(model, state: dict[str, Tensor], weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The state of the plain model with the adapters of a PeftModel added to its weights, in their own number type.

    state: the PeftModel's, whole (of a sharded model: `sharding.whole_state`). weights: those that replace adapters by
    name (their moving average).
    """
    state, adapter = state | (weights or {}), model.active_adapter
    made = {_plain(name): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if not hasattr(layer, "base_layer"):
            continue
        low, high = (state[f"{name}.lora_{side}.{adapter}.weight"].float() for side in "AB")
        weight = made[key := _plain(f"{name}.weight")]
        made[key] = (weight.float() + layer.scaling[adapter] * (high @ low).to(weight.device)).to(weight.dtype)
    return made


def _plain(name: str) -> str:
    """The name in the plain model of a tensor of a PeftModel."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
