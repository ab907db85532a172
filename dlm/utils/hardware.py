"""The machine a number was measured on, what a measurement needs of it (waiting for the device, peak memory), and
whether Triton runs on it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def commit() -> str:
    """The commit of the clone that this code runs from, `-dirty` where it was changed; "unknown" outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # a wheel in an environment inside of somebody's repository
        return "unknown"
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> str:
    """The GPUs, or the processor and the threads in use."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"CPU {name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide about speed and results."""
    import tokenizers
    import torch
    import transformers

    import dlm

    return {
        "python": platform.python_version(),
        "dlm": dlm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def memory_size() -> int | None:
    """Bytes of memory that this machine has in all, less where a container may use less; None: not known."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            size = min(size, int(Path(file).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return size


def synchronise(device: torch.device) -> None:
    """Waits until all work queued on the device is done."""
    if device.type in ("cuda", "xpu", "mps"):
        import torch

        getattr(torch, device.type).synchronize()


class PeakMemory:
    """Peak memory inside the `with` block, in bytes.

    On a GPU what torch allocated there; on Linux the process's resident set; None where neither can be asked.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self) -> PeakMemory:
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._cleared = self.device.type == "cpu" and _clear_peak()
        return self

    def __exit__(self, *_) -> None:
        import torch

        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._cleared:
            self.bytes = _resident_peak()


def _clear_peak() -> bool:
    """Resets the process's peak resident set (Linux, proc(5), clear_refs)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    lines = _STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
