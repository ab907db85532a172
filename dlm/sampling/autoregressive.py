"""The causal twin: exact likelihood of the next token, and generation token by token with the same cache.

Shapes: B rows, T slots, V vocabulary.

Under causal visibility a pass that computes one slot a row and scatters its keys is ordinary decoding with a cache:
no other code is needed than what computes any slots of a canvas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlm.models.attention import causal
from dlm.models.kv_cache import KVCache
from dlm.models.predictor import as_predictor
from dlm.sampling.generate import GenerationOutput
from dlm.sampling.propose import propose

__all__ = ["generate"]


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
        return as_predictor(model)(tokens.gather(1, at), at, visible=causal, cache=view)
    length = int(here.max()) + 1
    slots = torch.arange(length, device=tokens.device).repeat(len(tokens), 1)
    return as_predictor(model)(tokens[:, :length], slots, visible=causal, cache=cache, logits_to_keep=here[:, None])
