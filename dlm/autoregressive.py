"""The causal twin: exact likelihood of the next token, and generation token by token with the same cache.

Shapes: B rows, T slots, V vocabulary.

Under causal visibility a pass that computes one slot a row and scatters its keys is ordinary decoding with a cache:
no other code is needed than what computes any slots of a canvas.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.cache import KVCache
from dlm.data import Example
from dlm.likelihood import Bound
from dlm.models import LLaDAConfig, read_objective
from dlm.models.attention import causal
from dlm.sampler import GenerationOutput
from dlm.unmasking import propose

__all__ = ["generate", "is_autoregressive", "likelihood"]

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]  # tokens, valid, keep (B, T) -> (N, V): after each place kept


def is_autoregressive(path: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether a checkpoint predicts the next token: any family but LLaDA's, or one of ours whose notes
    (`training.json`) name that objective."""
    from transformers import PretrainedConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        return False  # no checkpoint, as `load` will say
    fields, _ = PretrainedConfig.get_config_dict(str(path), revision=revision or "main")
    if fields.get("model_type") != LLaDAConfig.model_type:
        return True
    return read_objective(path) == "autoregressive"


@torch.inference_mode()
def likelihood(logits: Logits, examples: Sequence[Example], *, device=None, batch_size: int = 16) -> list[Bound]:
    """-log p of the target tokens of each example given all tokens before each of them: exact, one evaluation.

    The first token of an example has nothing before it and is not scored, though it be a target.
    Errors: no numbers (FloatingPointError).
    """
    found = [Bound(0.0, 0.0, 0, 0)] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    for start in range(0, len(order), batch_size):
        here = order[start : start + batch_size]
        longest = len(examples[here[0]].tokens)
        tokens = torch.zeros(len(here), longest, dtype=torch.int64)
        scored, valid = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
        for row, i in enumerate(here):
            size = len(examples[i].tokens)
            tokens[row, :size], valid[row, :size] = torch.from_numpy(examples[i].tokens), True
            scored[row, 1:size] = torch.from_numpy(examples[i].target[1:])
        predicting = scored.roll(-1, dims=1)  # the place before; column 0 is never scored
        tokens, valid, scored = tokens.to(device), valid.to(device), scored.to(device)
        if bool(scored.any()):
            got = logits(tokens, valid, predicting.to(device))
            got = got if got.dtype == torch.float64 else got.float()
            ce = F.cross_entropy(got, tokens[scored], reduction="none").double().cpu()
        else:
            ce = torch.zeros(0, dtype=torch.float64)
        if bool(ce.isnan().any()):
            raise FloatingPointError("the model's logits are no numbers: its weights are damaged, or overflow")
        counts = scored.sum(dim=1).tolist()
        for i, count, part in zip(here, counts, ce.split(counts), strict=True):
            found[i] = Bound(float(part.sum()), 0.0, int(count > 0), count)
    return found


@torch.inference_mode()
def generate(
    model,
    prompts: Sequence[Sequence[int]],
    gen_length: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_ids: Sequence[int] = (),
    forbidden: Sequence[int] = (),
    cached: bool = True,
) -> GenerationOutput:
    """Continues each prompt (at least one token) by at most `gen_length` tokens, one a pass.

    A row ends at its first end-of-text, and the rest of its sequence holds it; rows that have ended cost nothing.
    forbidden: ids that are never written (the mask token). Row i draws from seed + i, whatever the batch. cached:
    False computes the whole row at every pass, the reference. nfe is the passes of a row, positions_computed the
    slots they computed. Raises ValueError for an empty prompt.
    """
    if not prompts or min(map(len, prompts)) < 1:
        raise ValueError("a prompt is empty: the next token needs one before it (begin-of-text, for example)")
    device = next((p.device for p in model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    rows, lengths = len(prompts), torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    tokens = torch.zeros(rows, longest + gen_length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.as_tensor(prompt)
    tokens = tokens.to(device)
    cache = KVCache(rows, tokens.shape[1]) if cached else None
    generators = [torch.Generator(tokens.device).manual_seed((seed + row) % 2**63) for row in range(rows)]
    nfe, computed = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    active = torch.arange(rows, device=device)
    barred = torch.tensor(list(forbidden), dtype=torch.int64, device=device)
    for step in range(gen_length):
        here = lengths[active] + step - 1  # the slot of each row's last token
        logits = _next(model, tokens[active], here, active, cache, first=step == 0)  # (R, 1, V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        token, _ = propose(
            logits,
            [generators[row] for row in active.tolist()],
            counts=[1] * len(active),
            forbidden=barred,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        tokens[active, here + 1] = token[:, 0]
        whole = lengths[active] + step if not cached or step == 0 else torch.ones_like(active)
        nfe[active.cpu()] += 1
        computed[active.cpu()] += whole.cpu()
        ended = torch.isin(token[:, 0], torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device))
        for row in active[ended].tolist():
            tokens[row, int(lengths[row]) + step :] = token[active == row, 0]
        active = active[~ended]
        if not len(active):
            break
    slots = lengths[:, None] + torch.arange(gen_length, device=device)
    return GenerationOutput(
        sequences=tokens.gather(1, slots),
        nfe=nfe,
        tokens_per_forward=torch.ones(rows),
        positions_computed=computed,
    )


def _next(model, tokens: Tensor, here: Tensor, rows: Tensor, cache: KVCache | None, *, first: bool) -> Tensor:
    """Logits (R, 1, V) after slot `here` (R,) of each row.

    Slots past a row's own last one are computed too where rows have different lengths; nobody sees them before they
    are computed again, with their token.
    """
    if cache is not None and not first:
        at = here[:, None]
        view = cache.at(None if len(rows) == cache.rows else rows)
        return model(tokens.gather(1, at), at, visible=causal, cache=view)
    length = int(here.max()) + 1
    slots = torch.arange(length, device=tokens.device).repeat(len(tokens), 1)
    return model(tokens[:, :length], slots, visible=causal, cache=cache, logits_to_keep=here[:, None])
