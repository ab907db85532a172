"""DeepSpeed's ZeRO-2 and ZeRO-3 under the training loop: what it is told, and how the weights it divides are reached.

Under ZeRO-3 a parameter is empty but for the moment of its use; `ds_tensor` is the share that this process holds, flat
and padded to the same size everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def configure(accelerator, config) -> None:
    """Tell DeepSpeed the settings of the run, if it is what drives it; its own configuration names the stage alone.

    Weights and communication are fp32, with bf16 where autocast has it, as without DeepSpeed. Errors: a stage without
    sharding, fp16.
    """
    if accelerator.distributed_type.value != "DEEPSPEED":
        return
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage < 2:
        raise ValueError(f"DeepSpeed's zero_stage is {plugin.zero_stage}: use 2 or 3, or DDP, which is the same as 0")
    if config.precision == "fp16":
        raise ValueError("precision fp16 under DeepSpeed has a loss scale of its own: use precision bf16")
    rows = config.batch_size // (accelerator.num_processes * config.accumulation)
    plugin.deepspeed_config.update(
        {
            "train_micro_batch_size_per_gpu": rows,
            "train_batch_size": rows * accelerator.num_processes,
            "gradient_accumulation_steps": 1,  # the loop says itself which backward pass is a step's last
            "gradient_clipping": config.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "torch_autocast": {
                "enabled": config.precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": [],
            },
        }
    )  # fmt: skip
    # small parameters too are empty between uses: the moving average takes their place in `ds_tensor` alone
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def is_divided(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds the parameter."""
    return hasattr(parameter, "ds_tensor")


def divides(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds any parameter of the model."""
    return any(is_divided(parameter) for parameter in model.parameters())


def held(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: its share under ZeRO-3, otherwise the parameter."""
    return parameter.ds_tensor if is_divided(parameter) else parameter.detach()


def release(model: nn.Module) -> None:
    """Empty the parameters that a forward pass left whole: the next one gathers what `ds_tensor` holds then."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for parameter in model.parameters():
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            parameter.partition()


def share_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's share of a whole tensor that has the shape of a divided parameter."""
    size = parameter.ds_tensor.numel()
    flat = tensor.reshape(-1).to(parameter.ds_tensor)
    flat = torch.cat([flat, flat.new_zeros(size * torch.distributed.get_world_size() - flat.numel())])
    return flat[torch.distributed.get_rank() * size :][:size]


def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Every divided parameter whole, on the CPU of the processes that keep; all processes call this."""
    import deepspeed

    made = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if keep:
                made[name] = parameter.detach().cpu().clone()
    return made
