"""Text -> tokens, made once and kept on disk: the Documents that examples are cut from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dlm.data.sources import identity, read_documents
from dlm.data.words import Words
from dlm.utils.files import cache_folder
from dlm.utils.jsonio import to_json

CACHE_FORMAT = 3  # part of the cache key: raise it when what is written changes


@dataclass(frozen=True)
class Documents:
    """Tokenized documents: tokens (N,) uint16 or uint32, end to end; document d is tokens[starts[d]:starts[d + 1]].

    target (N,) bool, or None: every token but the begin-of-text token carries loss. bytes: UTF-8 size of the text that
    carries loss. counts: what happened on the way from rows to documents, by name.
    """

    tokens: np.ndarray
    starts: np.ndarray
    target: np.ndarray | None
    bos_id: int | None
    bytes: int
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.starts) - 1


def load_documents(
    path, tokenizer, *, column: str = "text", split: str = "train", cache: str | os.PathLike | None = None
) -> Documents:
    """Tokenize a source once, as [bos] tokens [eos] for each document, and memory-map the result from then on.

    path, column, split: as in `read_documents`, whose errors these are.
    """
    named = ("text", identity(path, split), column)
    return cached(path, named, tokenizer, lambda: _tokenize(path, tokenizer, column, split), cache)


def cached(
    path, named: tuple, tokenizer, build: Callable[[], Documents], cache: str | os.PathLike | None = None
) -> Documents:
    """The Documents that `build` makes, kept on disk under a name that holds a hash of `named` and the tokenizer.

    Several processes may arrive together: each writes its own folder and the first rename wins.
    """
    digest = hashlib.sha256(repr((CACHE_FORMAT, *named)).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr(sorted(map(str, tokenizer.special_tokens_map.items()))).encode())  # which of them is the end
    folder = Path(cache or cache_folder("tokens")) / f"{Path(str(path)).name}-{digest.hexdigest()[:24]}"
    if not (folder / "meta.json").is_file():
        _write_cache(folder, build())
    meta = json.loads((folder / "meta.json").read_text())
    target = folder / "target.npy"
    return Documents(
        np.load(folder / "tokens.npy", mmap_mode="r"),
        np.load(folder / "starts.npy"),
        np.load(target, mmap_mode="r") if target.is_file() else None,
        meta["bos_id"],
        meta["bytes"],
        meta["counts"],
    )


def _tokenize(path, tokenizer, column: str, split: str) -> Documents:
    pieces, size, texts, words = [], 0, [], words_of(tokenizer)

    def flush():
        pieces.extend(words.encode(texts))
        texts.clear()

    for text in read_documents(path, column, split):
        texts.append(text)
        size += len(text.encode())
        if len(texts) == 1024:  # enough for `tokenizers` to use all cores, little enough to hold
            flush()
    flush()
    return join(pieces, None, tokenizer.bos_token_id, size)


def words_of(tokenizer) -> Words:
    """What encodes a text as [bos] tokens [eos] of the tokenizer's type."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return Words(tokenizer, token_type(tokenizer), [] if bos is None else [bos], [] if eos is None else [eos])


def token_type(tokenizer) -> type:
    """The smallest type that holds every token id."""
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32


def join(pieces: list[np.ndarray], targets: list[np.ndarray] | None, bos: int | None, size: int, counts=None):
    """Documents of one array of tokens (and one of targets) each."""
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    target = None if targets is None else np.concatenate(targets)
    return Documents(np.concatenate(pieces), starts, target, bos, size, counts or {})


def _write_cache(folder: Path, made: Documents) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        temporary.mkdir()
        np.save(temporary / "tokens.npy", made.tokens)
        np.save(temporary / "starts.npy", made.starts)
        if made.target is not None:
            np.save(temporary / "target.npy", made.target)
        meta = {"documents": len(made), "bytes": made.bytes, "bos_id": made.bos_id, "counts": made.counts}
        (temporary / "meta.json").write_text(to_json(meta))
        os.rename(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (folder / "meta.json").is_file():  # if it is there, another process was first, with the same
            raise ValueError(
                f"tokenized data cannot be written to {folder.parent} ({error.strerror or error}): make room, or name "
                f"another place in DLM_CACHE"
            ) from error
