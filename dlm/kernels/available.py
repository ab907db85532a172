"""Which kernels of Triton this machine runs."""

from __future__ import annotations

import warnings
from functools import cache

import torch

__all__ = ["triton_kernels"]


@cache
def triton_kernels(device: torch.device):
    """The module `dlm.kernels.triton` where Triton is installed and runs on this GPU, else None, with a warning where
    it fails: it compiles when it is first called, with a C compiler."""
    if device.type != "cuda":
        return None
    try:
        from dlm.kernels import triton

        triton.summarise(torch.zeros(1, 1, device=device), torch.zeros(0, dtype=torch.int64, device=device))
    except ImportError:
        return None
    except Exception as error:  # whatever its compiler, the machine's or the driver raises
        warnings.warn(f"Triton does not run on {device}, so torch does its work, more slowly: {error}", stacklevel=2)
        return None
    return triton
