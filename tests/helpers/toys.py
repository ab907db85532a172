"""Tiny models and predictors that tests decode with: real transformers of random weights, and plain functions.

Shapes: B batch, T canvas, Q queried, V vocabulary.
"""

import torch

import dlm
from dlm.models.kv_cache import Beside, KVCache
from dlm.models.predictor import as_predictor

MASK = 39  # of tiny models: V = 40, the last id
VOCAB = 40


def tiny_config(**changes):
    fields = {
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
        "mlp_hidden_size": 48,
        "vocab_size": VOCAB,
        "embedding_size": VOCAB,
        "mask_token_id": MASK,
        "eos_token_id": 38,
        "pad_token_id": 38,
        "max_sequence_length": 256,
        "rope_theta": 10000.0,
        "init_device": "cpu",
    }
    return dlm.LLaDAConfig(**(fields | changes))


def tiny_model(seed=0, dtype=torch.float64, attn_implementation="sdpa", sharp=1.5, **changes):
    """A transformer with weights N(0, sharp^2 / fan-in): its guesses depend on every token and are rarely near-tied."""
    config = tiny_config(**changes)
    config._attn_implementation = attn_implementation
    model = dlm.LLaDAModelLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise)
            else:
                fan_in = weight.shape[1] if "wte" not in name else 1
                weight.copy_(noise * sharp / fan_in**0.5)
    return model.to(dtype).eval()


def keep(logits, logits_to_keep):
    """What a predictor returns of (B, Q, V) for each form of `logits_to_keep`."""
    if logits_to_keep is None:
        return logits
    if logits_to_keep.dtype == torch.bool:
        return logits[logits_to_keep]
    return logits.gather(1, logits_to_keep[..., None].expand(-1, -1, logits.shape[-1]))


class Predictor:
    """A mask predictor without a config: subclasses say `logits(tokens, slots) -> (B, Q, V)`; calls are recorded."""

    def __init__(self):
        self.calls = []

    def __call__(self, tokens, positions=None, *, visible=None, cache=None, valid=None, logits_to_keep=None):
        slots = torch.arange(tokens.shape[1]).expand_as(tokens) if positions is None else positions
        self.calls.append(tuple(tokens.shape))
        return keep(self.logits(tokens, slots), logits_to_keep)


class Table(Predictor):
    """Logits that depend on the slot alone: row `slot` of a (T, V) table."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.as_tensor(table)

    def logits(self, tokens, slots):
        return self.table[slots.clamp(0, len(self.table) - 1)]


class Probabilities(Table):
    """A table written as probabilities."""

    def __init__(self, table):
        super().__init__(torch.as_tensor(table, dtype=torch.float64).log())


class MaskLover(Predictor):
    """All its weight on the mask token; the others have `other` (a number or -inf)."""

    def __init__(self, vocab, mask_id, other):
        super().__init__()
        self.row = torch.full((vocab,), float(other))
        self.row[mask_id] = 30.0

    def logits(self, tokens, slots):
        return self.row.expand(*slots.shape, -1).clone()


class BreaksAt(Predictor):
    """Uniform logits until pass `number` (1-based), then not-a-number."""

    def __init__(self, vocab, number, value=float("nan")):
        super().__init__()
        self.vocab, self.number, self.value = vocab, number, value

    def logits(self, tokens, slots):
        out = torch.zeros(*slots.shape, self.vocab)
        if len(self.calls) >= self.number:
            out += self.value
        return out


class Recorder:
    """A model seen from outside: what was asked of it in every call, and nothing else changed."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, tokens, positions=None, **options):
        self.calls.append((tokens.clone(), None if positions is None else positions.clone(), options))
        return as_predictor(self.model)(tokens, positions, **options)


class Watch(Recorder):
    """A model that notes the token whose keys lie in each slot of the cache, and when a pass reads another one's."""

    def __init__(self, model):
        super().__init__(model)
        self.config = model.config
        self.stored = {}  # (row, slot) -> token

    def __call__(self, tokens, positions=None, *, cache=None, **options):
        if cache is not None and not isinstance(cache, Beside):
            rows = range(len(tokens)) if isinstance(cache, KVCache) else cache.rows.tolist()
            for row, ids, slots in zip(rows, tokens.tolist(), positions.tolist(), strict=True):
                self.stored |= {(row, slot): token for slot, token in zip(slots, ids, strict=True)}
        return super().__call__(tokens, positions, cache=cache, **options)

    def follow(self, states, canvas, reach=None):
        """Yields the states; after each the keys of every row that had a pass must be those of the canvas before it.
        reach(state, row): the slots that its pass could see; None for all."""
        before, spent = canvas, [0] * len(canvas.tokens)
        for state in states:
            for row, nfe in enumerate(state.nfe.tolist()):
                end = before.tokens.shape[1] if reach is None else reach(state, row)
                slots = before.valid[row, :end].nonzero()[:, 0].tolist() if nfe > spent[row] and self.stored else []
                read = [self.stored.get((row, slot)) for slot in slots]
                assert read == before.tokens[row, slots].tolist(), f"row {row} reads a stale key at turn {state.step}"
            before, spent = state.canvas, state.nfe.tolist()
            yield state


def trace(model, canvas, config, **options):
    """Runs `denoise`; (states, commit step of each slot (B, T), 0 where not generated)."""
    states, steps = [], torch.zeros(canvas.tokens.shape, dtype=torch.int64)
    longest = int(canvas.masked.sum(1).max())  # every turn commits a token of every row that is not done
    for state in dlm.denoise(model, canvas, config, **options):
        assert state.step <= longest, "a turn that commits nothing, or no end"
        assert (steps[state.committed] == 0).all(), "a slot was committed twice"
        steps[state.committed] = state.step
        states.append(state)
    return states, steps
