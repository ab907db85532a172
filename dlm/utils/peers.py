"""The other processes of a job: whether they still run, and which of them says why the job ends."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

ASKING_SECONDS = 2.0
SAID = "DLM_SAID"  # in the environment: a file that the first process of a `dlm launch` makes which says why it ends


def _group():
    """torch.distributed where this process is in a group; None elsewhere (and where torch was not needed so far)."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


@dataclass(frozen=True)
class Peers:
    """The other processes of a job that run on this machine: (rank, process id) each; size: of the whole job."""

    others: tuple[tuple[int, int], ...]
    size: int

    def gone(self) -> list[int]:
        """Ranks whose process is no more."""
        return [rank for rank, pid in self.others if not _runs(pid)]

    def line(self, gone: Sequence[int]) -> str:
        """What to say where some are gone, or, with none named, where the connection to one is lost."""
        who = f"rank {', '.join(map(str, gone))} of {self.size} is gone" if gone else "the connection to a rank is lost"
        return f"{who} (killed, or out of memory), so this job ends: go on with --resume"


_met: list[Peers] = []  # of this process, for the line of an error


def lost_line() -> str:
    """What to say where the connection to another process is lost: which one is gone, where that is known."""
    peers = _met[-1] if _met else Peers((), int(os.environ.get("WORLD_SIZE", "1")))
    return peers.line(peers.gone())


def rank_prefix() -> str:
    """ "rank 1: " in a job of several processes."""
    group = _group()
    if group and group.get_world_size() > 1:
        return f"rank {group.get_rank()}: "
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # an error before the processes met
        return f"rank {os.environ.get('RANK', '?')}: "
    return ""


def meet_peers() -> Peers | None:
    """Learn of the other processes of this job, which all call this; None in a process that is alone."""
    group = _group()
    if group is None:
        return None
    size, rank = group.get_world_size(), group.get_rank()
    known: list = [None] * size
    group.all_gather_object(known, (platform.node(), os.getpid()))
    here = platform.node()
    others = tuple((r, pid) for r, (node, pid) in enumerate(known) if node == here and r != rank)
    _met.append(Peers(others, size))
    return _met[-1]


def _runs(pid: int) -> bool:
    try:
        import psutil  # Accelerate needs it

        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except ImportError:
        return True
    except psutil.Error:
        return psutil.pid_exists(pid)


def first_to_say() -> bool:
    """Whether this process is the first of its job to say why the job ends; True where that cannot be asked."""
    if (said := os.environ.get(SAID)) is not None:  # the processes of one `dlm launch`
        try:
            os.close(os.open(said, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            return True
    group = _group()
    if group is None:
        return True
    try:
        return group.distributed_c10d._get_default_store().add("dlm/ended", 1) == 1
    except Exception:  # the store has gone with the process that held it
        return True


def let_others_ask() -> None:
    """Wait a moment, where this process holds the job's store, for the others to ask it who says why the job ends."""
    group = _group()
    if group is None or group.get_rank() != 0 or group.get_world_size() == 1:
        return
    try:
        store, limit = group.distributed_c10d._get_default_store(), time.monotonic() + ASKING_SECONDS
        while store.add("dlm/ended", 0) < group.get_world_size() and time.monotonic() < limit:
            time.sleep(0.05)
    except Exception:  # the launcher holds it, and has ended
        return


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process of the job cannot be reached any more."""
    words = ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo", "NCCL")
    return isinstance(error, RuntimeError) and _group() is not None and any(word in str(error) for word in words)
