"""What a generation would take: latency, tokens per second and memory on a machine, from the floors of its operations.

Shapes: B rows, Q slots computed, T keys, M places asked about, N = B Q rows of a product, D d_model.

A pass is a list of operations. Each takes the larger of its arithmetic over the machine's rate and its bytes over the
bandwidth, and a fixed time to begin; all is multiplied by one constant of the machine, found once by least squares of
the logarithm over cells that were measured there. A processor's products keep to no such law: for few rows and for
many they differ in how they use its caches, so a machine at hand brings the time of its products at several numbers
of rows (`products`), and the rate of attention. What is left out: neighbours, the host.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["MACHINES", "Machine", "Shape", "fitted", "generation", "memory", "pass_seconds"]


@dataclass(frozen=True)
class Machine:
    """rate: operations a second of matrix products, by name of the number type; width: bytes a second that a product
    reads of weights; begin: seconds that an operation takes beyond both; memory: bytes; factor: the constant;
    source: where the numbers are from. products: (rows, seconds for each weight and row) of products, measured at
    ascending numbers of rows: they take the place of rate and width. attention: (queries, seconds for each query, key
    and number of a head) likewise."""

    name: str
    rate: dict[str, float]
    width: float
    begin: float
    memory: float
    factor: float = 1.0
    source: str = "measured"
    products: tuple[tuple[int, float], ...] = ()
    attention: tuple[tuple[int, float], ...] = ()


# An H100's rates and bandwidth were measured with `benchmarks.gpu`, its constant fitted to the passes of that run. The
# others are its numbers times the ratio of the data sheets (dense bf16 and fp8, memory bandwidth): not measured.
_H100 = {"bfloat16": 772e12, "float16": 772e12, "fp8": 1316e12}
MACHINES = {
    "h100": Machine("H100 80GB HBM3", _H100, 2.94e12, 1e-6, 80e9, 1.26),
    "h200": Machine("H200", _H100, 2.94e12 * 4.8 / 3.35, 1e-6, 141e9, 1.26, "H100 times data sheets"),
    "b200": Machine(
        "B200", {name: rate * 2250 / 989 for name, rate in _H100.items()}, 2.94e12 * 8 / 3.35, 1e-6, 180e9, 1.26,
        "H100 times data sheets",
    ),
}  # fmt: skip
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
OPERATIONS = 9  # of a layer: two norms, four products, rotary positions with the cache, attention, silu


@dataclass(frozen=True)
class Shape:
    """What is asked: rows, tokens of the prompt, tokens to generate, block length, steps, method, vicinity's window."""

    rows: int
    prompt: int
    length: int
    block: int
    steps: int
    method: str
    window: int = 16


def pass_seconds(config, machine: Machine, dtype: str, rows: int, computed: int, keys: int, asked: int) -> float:
    """Seconds of one pass of a model with this configuration."""
    size = ITEMSIZE[dtype]
    d, width = config.d_model, config.n_heads * config.head_dim
    kv, hidden, layers = config.n_kv_heads * config.head_dim, config.mlp_hidden_size, config.layers_applied
    every, few = rows * computed, rows * asked
    total = 0.0

    def add(operations: float, read: float, times: int = 1) -> None:
        nonlocal total
        total += times * max(operations / machine.rate[dtype], read / machine.width)

    def product(count: int, inputs: int, outputs: int, times: int = 1) -> None:
        nonlocal total
        if machine.products:
            total += times * count * inputs * outputs * _between(machine.products, count)
            return
        add(2 * count * inputs * outputs, size * (inputs * outputs + count * (inputs + outputs)), times)

    product(every, d, width + 2 * kv, layers - 1)
    product(every, d, 2 * kv)  # the last layer computes queries and all that follows where it is asked alone
    product(few, d, width)
    for count, times in ((every, layers - 1), (few, 1)):
        product(count, width, d, times)
        product(count, d, 2 * hidden, times)
        product(count, hidden, d, times)
        if machine.attention:
            total += times * count * keys * width * _between(machine.attention, count // rows)
        else:
            add(4 * count * keys * width, size * (2 * rows * keys * kv + 2 * count * width), times)
        add(0, size * count * (8 * d + 3 * hidden), times)  # norms, rotary positions, silu
    product(few, d, config.embedding_size)
    add(0, size * few * config.embedding_size)  # the proposal
    return machine.factor * (total + machine.begin * OPERATIONS * layers)


def _between(points: Sequence[tuple[int, float]], count: int) -> float:
    """The value at `count`, on straight lines in logarithms between points (count, value); outside, that of the end."""
    counts, values = zip(*points, strict=True)
    at = bisect.bisect_left(counts, count)
    if at in (0, len(counts)) or counts[at] == count:
        return values[min(at, len(counts) - 1)]
    share = math.log(count / counts[at - 1]) / math.log(counts[at] / counts[at - 1])
    return values[at - 1] ** (1 - share) * values[at] ** share


def passes(shape: Shape) -> list[tuple[int, int, int]]:
    """(slots computed, places asked about, how many such passes) of a generation.

    Where the number of slots differs from block to block (`prefix`, `vicinity`) it is that of the middle block.
    """
    slots, blocks = shape.prompt + shape.length, -(-shape.length // shape.block)
    steps = max(shape.steps, blocks)
    if shape.method == "none":
        return [(slots, shape.block, steps)]
    later = {
        "prefix": min(slots, shape.length // 2 + shape.block // 2),
        "vicinity": min(slots, shape.block + 2 * shape.window),
    }.get(shape.method, shape.block)
    asked = shape.length // 2 if shape.method == "c2f" else shape.block  # its first passes look for the block anywhere
    first = min(slots, 2 * shape.block) if shape.method == "block_causal" else slots
    return [(first, asked, blocks), (later, shape.block, steps - blocks)]


def generation(config, machine: Machine, dtype: str, shape: Shape) -> float:
    """Seconds of a generation."""
    slots = shape.prompt + shape.length
    return sum(
        count * pass_seconds(config, machine, dtype, shape.rows, computed, slots, asked)
        for computed, asked, count in passes(shape)
        if count
    )


def memory(config, dtype: str, shape: Shape, parameters: float) -> float:
    """Bytes: weights, the joined copies of two thirds of a layer's, keys and values, logits, the widest activation."""
    size, slots = ITEMSIZE[dtype], shape.prompt + shape.length
    d, kv = config.d_model, config.n_kv_heads * config.head_dim
    joined = config.n_layers * d * (config.n_heads * config.head_dim + 2 * kv + 2 * config.mlp_hidden_size)
    stored = 0 if shape.method == "none" else 2 * shape.rows * slots * kv * config.layers_applied
    asked = max(asked for _, asked, _ in passes(shape))
    wide = shape.rows * slots * (3 * config.mlp_hidden_size + 3 * d)
    return size * (parameters + joined) + max(size, 2) * (stored + shape.rows * asked * config.embedding_size + wide)


def fitted(pairs: Iterable[tuple[float, float]]) -> tuple[float, Sequence[float]]:
    """(constant, what is left of measured over predicted after it) for pairs (predicted, measured)."""
    logs = [math.log(measured / predicted) for predicted, measured in pairs]
    constant = sum(logs) / len(logs)
    return math.exp(constant), [math.exp(each - constant) for each in logs]
