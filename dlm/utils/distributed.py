"""Several processes of one job: rank, gather, process-group teardown."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence

LETTING_GO_SECONDS = 0.1  # for threads of a group that DTensor still remembers: they go on, and need the interpreter


class Sharing:
    """Rank and size of this process, and collectives between the processes of a job (`accelerate launch`).

    cpu: whether they are to run on a CPU although there are GPUs. device: where this process's model belongs.
    """

    def __init__(self, cpu: bool = False) -> None:
        self.rank, self.size, self.device = 0, 1, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            state = PartialState(cpu=cpu or not torch.cuda.is_available())
            self.rank, self.size, self.device = state.process_index, state.num_processes, str(state.device)

    def gather(self, items: list) -> list:
        """The items of all processes, in order of their rank; every process calls this."""
        if self.size == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def share(self, items: Sequence) -> list:
        """This process's share of what all processes list in the same order."""
        return list(items[self.rank :: self.size])


def leave_processes(failed: bool = False) -> None:
    """Destroys the process groups before the interpreter shuts down; without groups it does nothing.

    Gloo's threads hold the tensors that they send, and one that lets go of a tensor while the interpreter shuts down
    aborts the process (PyTorch's issue 190489). They end with the last reference to their group.

    failed: this process stops on an error, and the others may be waiting for it. Groups of NCCL, whose processes must
        agree on the end, are then left as they are.
    """
    if "torch" not in sys.modules:  # a command that only printed its help
        return
    import torch

    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    gloo = "gloo" in distributed.get_backend()
    if failed and not gloo:
        return
    distributed.destroy_process_group()
    if "accelerate" in sys.modules:  # its state would speak of the group that is gone
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    if gloo:
        time.sleep(LETTING_GO_SECONDS)
