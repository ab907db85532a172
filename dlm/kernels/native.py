"""A layer's operations on a CPU in float32, compiled from `native.c` on this machine: norm, rotary positions with the
cache's scatter, silu and product, and the linear layers (`Panels`).

Shapes: N rows (tokens), B batch, Q queried tokens, H heads, H_kv key heads, T slots, D head size, F MLP width, I
inputs, O outputs, P panels of 16 outputs.

torch makes about forty calls a layer beside its four products, each of which takes longer to begin than to compute for
a few tokens; and oneDNN's products of few tokens read weights more slowly than memory gives them. The small
functions here have the signatures of `triton`'s. A pass asks for them with `compile`: it is never done unasked, since
it needs a C compiler and the last bits of a result are other ones. The library is kept between runs (`library`), named
after its source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.kernels.int8 import joined
from dlm.utils.files import cache_folder

__all__ = ["Native", "Panels", "library", "native"]

SOURCE = Path(__file__).with_name("native.c")
# Sums stay in the order of the source: no -ffast-math.
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
SHARED = 2**17  # numbers from which threads share a call
PANEL = 16  # outputs of a panel, as in the source
SIZE, POINTER = ctypes.c_ssize_t, ctypes.c_void_p
SIGNATURES = {
    "normed": (POINTER, SIZE, SIZE, POINTER, POINTER, SIZE, ctypes.c_float),
    "gated": (POINTER, SIZE, SIZE, POINTER, SIZE),
    "place": (POINTER, SIZE, *[POINTER] * 7, *[SIZE] * 7),
    "product": (POINTER, SIZE, SIZE, POINTER, SIZE, *[POINTER] * 3, SIZE, POINTER, SIZE),
}


class Native:
    """The compiled functions. Tensors are float32 on the CPU, the last dimension contiguous."""

    def __init__(self, file: Path):
        compiled = ctypes.CDLL(str(file))
        for name, kinds in SIGNATURES.items():
            function = getattr(compiled, name)
            function.argtypes, function.restype = kinds, None
            setattr(self, f"_{name}", function)

    def normed(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dimension, as `F.rms_norm`."""
        size = x.shape[-1]
        rows, y = x.reshape(-1, size), x.new_empty(x.shape)
        at, to, stride, factor = rows.data_ptr(), y.data_ptr(), rows.stride(0), weight.data_ptr()

        def part(first: int, count: int) -> None:
            self._normed(at + 4 * first * stride, count, stride, factor, to + 4 * first * size, size, eps)

        _shared(part, len(rows), size)
        return y

    def gated(self, x: Tensor) -> Tensor:
        """silu(gate) * up of x (..., 2F) = [gate ; up]: (..., F)."""
        size = x.shape[-1] // 2
        rows, y = x.reshape(-1, 2 * size), x.new_empty((*x.shape[:-1], size))
        at, to, stride = rows.data_ptr(), y.data_ptr(), rows.stride(0)

        def part(first: int, count: int) -> None:
            self._gated(at + 4 * first * stride, count, stride, to + 4 * first * size, size)

        _shared(part, len(rows), size)
        return y

    def place(
        self,
        x: Tensor,
        turns: Tensor,
        positions: Tensor | None,
        heads: int,
        stored: tuple[Tensor, Tensor] | None,
        rows: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Queries (B, Q, H, D), turned by their rotary angles, and keys (turned) and values where they are kept.

        x (B, Q, (H + 2 H_kv) D): queries, keys and values of every slot, a head's pairs side by side. turns (T', D / 2)
        complex: exp(i angle) of every slot. positions (B, Q) int64: the slots; None is 0..Q-1. stored: keys and values
        (B, H_kv, T, D) to write to, None where x is of queries alone. rows, places (B * Q,): where each token's key and
        value lie in them, by default its own row and slot.
        """
        batch, queries, width = x.shape
        size = 2 * turns.shape[1]
        q = x.new_empty((batch, queries, heads, size))
        keys, values = stored or (q, q)
        assert keys.is_contiguous() and values.is_contiguous() and turns.is_contiguous()
        kv_heads, length = (keys.shape[1], keys.shape[2]) if stored else (0, 0)
        flat = x.reshape(-1, width)
        kept = [index if index is None else index.contiguous() for index in (positions, rows, places)]
        indices = [index if index is None else index.data_ptr() for index in kept]
        outputs = q.data_ptr(), keys.data_ptr(), values.data_ptr()
        pointers = flat.data_ptr(), flat.stride(0), turns.data_ptr(), *indices, *outputs

        def part(first: int, count: int) -> None:
            self._place(*pointers, first, count, queries, heads, kv_heads, length, size)

        _shared(part, len(flat), width)
        return q

    def product(self, x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None, added: Tensor | None) -> Tensor:
        """x W^T [+ bias] [+ added], (..., O), for x (..., I), added (..., O) and panels (P, I, 16), which hold W (O, I)
        and zeros behind it. A row's bits do not depend on the others."""
        inputs = x.shape[-1]
        rows = x.reshape(-1, inputs)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        added = None if added is None else added.contiguous()
        y = x.new_empty((*x.shape[:-1], outputs))
        assert panels.is_contiguous() and panels.shape == (-(-outputs // PANEL), inputs, PANEL)
        constant, more = (None if each is None else each.data_ptr() for each in (bias, added))
        pointers = panels.data_ptr(), inputs, constant, more, y.data_ptr()
        self._product(
            rows.data_ptr(), len(rows), rows.stride(0), *pointers, outputs, _together(), torch.get_num_threads()
        )
        return y


@dataclass(frozen=True)
class Panels:
    """A linear layer as `linear` has them: weight (P, I, 16), its outputs in panels of 16, which are read from end to
    end for each few rows."""

    native: Native
    weight: Tensor
    bias: Tensor | None
    outputs: int

    @classmethod
    def of(cls, native: Native, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Panels:
        weight = joined(weights).detach()
        filled = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
        return cls(native, filled.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous(), joined(biases), len(weight))

    def __call__(self, x: Tensor) -> Tensor:
        return self.native.product(x, self.weight, self.outputs, self.bias, None)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.native.product(x, self.weight, self.outputs, self.bias, residual)


def _shared(part: Callable[[int, int], None], rows: int, width: int) -> None:
    """Calls `part(first, count)` for all rows, shared over torch's threads where they are many. Rows do not meet."""
    threads = min(torch.get_num_threads(), rows)
    if threads == 1 or rows * width < SHARED:
        part(0, rows)
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(lambda i: part(bounds[i], bounds[i + 1] - bounds[i]), range(threads)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dlm-native")


@cache
def _together() -> int | None:
    """Where GOMP_parallel lies in the OpenMP that torch has loaded, whose threads products share; None without one."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    found = [file for file in loaded if Path(file).name.startswith(("libgomp", "libiomp5", "libomp"))]
    found.sort(key=lambda file: ("torch" not in file, file))  # another library may have brought its own
    functions = (getattr(ctypes.CDLL(file), "GOMP_parallel", None) for file in found)
    return next((ctypes.cast(function, POINTER).value for function in functions if function is not None), None)


# ---------------------------------------------------------------- the library


def native(progress: Callable[[str], None] | None = None) -> Native:
    """The compiled functions; compiled now if no run before did. progress: is told in a word that this takes seconds.

    Raises ValueError where there is no C compiler, or it fails.
    """
    return Native(library(progress))


def library(progress: Callable[[str], None] | None = None) -> Path:
    """The file of the compiled functions, made where there is none. Raises ValueError as `native`."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise ValueError("compile needs a C compiler, and there is no cc on the PATH: install gcc, or leave it out")
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    named = hashlib.sha256("\n".join([SOURCE.read_text(), *OPTIONS, about, _processor()]).encode()).hexdigest()
    file = cache_folder("native") / f"{named[:24]}.so"
    if file.is_file():
        return file
    if progress is not None:
        progress("compiling")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / "native.so"
        words = [compiler, *OPTIONS, "-o", str(made), str(SOURCE), "-lm"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
            raise ValueError(f"compile failed ({compiler}: {reason}): leave it out")
        made.replace(file)  # at once, so that a run beside this one never reads half a file
    return file


def _processor() -> str:
    """What the compiler's -march=native goes by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
