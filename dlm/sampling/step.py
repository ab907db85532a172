"""One pass of the denoising loop: run the model on some slots, propose a token and its confidence for some of them.

Shapes: T slots of the canvas, R rows of this pass, Q slots it computes, M masked slots asked about, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from dlm.kernels.by_rows import RowSizes
from dlm.models.attention import Visible
from dlm.models.kv_cache import Beside, KVCache
from dlm.models.predictor import as_predictor
from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SamplingConfig
from dlm.sampling.propose import propose

__all__ = [
    "Check", "Request", "branches", "compute", "compute_shadows", "decide_all", "forbidden_ids", "guided",
    "held_probability",
]  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What one forward pass is asked. rows (R,): of the canvas and the cache, None for all. positions (R, Q): the
    slots it computes, ascending, None for all. slots (R, M): the places it proposes for, of which row i's first
    counts[i] are masked and the rest padding: eligible (R, M) bool. valid (R, T): which slots exist, None for all."""

    rows: Tensor | None
    positions: Tensor | None
    slots: Tensor
    counts: list[int]
    eligible: Tensor
    valid: Tensor | None

    @classmethod
    def one(cls, slots: Tensor) -> "Request":
        """A single place of a single row, slots (1, 1), that is asked about once more."""
        return cls(None, None, slots, [1], torch.ones_like(slots, dtype=torch.bool), None)

    def of(self, few: Tensor, index: Tensor) -> "Request":
        """The request of some of its rows, few (N,) into R; index (R,): the rows of the canvas."""
        positions, valid = (None if x is None else x[few] for x in (self.positions, self.valid))
        counts = [self.counts[i] for i in few.tolist()]
        return Request(index[few], positions, self.slots[few], counts, self.eligible[few], valid)


def compute(
    predictor,
    canvas: Canvas,
    request: Request,
    *,
    guided: bool,
    visible: Visible,
    cache: KVCache | None,
    shifted: bool = False,
    sizes: RowSizes | None = None,
) -> Tensor:
    """Logits of one forward pass at the slots asked about: (R, M, V), or (2R, M, V) with guidance, where the second
    half has what is given masked, and the cache has rows for both. `canvas` holds the request's rows. shifted: the
    guess for slot i is the output at slot i - 1, for slot 0 and one behind padding its own. sizes: what each row would
    compute alone, for a predictor with `exact_rows`."""
    tokens, positions, valid, rows = canvas.tokens, request.positions, request.valid, request.rows
    kept = request.slots
    if shifted:
        kept = (kept - 1).clamp_min(0)
        if valid is not None:  # behind padding, as at slot 0
            kept = torch.where(valid.gather(1, kept), kept, request.slots)
    if positions is not None:
        kept = torch.searchsorted(positions, kept.contiguous()).clamp_max(positions.shape[1] - 1)
    elif cache is not None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)
    if cache is not None and rows is None and cache.rows != len(tokens) * (1 + guided):
        rows = torch.arange(len(tokens), device=tokens.device)  # the cache has second branches, of other rows
    if guided:
        tokens = torch.cat([tokens, tokens.masked_fill(canvas.given, canvas.mask_id)])
        positions, valid, kept = (None if x is None else x.repeat(2, 1) for x in (positions, valid, kept))
        if rows is not None and cache is not None:
            rows = torch.cat([rows, rows + cache.rows // 2])
    if positions is not None:
        tokens = tokens.gather(1, positions)
    cache = None if cache is None else cache.at(rows)
    predict = as_predictor(predictor)
    more = {} if sizes is None else {"sizes": sizes.repeated(1 + guided)}
    return predict(tokens, positions, visible=visible, cache=cache, valid=valid, logits_to_keep=kept, **more)


def compute_shadows(
    predictor, canvas: Canvas, request: Request, visible: Visible, cache: KVCache | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (R, M, V) of a pass, and those of shadows: a mask beside every slot asked about, at the same position,
    which sees all the canvas but that slot's token, and which the canvas does not see. With a cache the shadows are a
    forward pass of their own, which reads what the first has stored."""
    if cache is not None:
        return _shadows_beside(predictor, canvas, request, visible, cache)
    tokens, slots = canvas.tokens, request.slots
    rows, length = tokens.shape
    count = slots.shape[1]
    every = torch.arange(length, device=tokens.device).expand(rows, -1)
    places = torch.cat([every, slots], dim=1)  # (R, T + M) the slot of every query and key

    def seen(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        here = visible(b, places[b, q], places[b, k])
        return torch.where(k < length, here & ((q < length) | (places[b, q] != k)), q == k)

    valid = None
    if request.valid is not None:
        valid = torch.cat([request.valid, torch.ones_like(slots, dtype=torch.bool)], dim=1)
    kept = torch.cat([slots, length + torch.arange(count, device=tokens.device).expand(rows, -1)], dim=1)
    masks = torch.full_like(slots, canvas.mask_id)
    predict = as_predictor(predictor)
    logits = predict(torch.cat([tokens, masks], dim=1), places, visible=seen, valid=valid, logits_to_keep=kept)
    return logits[:, :count], logits[:, count:]


def _shadows_beside(predictor, canvas: Canvas, request: Request, visible: Visible, cache: KVCache):
    logits = compute(predictor, canvas, request, guided=False, visible=visible, cache=cache)
    slots, length, rows = request.slots, cache.length, request.rows
    if rows is None and cache.rows != len(slots):  # the cache has second branches, of other rows
        rows = torch.arange(len(slots), device=slots.device)

    def seen(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = slots[b, (k - length).clamp_min(0).clamp_max(slots.shape[1] - 1)] == q
        return torch.where(k < length, visible(b, q, k.clamp_max(length - 1)) & (q != k), own)

    valid = None
    if request.valid is not None:
        every = request.valid.new_zeros(len(slots), length)
        every[:, : request.valid.shape[1]] = request.valid
        valid = torch.cat([every, torch.ones_like(slots, dtype=torch.bool)], dim=1)
    kept = torch.arange(slots.shape[1], device=slots.device).expand(len(slots), -1)
    beside, predict = Beside(cache, rows, slots.shape[1]), as_predictor(predictor)
    masks = torch.full_like(slots, canvas.mask_id)
    return logits, predict(masks, slots, visible=seen, cache=beside, valid=valid, logits_to_keep=kept)


def held_probability(logits: Tensor, held: Tensor) -> Tensor:
    """(R, M) the probability of the tokens held under logits (R, M, V)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(dim=-1).gather(-1, held[..., None])[..., 0].exp()


def decide_all(
    logits: Tensor,
    request: Request,
    config: SamplingConfig,
    *,
    mask_id: int,
    vocab_size: int | None,
    suppressed: Sequence[int],
    generators: Sequence[torch.Generator],
    kernels=None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token, confidence and largest logit at every slot asked about, (R, M) each, the last for `Check`.

    `suppressed` ids, those from `vocab_size` on and the mask token are not proposed. allowed (R, M, V) bool: which
    tokens may be proposed at each place, None for all. kernels: the predictor's, where it has any.
    """
    forbidden = forbidden_ids(logits.shape[-1], vocab_size, (mask_id, *suppressed), logits.device)
    kernels = fused(logits, kernels)
    decided = [
        decide(part, other, request.counts, config, suppressed, forbidden, generators, kernels, mask)
        for part, other, mask in _parts(logits, config, allowed)
    ]
    parts = decided[0] if len(decided) == 1 else (torch.cat(x, dim=1) for x in zip(*decided, strict=True))
    token, confidence, largest = (x.view(request.slots.shape) for x in parts)
    return token, confidence, largest


# Numbers of logits that one call of `decide` sees on a CPU: what it computes of them stays in the processor's cache.
PART = 2**18


def _parts(
    logits: Tensor, config: SamplingConfig, allowed: Tensor | None
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """The logits (R, M, V) in pieces, with guidance those of the other branch, and where tokens are allowed place by
    place, which: on a CPU a few places at a time, (1, m, V), where no place needs its row's generator."""
    given = [*branches(logits, config), allowed]
    if logits.device.type != "cpu" or config.temperature > 0 or config.ordering == "random":
        return [tuple(given)]
    each = max(1, PART // logits.shape[-1])
    count = -(-given[0].shape[0] * given[0].shape[1] // each)
    pieces = [
        [None] * count if part is None else part.reshape(1, -1, part.shape[-1]).split(each, dim=1) for part in given
    ]
    return list(zip(*pieces, strict=True))


def decide(
    logits, other, counts, config: SamplingConfig, suppressed, forbidden, generators, kernels=None, allowed=None
):
    """Token, confidence and largest logit at every place of logits (R, M, V): (R, M) each. other: the logits with
    what is given masked, for guidance. allowed: bool of the logits' shape, which tokens may be proposed.
    kernels: what `fused` gave."""
    if other is None and allowed is None and kernels is not None and _greedy(config):
        summary = kernels.summarise(logits, forbidden, suppressed)
        return summary.token, summary.confidence(config.ordering), summary.largest
    logits = guided(logits, other, config)
    most = logits.amax(dim=-1)  # a NaN or +inf anywhere makes the largest so
    logits = logits.clamp_min(torch.finfo(logits.dtype).min)
    if suppressed:  # LLaDA's logits_eos_inf: gone from the prediction too, so that confidence does not count them
        logits[..., [token for token in suppressed if token < logits.shape[-1]]] = -torch.inf
    token, confidence = propose(
        logits,
        generators,
        counts=counts,
        forbidden=forbidden,
        allowed=allowed,
        confidence=config.ordering,
        temperature=config.temperature,
        tempered=config.tempered_confidence,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    return token, confidence, most


def branches(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """The logits (R, M, V), and with guidance those of the branch that has what is given masked."""
    return tuple(logits.chunk(2)) if config.cfg_scale else (logits, None)


def guided(logits: Tensor, other: Tensor | None, config: SamplingConfig) -> Tensor:
    """Logits in fp32 or more, with guidance l = u + (w + 1)(c - u)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if other is None:
        return logits
    other = other.to(logits.dtype)
    return other + (config.cfg_scale + 1) * (logits - other)


def _greedy(config: SamplingConfig) -> bool:
    """Whether a proposal is the argmax and a confidence of the model's own prediction."""
    return config.temperature == 0 and not config.tempered_confidence and config.ordering != "random"


def fused(logits: Tensor, kernels):
    """The predictor's kernels where they can read these logits in one pass, else None: torch makes the same proposal in
    several."""
    return kernels if type(logits) is Tensor and logits.dtype != torch.float64 else None


@lru_cache(maxsize=16)  # a copy from the host waits for the GPU
def forbidden_ids(size: int, vocab_size: int | None, ids: tuple[int, ...], device: torch.device) -> Tensor:
    """(N,) the ids of `size` that are not proposed."""
    ids = {token for token in ids if token < size} | set(range(size if vocab_size is None else vocab_size, size))
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.tensor(sorted(ids), dtype=torch.int64, device=device)


class Check:
    """Whether the largest logits (R, M) of the places a pass was asked about are numbers.

    On a GPU the answer travels to the host behind the pass that it is about: `refuse` waits for that pass alone, not
    for what was launched after it.
    """

    def __init__(self, largest: Tensor, request: Request):
        self.largest, self.request, self.done = largest, request, None
        if largest.device.type == "cpu" and bool(largest.amax() < torch.inf):  # places that only fill rows up too
            self.any = False
            return
        self.any = self.bad.any()
        if largest.is_cuda:
            found, self.any = self.any, torch.empty((), dtype=torch.bool, pin_memory=True)
            self.any.copy_(found, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    @cached_property
    def bad(self) -> Tensor:
        """(R, M) bool: the places asked about that have one that is not."""
        return self.request.eligible & ~(self.largest < torch.inf)

    @property
    def bad_rows(self) -> list[int]:
        """The rows of the pass that have one that is not."""
        return self.bad.any(dim=1).nonzero()[:, 0].tolist()

    def refuse(self) -> None:
        """Raises FloatingPointError where one is not."""
        if self.done is not None:
            self.done.synchronize()
        if not bool(self.any):
            return
        row, place = self.bad.nonzero()[0].tolist()
        rows, slots = self.request.rows, self.request.slots
        raise FloatingPointError(
            f"the model's logits are {self.largest[row, place].item()} at slot {int(slots[row, place])} of row "
            f"{row if rows is None else int(rows[row])}: its weights are damaged, or overflow in this dtype "
            "(try float32)"
        )
