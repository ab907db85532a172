"""The judge: an autoregressive language model that says how probable generated text is, given its prompt.

Shapes: B texts, T tokens of a text, N scored tokens, V vocabulary.

A text is read by the judge's own tokenizer, prompt and answer together, so that a judge with any vocabulary will do.
The prompt, special tokens and a chat template's tokens are context and not scored; nor is end-of-text, at which the
answer's text ends: how probable it is that a text stops depends on gen_length more than on the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from dlm.checkpoints.files import TWIN
from dlm.checkpoints.gguf import dequantized, is_gguf
from dlm.checkpoints.load import is_own
from dlm.checkpoints.pretrained import Pretrained, load_pretrained
from dlm.evaluation.metrics import perplexity
from dlm.models.attention import causal

BATCH_TOKENS = 4096  # of a forward pass, padding included


@dataclass(frozen=True)
class Score:
    """nll: -log p(answer | prompt) in nats; tokens: how many of the judge's tokens that is."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float | None:
        """exp(nll / tokens); None for an answer without tokens."""
        return perplexity(self.nll, self.tokens)


class Judge:
    """score((prompt, answer) pairs) -> Scores, in batches; a pair that was scored before costs nothing.

    logits(tokens (B, T), valid (B, T), keep (B, T) bool) -> (N, V) of a causal model. limit: most tokens it reads.
    facts: its id, revision and kind, for the record.
    """

    def __init__(self, logits, tokenizer, device, limit: int | None, facts: dict):
        self.logits, self.tokenizer, self.device, self.limit, self.facts = logits, tokenizer, device, limit, facts
        self._known: dict[tuple[str, str, bool], Score] = {}

    @classmethod
    def of(cls, opened: Pretrained, tokenizer=None, vocab_size: int = 0) -> Judge:
        """The judge that an open checkpoint is; arguments and errors as `open_judge`."""
        if not opened.autoregressive:
            raise ValueError(
                f"the judge {opened.path} was trained on the objective {opened.objective}: a judge must be "
                "autoregressive, so that it gives a text one probability"
            )
        own, size = opened.optional_tokenizer, opened.config.get_text_config().vocab_size
        if own is None and (tokenizer is None or size != vocab_size):
            raise ValueError(
                f"the judge {opened.path} has no tokenizer, and its vocabulary of {size} is another than the model's "
                f"{vocab_size}: put its tokenizer files there, or take another judge"
            )
        facts = {
            "id": TWIN.name if Path(opened.path) == TWIN else opened.path,
            "revision": opened.digest,
            "kind": opened.family,
            "parameters": opened.model.num_parameters(),
            "dtype": opened.number_type,
            "tokenizer": "its own" if own is not None else "the model's",
        }
        return cls(_logits_of(opened), own or tokenizer, opened.model.device, opened.max_length, facts)

    def score(self, pairs: Sequence[tuple[str, str]], chat: bool = False) -> list[Score]:
        """One Score a pair. chat: the prompt is a question, put into the judge's chat template where it has one.

        Errors: an answer that is longer than the judge reads.
        """
        keys = [(prompt, answer, chat) for prompt, answer in pairs]
        fresh = sorted((set(keys) - self._known.keys()), key=lambda key: len(key[0]) + len(key[1]))
        rows = [self._encode(*key) for key in fresh]
        for batch in _batches(rows):
            sums = self._nll([rows[i] for i in batch])
            for i, nll in zip(batch, sums, strict=True):
                self._known[fresh[i]] = Score(nll, sum(rows[i][1]))
        return [self._known[key] for key in keys]

    def _encode(self, prompt: str, answer: str, chat: bool) -> tuple[list[int], list[bool]]:
        """Ids of prompt and answer, and which of them are scored: those that end within the answer.

        The first token of all has nothing before it, so it is not scored either.
        """
        tokenizer, special = self.tokenizer, True
        if chat and getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            special = False
        elif chat:
            prompt += "\n\n"
        if tokenizer.is_fast:
            encoding = tokenizer(prompt + answer, add_special_tokens=special, return_offsets_mapping=True)
            ids = encoding["input_ids"]
            scored = [end > len(prompt) for _, end in encoding["offset_mapping"]]
        else:  # without offsets the two are read apart
            ids, rest = (
                tokenizer(text, add_special_tokens=own)["input_ids"]
                for text, own in ((prompt, special), (answer, False))
            )
            scored = [False] * len(ids) + [True] * len(rest)
            ids = ids + rest
        if self.limit is not None and len(ids) > self.limit:
            if sum(scored) >= self.limit:
                raise ValueError(
                    f"an answer has {sum(scored)} tokens and the judge {self.facts['id']} reads {self.limit}: "
                    "take another judge, or a smaller gen_length"
                )
            ids, scored = ids[-self.limit :], scored[-self.limit :]  # the prompt's beginning goes
        return ids, [place > 0 and here for place, here in enumerate(scored)]

    @torch.inference_mode()
    def _nll(self, rows: Sequence[tuple[list[int], list[bool]]]) -> list[float]:
        """Sums of the scored tokens' cross entropies in nats, one a row."""
        longest = max(1, *(len(ids) for ids, _ in rows))
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        scored, valid = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
        for i, (ids, marks) in enumerate(rows):
            tokens[i, : len(ids)], scored[i, : len(ids)] = torch.tensor(ids), torch.tensor(marks, dtype=torch.bool)
            valid[i, : len(ids)] = True
        predicting = scored.roll(-1, dims=1)  # the place before; column 0 is never scored
        tokens, scored, valid = tokens.to(self.device), scored.to(self.device), valid.to(self.device)
        logits = self.logits(tokens, valid, predicting.to(self.device))  # (N, V)
        ce = F.cross_entropy(logits.float(), tokens[scored], reduction="none").double().cpu()
        owners = scored.nonzero()[:, 0].cpu()
        return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owners, ce).tolist()


def _batches(rows: Sequence[tuple[list[int], list[bool]]]) -> list[list[int]]:
    """Rows, short ones first, in groups of at most BATCH_TOKENS padded tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i][0])):
        if batches and (len(batches[-1]) + 1) * len(rows[i][0]) <= BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# ---------------------------------------------------------------- opening one


def open_judge(
    path: str, *, revision: str | None = None, device=None, dtype: str = "auto", tokenizer=None, vocab_size: int = 0
) -> Judge:
    """The judge in a folder or at a hub id: any AutoModelForCausalLM, an autoregressive checkpoint of dlm's own, or a
    GGUF file of a causal model (`gguf.dequantized`).

    tokenizer, vocab_size: of the model that is judged, for a judge that has the same vocabulary and no tokenizer.
    Errors: a model that is not autoregressive; a judge without a tokenizer whose vocabulary is another.
    """
    folder = dequantized(path) if is_gguf(path) else path
    opened = load_pretrained(folder, revision=revision, device=device, dtype=dtype, causal=True)
    return Judge.of(replace(opened, path=str(path)), tokenizer, vocab_size)


def _logits_of(opened: Pretrained):
    """What `Judge` calls: logits (N, V) at the places kept."""
    model = opened.model
    if is_own(opened.config):  # padding is at the end, where no token attends
        return lambda tokens, valid, keep: model.predict(tokens, visible=causal, logits_to_keep=keep)
    return lambda tokens, valid, keep: model(input_ids=tokens, attention_mask=valid.long()).logits[keep]
