"""How fast this machine is, measured, and what a forward pass takes on it at least.

The floor of a pass is the larger of its operations over the rate of matrix products and its bytes over the bandwidth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dlm.kernels.fp8 import Float8
from dlm.kernels.linear import QUANTIZED, kind_for
from dlm.models.flops import pass_bytes, pass_flops
from dlm.utils.hardware import commit, hardware, synchronise

__all__ = ["Limits", "Pass", "bandwidth", "best", "limits", "matmul_rate"]


def best(work: Callable[[], object], device: torch.device, clock, seconds: float = 0.2) -> float:
    """The shortest of many runs: what the machine does when nothing is in the way."""
    work()
    synchronise(device)
    shortest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = clock()
        work()
        synchronise(device)
        shortest = min(shortest, clock() - began)
    return shortest


@torch.inference_mode()
def matmul_rate(dtype: torch.dtype, device: torch.device, clock=time.perf_counter) -> float:
    """Operations a second of the fastest matrix product found, in torch's own way and in the packed model's; for
    torch.int8 and torch.float8_e4m3fn of numbers of eight bits."""
    sizes = [(8192, 8192, 8192)] if device.type == "cuda" else [(288, 384, 1536), (288, 1536, 384), (512, 1024, 1024)]
    rate = 0.0
    for m, k, n in sizes:
        x, weight = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
        if dtype == torch.int8:
            ways = [partial(torch._int_mm, x.to(dtype), weight.to(dtype).t())]
        elif dtype == torch.float8_e4m3fn:
            linear = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device)
            ways = [partial(Float8.from_linear(linear), x.bfloat16())]
        else:
            x, weight = x.to(dtype), weight.to(dtype)
            ways = [partial(torch.nn.functional.linear, x, weight)]
            if kind := kind_for(device, dtype):
                ways.append(partial(kind.of([weight], [None]), x))
        rate = max([rate, *(2 * m * k * n / best(way, device, clock) for way in ways)])
    return rate


@torch.inference_mode()
def bandwidth(device: torch.device, clock=time.perf_counter) -> float:
    """Bytes a second read from memory by a sum over 256 MiB (1 GiB on a GPU), more than a cache holds."""
    numbers = torch.ones((2**27 if device.type == "cuda" else 2**25), dtype=torch.int64, device=device)
    return numbers.nbytes / best(numbers.sum, device, clock)


@dataclass(frozen=True)
class Pass:
    """What one forward pass was asked: rows, slots computed and keys seen by each, places asked about by each."""

    rows: int
    computed: int
    keys: int
    asked: int


@dataclass(frozen=True)
class Limits:
    """What this machine does at most at a type of numbers: `rate` operations of matrix products and `width` bytes read
    from memory a second. itemsize: bytes of a weight."""

    dtype: str
    itemsize: int
    rate: float
    width: float

    def floor(self, config, passes: Sequence[Pass]) -> float:
        """Seconds that these passes of a model of `config` take at least."""
        return sum(
            max(
                each.rows * pass_flops(config, each.computed, each.keys, each.asked) / self.rate,
                pass_bytes(config, each.rows, each.keys, self.itemsize) / self.width,
            )
            for each in passes
        )

    def record(self) -> dict:
        """These numbers for a file of results, and what they were measured on."""
        return {
            "dtype": self.dtype, "matmul_rate": self.rate, "bandwidth": self.width,
            "threads": torch.get_num_threads(), "hardware": hardware(), "commit": commit(),
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.dtype}, {torch.get_num_threads()} threads: {self.rate / 1e9:.0f} GFLOP/s in matrix products, "
            f"{self.width / 1e9:.1f} GB/s"
        )


def limits(dtype: str, device: torch.device, clock=time.perf_counter) -> Limits:
    """The limits at a type as --dtype names it, measured now (half a second or more)."""
    few = QUANTIZED.get(dtype)
    numbers = few.numbers if few else getattr(torch, dtype)
    return Limits(dtype, numbers.itemsize, matmul_rate(numbers, device, clock), bandwidth(device, clock))
