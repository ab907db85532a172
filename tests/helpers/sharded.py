"""`sharded.py RECIPE options`: runs a recipe under FSDP2 on CPU processes; a test starts it once for each.

Accelerate reads its FSDP settings on accelerators alone, though FSDP2 itself shards over CPU processes just as well:
this script tells Accelerate that it is sharding, and changes nothing else.
"""

import importlib
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from dlm.training import accelerator as accelerators
from dlm.training import recipe


def make_accelerator(config):
    accelerator = accelerators.make_accelerator(config)
    assert accelerator.num_processes > 1
    for shared in (PartialState._shared_state, accelerator.state._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LLaDABlock"],
        cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    assert accelerator.is_fsdp2
    return accelerator


recipe.make_accelerator = make_accelerator
sys.exit(importlib.import_module(f"train.{sys.argv[1]}").main(sys.argv[2:]))
