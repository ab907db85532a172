"""A layer's operations on a CPU in float32, compiled from `native.c` and `layers.c` on this machine: norm, rotary
positions with the cache's scatter, silu and product, the linear layers (`Panels`), attention. `whole` makes a pass of
them in one call.

Shapes: N rows (tokens), B batch, Q queried tokens, H heads, H_kv key heads, T slots, D head size, F MLP width, I
inputs, O outputs, P panels of 16 outputs.

torch makes about forty calls a layer beside its four products, each of which takes longer to begin than to compute for
a few tokens; and oneDNN's products of few tokens read weights more slowly than memory gives them. The small
functions here have the signatures of `triton`'s. A pass asks for them with `compile`: it is never done unasked, since
it needs a C compiler and the last bits of a result are other ones. The library is kept between runs (`library`), named
after its source, the compiler and the processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.kernels.by_rows import Run
from dlm.kernels.int8 import joined
from dlm.utils.files import cache_folder

__all__ = ["Native", "Panels", "library", "native"]

SOURCES = tuple(Path(__file__).with_name(name) for name in ("layers.c", "native.c"))  # the first includes the second
# Sums stay in the order of the source: no -ffast-math.
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
SHARED = 2**17  # numbers from which threads share a call
PANEL = 16  # outputs of a panel, as in the source
ARENA = 2**25  # bytes of memory that weights are laid in together
TICKETS = 4  # pieces of work in a call of one operation
SIZE, POINTER = ctypes.c_ssize_t, ctypes.c_void_p


class Linear(ctypes.Structure):
    """`struct linear`."""

    _fields_ = [("panels", POINTER), ("bias", POINTER), ("inputs", SIZE), ("outputs", SIZE), ("both", SIZE)]


class Team(ctypes.Structure):
    """`struct team`."""

    _fields_ = [("started", POINTER), ("count", POINTER), *((name, SIZE) for name in ("wanted", "joined", "met"))]
    _fields_ += [("tickets", POINTER)]

    @classmethod
    def of(cls, tickets: int) -> Team:
        """torch's threads, for so many pieces of work."""
        numbers = (SIZE * tickets)()
        team = cls(*_openmp(), torch.get_num_threads(), 0, 0, ctypes.addressof(numbers))
        team.numbers = numbers  # lives as long
        return team


class Heads(ctypes.Structure):
    """`struct heads`."""

    _fields_ = [(name, POINTER) for name in ("q", "keys", "values", "out")]
    _fields_ += [(name, SIZE) for name in ("q_token", "key_row", "key_head", "key_slot")]
    _fields_ += [(name, SIZE) for name in ("value_row", "value_head", "value_slot", "heads", "kv_heads", "size")]


class Piece(ctypes.Structure):
    """`struct piece`."""

    _fields_ = [(name, SIZE) for name in ("first", "count", "row", "offset", "keys", "mask_row")] + [("mask", POINTER)]


SIGNATURES = {
    "normed": (POINTER, SIZE, SIZE, POINTER, POINTER, SIZE, ctypes.c_float),
    "gated": (POINTER, SIZE, SIZE, POINTER, SIZE),
    "place": (POINTER, SIZE, *[POINTER] * 7, *[SIZE] * 7),
    "product": (POINTER, POINTER, POINTER, SIZE, SIZE, POINTER, POINTER),
    "attention": (POINTER, POINTER, POINTER, SIZE, POINTER, SIZE),
    "attention_room": (SIZE, SIZE),
    "pass": (POINTER,),
}


class Native:
    """The compiled functions. Tensors are float32 on the CPU, the last dimension contiguous."""

    def __init__(self, file: Path):
        compiled = ctypes.CDLL(str(file))
        for name, kinds in SIGNATURES.items():
            function = getattr(compiled, name)
            function.argtypes, function.restype = kinds, SIZE if name == "attention_room" else None
            setattr(self, f"_{name}", function)
        self._arena, self._used = torch.empty(0), 0

    def laid(self, weight: Tensor) -> Tensor:
        """A copy in memory of large pages where the machine has them: without, every 4 kB of weights that a pass reads
        cost a search for their page."""
        count = -(-weight.numel() // PANEL) * PANEL
        if self._used + count > len(self._arena):
            size = max(ARENA, 4 * count)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with contextlib.suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
                self._arena = torch.frombuffer(memory, dtype=torch.float32)
            else:
                self._arena = torch.empty(size // 4)
            self._used = 0
        copy = self._arena[self._used : self._used + weight.numel()].view(weight.shape)
        self._used += count
        return copy.copy_(weight)

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

    def product(self, x: Tensor, layer: Panels, added: Tensor | None) -> Tensor:
        """x W^T [+ bias] [+ added], or silu(gate) * up, (..., O), for x (..., I) and added (..., O). A row's bits do
        not depend on the others."""
        inputs = x.shape[-1]
        rows = x.reshape(-1, inputs)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        added = None if added is None else added.contiguous()
        y = x.new_empty((*x.shape[:-1], layer.outputs))
        more, team = None if added is None else added.data_ptr(), Team.of(TICKETS)
        pointers = ctypes.addressof(team), ctypes.addressof(layer.struct), rows.data_ptr()
        self._product(*pointers, len(rows), rows.stride(0), more, y.data_ptr())
        return y

    def attention_room(self, keys: int, size: int) -> int:
        """Numbers that a thread needs for attention to so many keys."""
        return self._attention_room(keys, size)

    def passed(self, asks: ctypes.Structure) -> None:
        """Computes what `whole` has laid out."""
        self._pass(ctypes.addressof(asks))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
        """softmax(q k^T / sqrt(D)) v, heads joined: (B, Q, H D), for q (B, Q, H, D) and k, v (rows, T, H_kv, D). A
        query's bits depend on nothing but what it sees."""
        q = q.contiguous()
        out = q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
        strides = (q.stride(1), *(x.stride(i) for x in (k, v) for i in (0, 2, 1)))
        pointers = (x.data_ptr() for x in (q, k, v, out))
        heads, team = Heads(*pointers, *strides, q.shape[2], k.shape[2], q.shape[3]), Team.of(TICKETS)
        each = self.attention_room(runs.most, q.shape[3])
        room = torch.empty(each * team.wanted)
        at = ctypes.addressof(team), ctypes.addressof(heads), ctypes.addressof(runs.pieces)
        self._attention(*at, len(runs.pieces), room.data_ptr(), each)
        return out


class Runs:
    """Attention by `Native.attention`, run by run, in place of `Uniform` and `EndToEnd`."""

    def __init__(self, native: Native, runs: Sequence[Run]):
        self.native, self.most = native, max((run.keys for run in runs), default=0)
        self.masks = [None if run.mask is None else run.mask.contiguous() for run in runs]
        self.pieces = (Piece * len(runs))()
        for piece, run, mask in zip(self.pieces, runs, self.masks, strict=True):
            piece.first, piece.count, piece.row, piece.offset, piece.keys = run[:5]
            if mask is not None:
                piece.mask, piece.mask_row = mask.data_ptr(), run.keys

    def attend(self, attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.native.attention(q, k, v, self)


@dataclass(frozen=True)
class Panels:
    """A linear layer as `linear` has them: weight (P, I, 16), its outputs in panels of 16, which are read from end to
    end for each few rows; of gate and up together (`both`) those of either in turn, which give silu(gate) * up."""

    native: Native
    weight: Tensor
    bias: Tensor | None
    outputs: int
    both: bool = False

    @classmethod
    def of(cls, native: Native, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Panels:
        weight = joined(weights).detach()
        return cls(native, native.laid(_panels(weight)), joined(biases), len(weight))

    @classmethod
    def gate_up(cls, native: Native, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Panels:
        """Of the gate and of what it lets through."""
        gate, up = (_panels(weight.detach()) for weight in weights)
        return cls(
            native, native.laid(torch.stack((gate, up), dim=1).flatten(0, 1)), joined(biases), len(weights[0]), True
        )

    @cached_property
    def struct(self) -> Linear:
        bias = None if self.bias is None else self.bias.data_ptr()
        return Linear(self.weight.data_ptr(), bias, self.weight.shape[1], self.outputs, self.both)

    def __call__(self, x: Tensor) -> Tensor:
        return self.native.product(x, self, None)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.native.product(x, self, residual)


def _panels(weight: Tensor) -> Tensor:
    """(P, I, 16) of weight (O, I), zeros behind it."""
    return F.pad(weight, (0, 0, 0, -len(weight) % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2)


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
def _openmp() -> tuple[int | None, int | None]:
    """Where GOMP_parallel and omp_get_num_threads lie in the OpenMP that torch has loaded, whose threads share a call;
    None without one."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None, None
    loaded = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    found = [file for file in loaded if Path(file).name.startswith(("libgomp", "libiomp5", "libomp"))]
    found.sort(key=lambda file: ("torch" not in file, file))  # another library may have brought its own
    for file in found:
        functions = [getattr(ctypes.CDLL(file), name, None) for name in ("GOMP_parallel", "omp_get_num_threads")]
        if all(functions):
            return tuple(ctypes.cast(function, POINTER).value for function in functions)
    return None, None


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
    named = hashlib.sha256(
        "\n".join([*(source.read_text() for source in SOURCES), *OPTIONS, about, _processor()]).encode()
    ).hexdigest()
    file = cache_folder("native") / f"{named[:24]}.so"
    if file.is_file():
        return file
    if progress is not None:
        progress("compiling")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / "native.so"
        words = [compiler, *OPTIONS, "-o", str(made), str(SOURCES[0]), "-lm"]
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
