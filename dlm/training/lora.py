"""Low-rank adapters through PEFT: add them to a model, and merge them into it for the checkpoint that is exported."""

from __future__ import annotations

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
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, lora_dropout=0.0))


def merge_lora(model, weights: dict[str, Tensor] | None):
    """The plain model with the adapters added to its weights; `weights` (a moving average) replace adapters by name."""
    import torch

    with torch.no_grad():
        if weights is not None:
            parameters = dict(model.named_parameters())
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        return model.merge_and_unload()
