"""Passes of a packed mask predictor replayed as CUDA graphs: one launch for a pass, in place of hundreds.

Shapes: B rows, Q slots computed, M places asked about, T slots of the canvas.

A graph is a recording of kernels on fixed memory, so there is one for each shape of a call, its inputs are copied to
where the recording reads them, and keys and values lie in caches that outlive a generation. A shape is recorded when
it comes a second time. What is not of fixed shape (some rows of a cache, a bool `logits_to_keep`) runs as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm.models.attention import full
from dlm.models.kv_cache import KVCache

__all__ = ["Graphs", "record_cuda"]

# A recorder runs a function once into a recording, and returns what replays it and where its result then lies.
Recorder = Callable[[Callable[[], Tensor], object], tuple[Callable[[], object], Tensor]]
KEPT = 4  # shapes of canvas whose caches and recordings are kept, the latest used


def record_cuda(function: Callable[[], Tensor], pool) -> tuple[Callable[[], object], Tensor]:
    """A CUDA graph of `function`, which is run once before on a stream of its own, as libraries set themselves up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = function()
    return graph.replay, result


@dataclass
class _Recording:
    inputs: dict[str, Tensor]
    replay: Callable[[], object]
    result: Tensor


@dataclass
class _Canvas:
    """What is kept for canvases of one shape: caches that nobody uses now, and recordings by shape of the call (None
    for one that came once)."""

    free: list[KVCache] = field(default_factory=list)
    recordings: dict[tuple, _Recording | None] = field(default_factory=dict)


class Graphs:
    """A mask predictor with the signature of `LLaDAModelLM.predict`: `predictor`'s passes, replayed where they can be.

    A result lies where the next replay writes: it must be used before. Calls come from one stream.
    """

    fixed_shapes = True  # the sampler pads what it asks about, so that shapes repeat

    def __init__(self, predictor, record: Recorder = record_cuda):
        self.predictor, self.record = predictor, record
        self.config, self.device, self.kernels = predictor.config, predictor.device, predictor.kernels
        self.pool = torch.cuda.graph_pool_handle() if record is record_cuda else None
        self._canvases: OrderedDict[tuple[int, int], _Canvas] = OrderedDict()

    def borrow(self, rows: int, length: int) -> KVCache:
        """A cache for a generation, which nobody else has until it is given back."""
        canvas = self._canvas(rows, length)
        return canvas.free.pop() if canvas.free else KVCache(rows, length)

    def give_back(self, cache: KVCache) -> None:
        self._canvas(cache.rows, cache.length).free.append(cache)

    def _canvas(self, rows: int, length: int) -> _Canvas:
        key = (rows, length)
        if key not in self._canvases:
            while len(self._canvases) >= KEPT:
                self._canvases.popitem(last=False)
            self._canvases[key] = _Canvas()
        self._canvases.move_to_end(key)
        return self._canvases[key]

    def __call__(
        self, tokens: Tensor, positions: Tensor | None = None, *, visible=None, cache=None, valid: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits, as `LLaDAModelLM.predict` gives them."""
        inputs = {"tokens": tokens, "positions": positions, "valid": valid, "logits_to_keep": logits_to_keep}
        inputs = {name: value for name, value in inputs.items() if value is not None}

        def run(given: dict[str, Tensor]) -> Tensor:
            return self.predictor(**given, visible=visible, cache=cache)

        fixed = positions is None if cache is None else type(cache) is KVCache
        if not fixed or logits_to_keep is None or logits_to_keep.ndim == 1 or logits_to_keep.dtype == torch.bool:
            return run(inputs)
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        key = (shapes, visible or full, cache)
        recordings = self._canvas(len(tokens), tokens.shape[1] if cache is None else cache.length).recordings
        if key not in recordings:
            recordings[key] = None
            return run(inputs)
        if recordings[key] is None:
            static = {name: value.clone() for name, value in inputs.items()}
            recordings[key] = _Recording(static, *self.record(lambda: run(static), self.pool))
        recording = recordings[key]
        for name, value in inputs.items():
            recording.inputs[name].copy_(value)
        recording.replay()
        return recording.result
