"""Runs the pretraining recipe under DeepSpeed's ZeRO on CPU processes; test_zero.py starts it once for each.

Accelerate reads its DeepSpeed settings on accelerators alone: this script gives it the same settings on CPUs.
"""

import os
import sys

from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType

from dlm.training import accelerator as accelerators
from dlm.training import recipe
from train.pretrain import main


def make_accelerator(config):
    accelerator = accelerators.make_accelerator(config)
    assert accelerator.num_processes > 1
    import deepspeed

    deepspeed.init_distributed("gloo")
    for shared in (PartialState._shared_state, accelerator.state._shared_state):
        shared["distributed_type"] = DistributedType.DEEPSPEED
    plugin = DeepSpeedPlugin(zero_stage=int(os.environ["ZERO_STAGE"]))
    plugin.set_mixed_precision(config.precision)
    accelerator.state.deepspeed_plugins = {"default": plugin}
    plugin.select(_from_accelerator_state=True)
    accelerator.deepspeed_engine_wrapped = None
    return accelerator


recipe.make_accelerator = make_accelerator
sys.exit(main(sys.argv[1:]))
