"""Steps made ahead of time by other processes, so that the one that drives the device does not wait for them.

A step is a function of (its number, the data, the settings): it does not matter who makes it, or when.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal

import torch

from dlm.data.streaming import StreamedExamples
from dlm.training.batches import Batches, StepBatches


def usual_workers(device: torch.device, data) -> int:
    """How many processes make batches where no number is given: none on a CPU, which has better use for its cores."""
    if device.type != "cuda" or isinstance(data, StreamedExamples) or not hasattr(os, "fork"):
        return 0
    return max(0, min(3, (os.cpu_count() or 1) // max(1, torch.cuda.device_count()) - 1))


def _die_with_parent() -> None:
    """On Linux: have the kernel end this process when its parent is gone, also where it waits for a pipe."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return


class Ahead:
    """next() -> the steps of `batches` from number `step` on, in order.

    workers: processes that share the steps out; each takes every row from a stream of its own and lays out the rows of
    its own steps. 0: a step is made here, when it is asked for. Close it at the end. Errors: as `Batches.next` raises
    them, wherever a step is made; RuntimeError for a worker that was killed.
    """

    def __init__(self, batches: Batches, step: int, workers: int):
        self.batches, self.step, self.workers = batches, step, workers
        self._pipes: list = []
        self._processes: list = []
        for number in range(workers):
            fork = multiprocessing.get_context("fork")  # nothing of what is inherited touches the device
            receive, send = fork.Pipe(duplex=False)
            process = fork.Process(target=self._work, args=(send, number), daemon=True)
            process.start()
            send.close()
            self._pipes.append(receive)
            self._processes.append(process)

    def next(self) -> StepBatches:
        """The next step."""
        if self.workers:
            try:
                made = pickle.loads(self._pipes[0].recv_bytes())
            except EOFError:
                raise RuntimeError(
                    "a process that makes batches was ended from outside (is memory short?): go on with --workers 0"
                ) from None
            if isinstance(made, Exception):
                raise made
            self._pipes.append(self._pipes.pop(0))
        else:
            made = self.batches.next(self.step)
        self.step += 1
        return made

    def _work(self, pipe, number: int) -> None:
        """A worker: every `workers`-th step, from the number-th on. It waits where nobody reads what it made."""
        _die_with_parent()
        signal.set_wakeup_fd(-1)  # the parent's
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)  # a forked process has none of its parent's threads
        step, parent = self.step, os.getppid()
        try:
            while os.getppid() == parent:
                if (step - self.step) % self.workers == number:
                    pipe.send_bytes(pickle.dumps(self.batches.next(step), protocol=5))
                else:
                    self.batches.skip()
                step += 1
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # whatever it is, the run must hear of it
            pipe.send_bytes(pickle.dumps(error))

    def close(self) -> None:
        """End the workers."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.terminate()
            pipe.close()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []
