"""Tokens of much text, quickly: a word that came before is looked up, not tokenized again.

A byte-level BPE cuts a text into words by a regular expression before it merges anything (GPT-2's; Radford et al.,
2019), so that a piece that ends where no word goes on has the same tokens wherever it stands. Pieces here end before
white space, and between letters and punctuation in ASCII. The tokenizer is asked about each piece once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np

from dlm.data.workers import Workers, worker_count
from dlm.tokenizer import encode_documents

__all__ = ["Words"]

# Whatever white space leads, then letters that punctuation follows, punctuation that letters follow, or all up to the
# next white space. The apostrophe is left out, which begins a word of its own ('s).
PIECE = re.compile(r"""\s*[A-Za-z]+(?=[.,;:!?")\-])|\s*["(\-]+(?=[A-Za-z])|\s*\S+|\s+""")
ODD = re.compile(r"[\x1c-\x1f]")  # white space to Python, not to `tokenizers`
KEPT = 500_000  # pieces, some 150 MB
MANY = 2**24  # characters after which other processes help; to start them takes a second
BATCH = 2**16  # characters of texts that are compared with the tokenizer's own answer before the pieces are trusted


class Words:
    """Encodes texts as `encode_documents` does, into arrays of `dtype` with `before` and `after` around each."""

    def __init__(self, tokenizer, dtype: type, before: Sequence[int] = (), after: Sequence[int] = ()):
        self.tokenizer, self.dtype = tokenizer, np.dtype(dtype)
        self.before, self.after = (self._bytes(ids) for ids in (before, after))
        self.known: dict[str, bytes] = {}
        self.left = BATCH if cuts_as_gpt2(tokenizer) else None  # characters still to compare; None: no pieces
        self.seen, self.workers = 0, None  # characters so far; processes that help, once they are many

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """An array of tokens for each text."""
        if self.left is None or any(ODD.search(text) for text in texts):
            return self._whole(texts)
        if self.left <= 0 and (made := self._shared(texts)) is not None:
            return made
        made = self.encode_pieces(texts)
        if self.left > 0:
            self.left -= sum(map(len, texts))
            whole = self._whole(texts)
            if not all(map(np.array_equal, made, whole)):
                self.left = None
            return whole
        return made

    def _whole(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._array(self._bytes(ids)) for ids in encode_documents(self.tokenizer, texts)]

    def _shared(self, texts: Sequence[str]) -> list[np.ndarray] | None:
        """The texts encoded with the help of other processes; None before there are many, and where there are none."""
        self.seen += sum(map(len, texts))
        if self.workers is None and self.seen > MANY and (count := worker_count()) > 0:
            self.workers = Workers(self, count)
        return self.workers.encode(texts) if self.workers is not None and self.workers.alive else None

    def encode_pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        """An array of tokens for each text, by pieces."""
        cut = [PIECE.findall(text) for text in texts]
        if len(self.known) > KEPT:
            self.known.clear()
        new = list(set().union(*cut) - self.known.keys())
        self.known.update(zip(new, map(self._bytes, encode_documents(self.tokenizer, new)), strict=True))
        return [self._array(b"".join(map(self.known.__getitem__, pieces))) for pieces in cut]

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()

    def _array(self, tokens: bytes) -> np.ndarray:
        return np.frombuffer(b"".join((self.before, tokens, self.after)), dtype=self.dtype)


def cuts_as_gpt2(tokenizer) -> bool:
    """Whether a tokenizer cuts by GPT-2's expression, with or without digits apart, and looks at no words before."""
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = made["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    known = [step.get("type") for step in steps] in (["ByteLevel"], ["Digits", "ByteLevel"])
    if not known or made["normalizer"] is not None or made["model"]["type"] != "BPE":
        return False
    return (
        steps[-1]["use_regex"]
        and not steps[-1]["add_prefix_space"]
        and not made["model"].get("dropout")
        and not made["model"].get("continuing_subword_prefix")
        and all(token["special"] for token in made["added_tokens"])
    )
