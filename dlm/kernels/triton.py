"""What a GPU does in one pass in Triton and torch in many: the greedy proposal, and rounding activations to float8.

Shapes: N places asked about, V vocabulary, C chunks that a row is cut into; K inputs of a linear layer.

In torch a proposal reads or writes the logits about ten times, most of them in fp32. Here `_chunk` reads each logit
once, in the type it has, and keeps seven numbers of every chunk of a row: a row for each program would leave most of a
GPU idle where few places are asked about. `_merge` joins a row's chunks as the parallel online normaliser does (Milakov
and Gimelshein, arXiv:1805.02867). All arithmetic is in fp32, no order of it depends on timing, and the host waits for
nothing. This file imports Triton: `available.triton_kernels` says where it can be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Summary", "quantise", "summarise"]

CHUNK = 4096  # logits that one program reads
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
NOWHERE = tl.constexpr(2**31 - 1)  # above every id
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
LARGEST = tl.constexpr(torch.finfo(torch.float8_e4m3fn).max)
# What an id may be.
PROPOSED, COUNTED, SUPPRESSED = tl.constexpr(2), tl.constexpr(1), tl.constexpr(0)


class Summary(NamedTuple):
    """Of every place, (...): the largest logit (NaN where any is), the token that is proposed, its probability and
    that of the runner-up, and minus the entropy of the prediction in nats."""

    largest: Tensor
    token: Tensor
    probability: Tensor
    second: Tensor
    entropy: Tensor

    def confidence(self, name: str) -> Tensor:
        """What `propose.CONFIDENCES[name]` says at temperature 0, to rounding."""
        return self.probability - self.second if name == "margin" else getattr(self, name)


def summarise(logits: Tensor, forbidden: Tensor, suppressed: Sequence[int] = ()) -> Summary:
    """What `step.decide` takes of logits (..., V) of any strides: the token is the lowest of the ids with the largest
    logit that are not `forbidden` (F,), and the prediction is of all ids but the `suppressed`.

    -inf counts as the lowest number there is. Where a logit is NaN or +inf, `largest` says so, the token is an id and
    the rest means nothing.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    count, size = rows.shape
    roles = torch.full((size,), PROPOSED.value, dtype=torch.int8, device=logits.device)
    roles.index_fill_(0, forbidden, COUNTED.value)
    for token in suppressed:
        if token < size:
            roles[token].fill_(SUPPRESSED.value)  # an index list would be copied from the host, which waits
    chunks = triton.cdiv(size, CHUNK)
    index = torch.empty((count, chunks), dtype=torch.int32, device=logits.device)
    parts = torch.empty((6, count, chunks), dtype=torch.float32, device=logits.device)
    token = torch.empty((count,), dtype=torch.int64, device=logits.device)
    found = torch.empty((4, count), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _chunk[(count, chunks)](rows, rows.stride(0), rows.stride(1), roles, index, parts, size, CHUNK, num_warps=8)
        _merge[(count,)](index, parts, token, found, chunks, triton.next_power_of_2(chunks), num_warps=1)
    largest, probability, second, entropy = (x.view(logits.shape[:-1]) for x in found)
    return Summary(largest, token.view(logits.shape[:-1]), probability, second, entropy)


@triton.jit
def _chunk(logits, row_stride, stride, roles, index, parts, size, CHUNK: tl.constexpr):
    """Program (n, c): of the logits c * CHUNK and on of row n, the place of the best id that may be proposed,
    index (N, C), and parts (6, N, C): the largest logit, the best and second best to propose, the largest m that
    counts, and over those that count the sums of exp(l - m) and of exp(l - m) (l - m)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)  # 64 bits: rows times V passes 2**31
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < size
    x = tl.load(logits + row * row_stride + ids.to(tl.int64) * stride, mask=inside, other=-float("inf")).to(tl.float32)
    role = tl.load(roles + ids, mask=inside, other=SUPPRESSED)

    damaged = tl.max((x != x).to(tl.int32), axis=0)  # tl.max leaves NaN out
    largest = tl.where(damaged > 0, float("nan"), tl.max(x, axis=0))

    x = tl.where(x > LOWEST, x, LOWEST)  # NaN too
    allowed = tl.where(role == PROPOSED, x, -float("inf"))
    first = tl.max(allowed, axis=0)
    place = tl.min(tl.where(allowed == first, ids, NOWHERE), axis=0)
    second = tl.max(tl.where(ids == place, -float("inf"), allowed), axis=0)

    counts = role != SUPPRESSED
    most = tl.max(tl.where(counts, x, LOWEST), axis=0)
    power = tl.where(counts, x - most, -float("inf"))
    weight = tl.exp(power)
    total = tl.sum(weight, axis=0)
    moment = tl.sum(tl.where(weight > 0, weight * power, 0.0), axis=0)

    chunks = tl.num_programs(1)
    plane = tl.num_programs(0).to(tl.int64) * chunks
    at = row * chunks + chunk
    tl.store(index + at, place)
    tl.store(parts + at, largest)
    tl.store(parts + at + plane, first)
    tl.store(parts + at + 2 * plane, second)
    tl.store(parts + at + 3 * plane, most)
    tl.store(parts + at + 4 * plane, total)
    tl.store(parts + at + 5 * plane, moment)


@triton.jit
def _merge(index, parts, token, found, chunks, WIDTH: tl.constexpr):
    """Program n: the chunks of row n, of which there are at most WIDTH, to token (N,) and found (4, N): the largest
    logit, the probabilities of the token and the runner-up, and minus the entropy."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    inside = lane < chunks
    at = row * chunks + lane
    plane = rows * chunks
    place = tl.load(index + at, mask=inside, other=NOWHERE)
    largest = tl.load(parts + at, mask=inside, other=-float("inf"))
    first = tl.load(parts + at + plane, mask=inside, other=-float("inf"))
    second = tl.load(parts + at + 2 * plane, mask=inside, other=-float("inf"))
    most = tl.load(parts + at + 3 * plane, mask=inside, other=LOWEST)
    total = tl.load(parts + at + 4 * plane, mask=inside, other=0.0)
    moment = tl.load(parts + at + 5 * plane, mask=inside, other=0.0)

    damaged = tl.max((largest != largest).to(tl.int32), axis=0)
    best = tl.max(first, axis=0)
    chosen = tl.min(tl.where(first == best, place, NOWHERE), axis=0)
    runner_up = tl.maximum(tl.max(second, axis=0), tl.max(tl.where(place == chosen, -float("inf"), first), axis=0))

    top = tl.max(most, axis=0)
    lower = most - top
    scale = tl.exp(lower)
    moment = tl.sum(tl.where(scale > 0, scale * (moment + total * lower), 0.0), axis=0)
    total = tl.sum(scale * total, axis=0)

    tl.store(token + row, chosen.to(tl.int64))
    tl.store(found + row, tl.where(damaged > 0, float("nan"), tl.max(largest, axis=0)))
    tl.store(found + row + rows, tl.div_rn(tl.exp(best - top), total))
    tl.store(found + row + 2 * rows, tl.div_rn(tl.exp(runner_up - top), total))
    tl.store(found + row + 3 * rows, tl.div_rn(moment, total) - tl.log(total))


# ---------------------------------------------------------------- activations in float8


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """`models.fp8.quantise` of x (..., K), in one kernel in place of seven: a layer waits for each of them."""
    rows = x.reshape(-1, x.shape[-1])
    count, size = rows.shape
    numbers = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _quantise[(count,)](rows, rows.stride(0), rows.stride(1), numbers, scale, size, triton.next_power_of_2(size))
    return numbers, scale


@triton.jit
def _quantise(x, row_stride, stride, numbers, scale, size, WIDTH: tl.constexpr):
    """Program n: row n of x (N, K), K at most WIDTH, as float8 and its scale."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    inside = lane < size
    values = tl.load(x + row * row_stride + lane.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)
    step = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), LARGEST), SMALLEST)
    tl.store(numbers + row * size + lane, tl.div_rn(values, step).to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, step)


# ---------------------------------------------------------------- a layer's small operations


def place(
    x: Tensor, turns: Tensor, positions: Tensor | None, heads: int, stored: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Queries, turned by their rotary angles, and keys (turned) and values where they are kept, in one kernel.

    x (B, Q, (H + 2 H_kv) D): queries, keys and values of every slot, a head's pairs side by side. turns (T', D / 2)
    complex: exp(i angle) of every slot. positions (B, Q) int64: the slots; None is 0..Q-1. stored: keys and values
    (B, H_kv, T, D) to write to, None where x is of queries alone. Gives the queries (B, Q, H, D).
    """
    batch, queries, _ = x.shape
    size = 2 * turns.shape[1]
    q = torch.empty((batch, queries, heads, size), dtype=x.dtype, device=x.device)
    keys, values = stored or (q, q)
    kv_heads, slots = (keys.shape[1], keys.shape[2]) if stored else (0, 0)
    assert keys.is_contiguous() and values.is_contiguous() and turns.is_contiguous()
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    where = rows if positions is None else positions.contiguous()
    grid = (len(rows), heads + 2 * kv_heads)
    with torch.cuda.device_of(x):
        _place[grid](
            rows, rows.stride(0), torch.view_as_real(turns), where, q, keys, values, queries, heads, kv_heads, slots,
            positions is not None, size // 2, triton.next_power_of_2(size // 2), num_warps=1,
        )  # fmt: skip
    return q


@triton.jit
def _place(
    x, row_stride, turns, positions, q, keys, values, queries, heads, kv_heads, slots,
    GIVEN: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (n, h): head h of token n, of the queries, then keys, then values. HALF: D / 2, at most WIDTH."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if GIVEN:
        slot = tl.load(positions + token)
    else:
        slot = token % queries
    lane = tl.arange(0, 2 * WIDTH)
    inside = lane < 2 * HALF
    value = tl.load(x + token * row_stride + head.to(tl.int64) * (2 * HALF) + lane, mask=inside, other=0.0)
    if head < heads + kv_heads:
        first, second = tl.split(value.to(tl.float32).reshape(WIDTH, 2))
        cos, sin = tl.split(tl.load(turns + slot * (2 * HALF) + lane, mask=inside, other=0.0).reshape(WIDTH, 2))
        value = tl.join(first * cos - second * sin, first * sin + second * cos).reshape(2 * WIDTH).to(value.dtype)
    row = token // queries
    if head < heads:
        out = q + (token * heads + head) * (2 * HALF)
    elif head < heads + kv_heads:
        out = keys + ((row * kv_heads + head - heads) * slots + slot) * (2 * HALF)
    else:
        out = values + ((row * kv_heads + head - heads - kv_heads) * slots + slot) * (2 * HALF)
    tl.store(out + lane, value, mask=inside)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, W numbers of it, in fp32 and rounded once, as `F.rms_norm`."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    size = rows.shape[1]
    with torch.cuda.device_of(x):
        _normed[(len(rows),)](
            rows, rows.stride(0), weight, y, size, eps, triton.next_power_of_2(size), num_warps=8 if size > 1024 else 4
        )
    return y.view(x.shape)


@triton.jit
def _normed(x, row_stride, weight, y, size, eps, WIDTH: tl.constexpr):
    """Program n: row n of x (N, W), W at most WIDTH."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    inside = lane < size
    value = tl.load(x + row * row_stride + lane, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    factor = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + lane, (wide * scale * factor).to(value.dtype), mask=inside)


GATED = 1024  # outputs that one program makes


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up of x (..., 2F) = [gate ; up]: (..., F), rounded once."""
    rows = x.reshape(-1, x.shape[-1])
    size = rows.shape[1] // 2
    y = torch.empty((len(rows), size), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _gated[(len(rows), triton.cdiv(size, GATED))](rows, rows.stride(0), y, size, GATED, num_warps=4)
    return y.view(*x.shape[:-1], size)


@triton.jit
def _gated(x, row_stride, y, size, WIDTH: tl.constexpr):
    """Program (n, c): outputs c * WIDTH and on of row n."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = lane < size
    gate = tl.load(x + row * row_stride + lane, mask=inside, other=0.0)
    up = tl.load(x + row * row_stride + size + lane, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    tl.store(y + row * size + lane, (wide / (1 + tl.exp(-wide)) * up).to(gate.dtype), mask=inside)
