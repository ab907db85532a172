"""The judge: an autoregressive language model that says how probable generated text is, given its prompt.

Shapes: B texts, T tokens of a text, N scored tokens, V vocabulary.

A text is read by the judge's own tokenizer, prompt and answer together, so that a judge with any vocabulary will do.
The prompt, special tokens and a chat template's tokens are context and not scored; nor is end-of-text, at which the
answer's text ends: how probable it is that a text stops depends on gen_length more than on the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.checkpoints.load import TWIN, load, quiet
from dlm.checkpoints.pretrained import identify, number_type
from dlm.evaluation.metrics import perplexity
from dlm.kernels.linear import QUANTIZED
from dlm.models.attention import causal
from dlm.models.configuration import LLaDAConfig
from dlm.tokenizer import load_tokenizer

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
            found = tokenizer(prompt + answer, add_special_tokens=special, return_offsets_mapping=True)
            ids = found["input_ids"]
            scored = [end > len(prompt) for _, end in found["offset_mapping"]]
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
    """The judge in a folder or at a hub id: any AutoModelForCausalLM, or an autoregressive checkpoint of dlm's own.

    tokenizer, vocab_size: of the model that is judged, for a judge that has the same vocabulary and no tokenizer.
    Errors: a model that is not autoregressive; a judge without a tokenizer whose vocabulary is another.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, revision=revision)
    own = load_tokenizer(path, revision)
    if config.model_type == LLaDAConfig.model_type:
        _check_autoregressive(path, config.objective)
        model, _ = load(path, revision=revision, device=device, dtype=dtype)

        def logits(tokens: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
            return model(tokens, visible=causal, logits_to_keep=keep)  # padding is at the end, which nobody sees
    else:
        model = _open_causal(path, revision, device, dtype)

        def logits(tokens: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
            return model(input_ids=tokens, attention_mask=valid.long()).logits[keep]

    size = config.get_text_config().vocab_size
    if own is None and (tokenizer is None or size != vocab_size):
        raise ValueError(
            f"the judge {path} has no tokenizer, and its vocabulary of {size} is another than the model's "
            f"{vocab_size}: put its tokenizer files there, or take another judge"
        )
    fields = ("max_sequence_length", "max_position_embeddings", "n_positions")
    limit = next((value for name in fields if (value := getattr(config, name, None))), None)
    facts = {
        "id": TWIN.name if Path(path) == TWIN else str(path),
        "revision": identify(path, revision, config),
        "kind": config.model_type,
        "parameters": model.num_parameters(),
        "dtype": number_type(model),
        "tokenizer": "its own" if own is not None else "the model's",
    }
    return Judge(logits, own or tokenizer, model.device, limit, facts)


def _open_causal(path: str, revision: str | None, device, dtype: str):
    from transformers import AutoModelForCausalLM

    if dtype in QUANTIZED:
        raise ValueError(f"dtype is {dtype!r}, which is for models in LLaDA's layout, and {path} is none: leave it out")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=dtype, device_map={"": device})
    return model.eval()


def _check_autoregressive(path: str, objective: str) -> None:
    """Errors: a checkpoint in dlm's layout that was trained for something else."""
    if objective != "autoregressive":
        raise ValueError(
            f"the judge {path} was trained on the objective {objective}: a judge must be autoregressive, "
            "so that it gives a text one probability"
        )
