"""One model on several devices by transformers' own tensor parallelism: what must hold, and how to ask for it."""

from __future__ import annotations

import atexit
import os

from dlm.kernels.linear import QUANTIZED
from dlm.models.fields import LLaDAFields
from dlm.utils.distributed import leave_processes

__all__ = ["shared_out"]


def shared_out(config: LLaDAFields, dtype: str) -> dict:
    """Options of `from_pretrained` that share the layers out over the processes that torchrun started.

    Raises ValueError where it started none, or this model's layers cannot be shared by so many.
    """
    processes = int(os.environ.get("WORLD_SIZE", 0))
    if "RANK" not in os.environ or not processes:
        raise ValueError(
            "tensor_parallel needs the processes of torchrun, and this is none of them: "
            "torchrun --nproc-per-node 2 -m dlm serve --tensor-parallel"
        )
    if dtype in QUANTIZED:
        raise ValueError(f"dtype is {dtype}, whose layers cannot be shared out: use bfloat16 with tensor_parallel")
    if config.attention_layer_norm:
        raise ValueError("this model norms its heads together, so they cannot be shared out: leave tensor_parallel out")
    if config.grid_width is not None:
        raise ValueError(
            "this model's heads see a grid in turn, so they cannot be shared out: leave tensor_parallel out"
        )
    if config.n_kv_heads % processes or config.mlp_hidden_size % processes:
        raise ValueError(
            f"{processes} processes cannot share {config.n_kv_heads} key heads and an MLP of {config.mlp_hidden_size}: "
            "start a number that divides both"
        )
    atexit.register(leave_processes)
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):  # releases of transformers that take the plan itself
        return {"tp_plan": "auto"}
