"""Weights that several processes share: gathered whole, cut into shares, checked."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dlm.models.predictor import as_predictor
from dlm.training import zero


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor alone (a DTensor, as FSDP2 makes them, or ZeRO-3's)."""
    return hasattr(tensor, "full_tensor") or zero.is_divided(tensor)


def whole(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors with the parts of all processes, which all call this; sharded ones go to the CPU of those that keep.

    One tensor at a time is whole on a device, and where `keep` is false nothing of a sharded one stays.
    """
    made = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            full = tensor.full_tensor()
            if not keep:
                continue
            tensor = full.cpu()
        made[name] = tensor
    return made


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state of a model, as `whole` gives it."""
    if zero.divides(model):
        return zero.gathered(model, keep)
    reshard(model)
    return whole(model.state_dict(), keep)


def whole_average(ema, model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The moving average of a model, as `whole` gives it."""
    if not zero.divides(model):
        return whole(ema.weights, keep)
    ema.swap(model)  # ZeRO-3 puts together what stands in the model's place
    try:
        made = zero.gathered(model, keep)
    finally:
        ema.swap(model)
    return {name: tensor for name, tensor in made.items() if name in ema.weights}


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, laid out as `like` is."""
    if zero.is_divided(like):
        return zero.share_of(tensor, like)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def check_sharding(accelerator, optimizers) -> None:
    """Errors: what this loop cannot do with FSDP1, or with the one optimizer that sharding leaves room for."""
    kind = str(accelerator.distributed_type.value)
    if kind not in ("FSDP", "DEEPSPEED"):
        return
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("FSDP1 flattens the weights that decay and moving average tell apart: set fsdp_version to 2")
    if len(optimizers) > 1:
        raise ValueError(
            "under FSDP and DeepSpeed Accelerate keeps the state of one optimizer alone, and muon is two with the "
            "AdamW beside it: use optimizer adamw"
        )


def check_processes(accelerator, before: int, folder) -> None:
    """Errors: DeepSpeed, and a checkpoint of another number of processes."""
    if accelerator.distributed_type.value == "DEEPSPEED" and before != accelerator.num_processes:
        raise ValueError(
            f"{folder} was made by {before} processes, now there are {accelerator.num_processes}: DeepSpeed's own "
            f"files need the same number; those of FSDP2 and DDP do not"
        )


def keep_sums_exact(accelerator, precision: str) -> None:
    """Under FSDP2 in bf16: weights travel in bf16, gradients are summed in fp32 (Accelerate's own default is bf16)."""
    if accelerator.distributed_type.value == "FSDP" and precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


@contextmanager
def tables_in_root(model):
    """While Accelerate prepares `model` for FSDP2: a tied table belongs to the root's group, whole from first to last.

    Accelerate looks for the modules of both tables and expects two; one that is input and output at once is used before
    and after all layers, which is what the root's group is for.
    """
    tied = model.get_input_embeddings() is model.get_output_embeddings()
    names = ("get_input_embeddings", "get_output_embeddings") if tied else ()
    for name in names:
        setattr(model, name, lambda: None)  # shadows the class's method
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


# -------------------------------------------------------------------------------------------------------------- EMA


@torch.no_grad()
def make_buffers(model: nn.Module) -> None:
    """Under FSDP2: a pass over one token, so that the buffers of whole weights, which live as long as the model, are
    made outside of inference mode. A sampler's pass would make tensors that no training pass may write to."""
    device = next(model.parameters()).device
    as_predictor(model)(torch.zeros((1, 1), dtype=torch.int64, device=device))


def reshard(model: nn.Module) -> None:
    """Under FSDP2 and ZeRO-3: drop the whole weights that a forward pass left behind."""
    if zero.divides(model):
        zero.release(model)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
