"""Text files -> documents -> tokens (cached on disk) -> Examples -> packed Batches.

Shapes: B rows in a batch, T row length, E examples in a batch.

A row holds several examples; `segments` says which token belongs to which, and a token sees its own example only, so
that which examples share a row does not change the loss. Order is a function of (seed, epoch).
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dlm.diffusion import CROP, example_generator
from dlm.tokenizer import encode_documents

SEPARATOR = "<|endoftext|>"  # on a line of its own between the documents of a text file
PAD_SEGMENT = -1
SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")
CACHE_FORMAT = 1  # part of the cache key: raise it when what is written changes


@dataclass(frozen=True)
class Example:
    """One thing to learn: tokens (L,) int64, target (L,) bool (which of them carry loss), its index in the data."""

    tokens: np.ndarray
    target: np.ndarray
    index: int

    def __post_init__(self):
        if self.tokens.shape != self.target.shape or self.tokens.ndim != 1:
            raise ValueError(
                f"example {self.index} has tokens of shape {self.tokens.shape} and target of shape "
                f"{self.target.shape}: both must be one row of the same length"
            )


@dataclass(frozen=True)
class Batch:
    """Packed examples.

    tokens (B, T) int64; segments (B, T) int64: the number e of the token's example in this batch, -1 for padding;
    target (B, T) bool; positions (B, T) int64: place within the example; index (E,) and epoch (E,) int64: which
    example of the data, in which pass over it (together they name its noise).
    """

    tokens: Tensor
    segments: Tensor
    target: Tensor
    positions: Tensor
    index: Tensor
    epoch: Tensor

    def __post_init__(self):
        assert self.tokens.shape == self.segments.shape == self.target.shape == self.positions.shape
        assert self.index.shape == self.epoch.shape

    def to(self, device) -> Batch:
        fields = (self.tokens, self.segments, self.target, self.positions, self.index, self.epoch)
        return Batch(*(field.to(device) for field in fields))


def pack(rows: Sequence[Sequence[tuple[int, Example]]], length: int, pad_id: int) -> Batch:
    """Lay rows of (epoch, example) out as a Batch of `length` columns. Errors: a row that does not fit."""
    shape = (len(rows), length)
    tokens = np.full(shape, pad_id, dtype=np.int64)
    segments = np.full(shape, PAD_SEGMENT, dtype=np.int64)
    target = np.zeros(shape, dtype=bool)
    positions = np.zeros(shape, dtype=np.int64)
    index, epochs = [], []
    for r, row in enumerate(rows):
        start = 0
        for epoch, example in row:
            end = start + len(example.tokens)
            if end > length:
                raise ValueError(
                    f"example {example.index} ends at token {end} of a row of {length}: shorten it or use longer rows"
                )
            tokens[r, start:end] = example.tokens
            segments[r, start:end] = len(index)
            target[r, start:end] = example.target
            positions[r, start:end] = np.arange(end - start)
            index.append(example.index)
            epochs.append(epoch)
            start = end
    arrays = (tokens, segments, target, positions, np.array(index, np.int64), np.array(epochs, np.int64))
    return Batch(*(torch.from_numpy(array) for array in arrays))


# ---------------------------------------------------------------------------------------------------------- reading


def read_documents(path: str | os.PathLike, column: str = "text") -> Iterator[str]:
    """The documents of a .txt, .jsonl, .txt.xz or .jsonl.xz file, odd whitespace normalised, empty ones left out.

    Errors: a missing file, another suffix, text that is not UTF-8, a JSONL line that does not parse or lacks
    `column`, a file without a document; each names the file (and line).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a {', '.join(SUFFIXES)} file")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: unknown kind of file; data files end in {', '.join(SUFFIXES)}")
    jsonl = ".jsonl" in path.suffixes
    found = False
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for text in _json_texts(lines, path, column) if jsonl else _split(lines):
                text = normalise(text)
                if text:
                    found = True
                    yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); convert it, e.g. with iconv") from error
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: not a complete .xz file ({error}); fetch it again") from error
    if not found:
        raise ValueError(f"{path}: the file holds no text; give a file with at least one document")


def normalise(text: str) -> str:
    """Unix line ends, plain spaces, no spaces at line ends, at most one empty line in a row, none at the ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").replace("\ufeff", "")
    lines, blank = [], False
    for line in text.split("\n"):
        line = line.rstrip()
        if line or not blank:
            lines.append(line)
        blank = not line
    return "\n".join(lines).strip()


def _split(lines) -> Iterator[str]:
    parts: list[str] = []
    for line in lines:
        if line.strip() == SEPARATOR:
            yield "".join(parts)
            parts = []
        else:
            parts.append(line)
    yield "".join(parts)


def _json_texts(lines, path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: a JSON {type(record).__name__}, not an object with columns")
        if not isinstance(record.get(column), str):
            found = ", ".join(sorted(record)) or "none"
            raise ValueError(f"{path}, line {number}: no text in column {column!r}; the columns are {found}")
        yield record[column]


# ------------------------------------------------------------------------------------------------------ token cache


@dataclass(frozen=True)
class Documents:
    """Tokenized documents: tokens (N,) uint16 or uint32, end to end; document d is tokens[starts[d]:starts[d + 1]].

    target (N,) bool, or None: every token but the begin-of-text token carries loss. bytes: UTF-8 size of the text.
    """

    tokens: np.ndarray
    starts: np.ndarray
    target: np.ndarray | None
    bos_id: int | None
    bytes: int

    def __len__(self) -> int:
        return len(self.starts) - 1


def default_cache() -> Path:
    """Where tokenized data is kept: $DLM_CACHE, else the user's cache folder."""
    base = os.environ.get("DLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dlm"
    return Path(base) / "tokens"


def load_documents(path, tokenizer, *, column: str = "text", cache: str | os.PathLike | None = None) -> Documents:
    """Tokenize a file once, as [bos] tokens [eos] for each document, and memory-map the result from then on.

    The cache's name holds a hash of the file's path, size and time, the column and the tokenizer. Several processes
    may arrive together: each writes its own folder and the first rename wins. Errors: those of `read_documents`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a {', '.join(SUFFIXES)} file")
    stat = path.stat()
    named = (CACHE_FORMAT, str(path.resolve()), stat.st_size, stat.st_mtime_ns, column)
    digest = hashlib.sha256(repr(named).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    folder = Path(cache or default_cache()) / f"{path.name}-{digest.hexdigest()[:24]}"
    if not (folder / "meta.json").is_file():
        _write_cache(folder, path, tokenizer, column)
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    return Documents(tokens, np.load(folder / "starts.npy"), None, meta["bos_id"], meta["bytes"])


def _write_cache(folder: Path, path: Path, tokenizer, column: str) -> None:
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, after = ([] if bos is None else [bos]), ([] if eos is None else [eos])
    pieces, lengths, size, texts = [], [], 0, []

    def flush():
        for ids in encode_documents(tokenizer, texts):
            pieces.append(np.array(before + ids + after, dtype=dtype))
            lengths.append(len(pieces[-1]))
        texts.clear()

    for text in read_documents(path, column):
        texts.append(text)
        size += len(text.encode())
        if len(texts) == 1024:  # enough for `tokenizers` to use all cores, little enough to hold
            flush()
    flush()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    temporary.mkdir()
    np.save(temporary / "tokens.npy", np.concatenate(pieces))
    np.save(temporary / "starts.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    meta = {"source": str(path.resolve()), "documents": len(lengths), "bytes": size, "bos_id": bos, "eos_id": eos}
    (temporary / "meta.json").write_text(json.dumps(meta))
    try:
        os.rename(temporary, folder)
    except OSError:  # another process was first: its folder is the same
        shutil.rmtree(temporary)
        if not (folder / "meta.json").is_file():
            raise


# ------------------------------------------------------------------------------------------- examples, rows, batches


class Examples:
    """Documents cut into examples of at most `length` tokens: a long one gives consecutive examples.

    An example's number is its index over all files in order; it names its noise.
    """

    def __init__(self, documents: Sequence[Documents], length: int):
        if length < 2:
            raise ValueError(f"sequence_length is {length}: an example needs at least 2 tokens")
        self.documents, self.length = list(documents), length
        files, starts, lengths, owners, first = [], [], [], [], 0
        for number, part in enumerate(self.documents):
            sizes = np.diff(part.starts)
            pieces = -(-sizes // length)
            owner = np.repeat(np.arange(len(part)), pieces)
            within = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            start = part.starts[owner] + within * length
            files.append(np.full(len(owner), number))
            starts.append(start)
            lengths.append(np.minimum(part.starts[owner + 1] - start, length))
            owners.append(owner + first)
            first += len(part)
        self.files, self.starts = np.concatenate(files), np.concatenate(starts)
        self.lengths, self.owners = np.concatenate(lengths), np.concatenate(owners)  # owner: document over all files

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        part, start = self.documents[self.files[index]], self.starts[index]
        end = start + self.lengths[index]
        tokens = np.asarray(part.tokens[start:end]).astype(np.int64)
        target = tokens != part.bos_id if part.target is None else np.asarray(part.target[start:end])
        return Example(tokens, target, int(index))

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def pack_rows(lengths: Sequence[int], order: Sequence[int], length: int) -> list[list[int]]:
    """Put examples into rows of `length`, each into the fullest open row that still holds it (online best fit).

    Open rows are kept by the room they have left; a bit set of the rooms in use finds the smallest that fits, so that
    the cost does not grow with the number of rows. Rows come in the order in which they were begun.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    in_use = 0
    for example in order:
        size = int(lengths[example])
        fitting = in_use >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                in_use &= ~(1 << room)
            rows[row].append(int(example))
        else:
            room, row = length, len(rows)
            rows.append([int(example)])
        left = room - size
        if left:
            by_room[left].append(row)
            in_use |= 1 << left
    return rows


class Stream:
    """An endless sequence of packed rows; its position (epoch, row) is all that a checkpoint needs to keep.

    An epoch is every example once, in an order drawn from (seed, epoch). Rows flow over the end of an epoch, so that
    every optimizer step has the same number of them.
    """

    def __init__(self, examples: Examples, seed: int, position: tuple[int, int] = (0, 0)):
        self.examples, self.seed = examples, seed
        self.epoch, self.row = position
        self._rows: list[list[int]] | None = None

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.row

    def take(self, count: int) -> list[list[tuple[int, int]]]:
        """The next `count` rows, each a list of (epoch, example index)."""
        taken = []
        while len(taken) < count:
            if self._rows is None:
                self._rows = epoch_rows(self.examples, self.seed, self.epoch)
            if self.row == len(self._rows):
                self.epoch, self.row, self._rows = self.epoch + 1, 0, None
                continue
            taken.append([(self.epoch, index) for index in self._rows[self.row]])
            self.row += 1
        return taken


def epoch_rows(examples: Examples, seed: int, epoch: int) -> list[list[int]]:
    """The packed rows of one epoch, shuffled by (seed, epoch)."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(examples))
    return pack_rows(examples.lengths, order, examples.length)


def fetch(
    examples: Examples, rows: Sequence[Sequence[tuple[int, int]]], pad_id: int, *,
    random_length: float = 0.0, seed: int = 0,
) -> Batch:  # fmt: skip
    """The Batch of rows of (epoch, index), as `Stream.take` gives them; random_length, seed: as `crop` takes them."""
    made = [[(epoch, crop(examples[i], epoch, random_length, seed)) for epoch, i in row] for row in rows]
    return pack(made, examples.length, pad_id)


def crop(example: Example, epoch: int, probability: float, seed: int) -> Example:
    """With this probability the first n tokens, n from 1..L: LLaDA's 1% of short texts (arXiv:2502.09992, 2.2).

    A text that does not end lets the model meet lengths below that of its rows. Like noise, the draw belongs to the
    example: it is a function of (seed, epoch, index).
    """
    if probability == 0:
        return example
    generator = example_generator(seed, epoch, example.index, CROP)
    if generator.random() >= probability:
        return example
    length = int(generator.integers(1, len(example.tokens) + 1))
    return Example(example.tokens[:length], example.target[:length], example.index)
