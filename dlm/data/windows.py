"""A corpus -> the windows of tokens that a model is scored on, and how many bytes of text they stand for.

Shapes: L tokens of a window, N tokens of a document or of the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dlm.data.detokenize import detokenize
from dlm.data.examples import Example
from dlm.data.sources import columns_of, normalise, read_documents, read_rows
from dlm.tokenizer import encode_documents
from dlm.utils.names import check_name

BOS, EOS = ("auto", "none", "document", "window"), ("document", "none")


@dataclass(frozen=True)
class CorpusConfig:
    """How a corpus becomes windows.

    length: most tokens of a window. wrap: documents end to end, cut without regard to where they end; otherwise each
    in windows of its own. overlap: tokens before a window that it is given and not scored on. bos: where a
    begin-of-text token stands, given and not scored: nowhere, before every `document` or every `window`; `auto` is
    `document` where the tokenizer itself begins texts with it, else `none`. eos: an end-of-text token after every
    `document`, scored, or `none`. detokenizer: `dlm.detokenize`. column: where rows hold the text; several
    with commas between stand one under the other. max_bytes: the first documents alone, the last of them cut.
    """

    length: int
    wrap: bool = False
    overlap: int = 0
    bos: str = "auto"
    eos: str = "document"
    detokenizer: str = "none"
    column: str = "text"
    split: str = "test"
    max_bytes: int | None = None

    def __post_init__(self):
        check_name("bos", self.bos, BOS)
        check_name("eos", self.eos, EOS)
        if self.length < 2:
            raise ValueError(f"length is {self.length}: a window holds at least 2 tokens")
        if not 0 <= self.overlap < self.length - 1:
            raise ValueError(
                f"overlap is {self.overlap}: it must be 0 or more, and below length - 1, {self.length - 1}"
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes is {self.max_bytes}: give 1 or more")


@dataclass(frozen=True)
class Corpus:
    """Windows in order, each an Example whose index is its number; owners (E,): the document of each, or the window
    itself where they were wrapped or there is but one; bytes: UTF-8 size of the text; bos: as in CorpusConfig, `auto`
    resolved."""

    examples: list[Example]
    owners: np.ndarray
    bytes: int
    documents: int
    bos: str

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return sum(int(example.target.sum()) for example in self.examples)


def load_corpus(path: str, tokenizer, config: CorpusConfig) -> Corpus:
    """Read and tokenize a source, as `dlm.reading.read_documents` names it, whose errors these are; and a tokenizer
    without the begin-of-text or end-of-text token that is asked for."""
    bos, where = _beginning(tokenizer, config)
    end = [tokenizer.eos_token_id] if config.eos == "document" else []
    if None in end:
        raise ValueError("eos is 'document', and the tokenizer has no end-of-text token: use --eos none")
    texts = list(_texts(path, config))
    before = [bos] if where == "document" else []
    streams = [before + ids + end for ids in encode_documents(tokenizer, texts)]
    if config.wrap:
        streams = [[token for stream in streams for token in stream]]
    first, several = ([bos] if where == "window" else []), len(streams) > 1
    examples, owners = [], []
    for number, stream in enumerate(streams):
        ids = np.array(stream, dtype=np.int64)
        target = np.ones(len(ids), dtype=bool) if where != "document" else ids != bos
        for tokens, scored in cut(ids, target, config.length, config.overlap, first):
            owners.append(number if several else len(examples))
            examples.append(Example(tokens, scored, len(examples)))
    size = sum(len(text.encode()) for text in texts)
    return Corpus(examples, np.array(owners), size, len(texts), where)


def _texts(path: str, config: CorpusConfig) -> Iterator[str]:
    left = config.max_bytes
    for text in _documents(path, config.column.split(","), config.split):
        text = detokenize(text, config.detokenizer)
        size = len(text.encode())
        if left is None or size <= left:
            yield text
        elif left > 0:
            yield text.encode()[:left].decode(errors="ignore")
        left = None if left is None else left - size
        if left is not None and left <= 0:
            return


def _documents(path: str, columns: list[str], split: str) -> Iterator[str]:
    """The documents of a source; several columns are one under the other."""
    if len(columns) == 1:
        yield from read_documents(path, columns[0], split)
        return
    for where, row in read_rows(path, split):
        for column in columns:
            if not isinstance(row.get(column), str):
                raise ValueError(f"{where}: no text in column {column!r}; the columns are {columns_of(row)}")
        yield normalise("\n".join(row[column] for column in columns))


def _beginning(tokenizer, config: CorpusConfig) -> tuple[int | None, str]:
    """The begin-of-text token and where it stands. Errors: it is asked for and there is none."""
    bos = tokenizer.bos_token_id
    if config.bos == "auto":
        return bos, "document" if bos is not None and tokenizer("a")["input_ids"][0] == bos else "none"
    if config.bos != "none" and bos is None:
        raise ValueError(f"bos is {config.bos!r}, and the tokenizer has no begin-of-text token: use --bos none")
    return bos, config.bos


def cut(
    ids: np.ndarray, target: np.ndarray, length: int, overlap: int = 0, first: list[int] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows (tokens, scored) of at most `length` over ids (N,) with target (N,) bool: every token that is a target
    is scored in exactly one.

    A window after the first begins with the `overlap` tokens before it; `first`: ids before every window; neither is
    scored.
    """
    head = np.array(first or [], dtype=np.int64)
    start = 0
    while start < len(ids):
        since = max(0, start - overlap)
        end = min(len(ids), since + length - len(head))
        scored = target[since:end] & (np.arange(since, end) >= start)
        yield np.concatenate([head, ids[since:end]]), np.concatenate([np.zeros(len(head), bool), scored])
        start = end
