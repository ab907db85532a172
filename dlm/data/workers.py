"""Processes that encode texts beside this one: each a share of every batch, with the tokens that `Words` gives.

    python -m dlm.data.workers      a worker: lists of texts on its standard input, tokens on its output (`marshal`)

A process and not a thread, since cutting texts holds Python's lock. A worker imports neither torch nor transformers,
and ends when its input does, however this process ended.
"""

from __future__ import annotations

import contextlib
import itertools
import marshal
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from dlm.data.words import Words

__all__ = ["Workers", "worker_count"]

MOST = 3  # workers; reading and writing keep this process busy beyond


def worker_count() -> int:
    """Cores that this process of its machine has beside its own, at most `MOST`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))) - 1)


class Workers:
    """`count` processes that encode as `words` does."""

    def __init__(self, words: Words, count: int):
        self.words = words
        about = (words.tokenizer.backend_tokenizer.to_str(), words.dtype.str, words.before, words.after)
        settings = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "dlm.data.workers"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=settings
            )
            for _ in range(count)
        ]
        self.end = weakref.finalize(self, _end, self.processes)
        for process in self.processes:
            _send(process, about)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """An array of tokens for each text. Where a worker has gone, this process does its share, and then all."""
        shares = _shares(texts, len(self.processes) + 1)
        asked = [_send(process, share) for process, share in zip(self.processes, shares[1:], strict=True)]
        made = self.words.encode_pieces(shares[0])
        for process, share, sent in zip(self.processes, shares[1:], asked, strict=True):
            answer = _answer(process, self.words.dtype) if sent else None
            if answer is None:
                self.end()
                answer = self.words.encode_pieces(share)
            made += answer
        return made

    @property
    def alive(self) -> bool:
        return self.end.alive


def _shares(texts: Sequence[str], count: int) -> list[Sequence[str]]:
    """The texts in `count` runs of about as many characters."""
    ends = np.cumsum([len(text) for text in texts])
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count) if len(texts) else [0] * (count - 1)
    bounds = [0, *map(int, cuts), len(texts)]
    return [texts[a:b] for a, b in itertools.pairwise(bounds)]


def _send(process: subprocess.Popen, content) -> bool:
    try:
        marshal.dump(content, process.stdin)
        process.stdin.flush()
    except OSError:
        return False
    return True


def _answer(process: subprocess.Popen, dtype: np.dtype) -> list[np.ndarray] | None:
    try:
        lengths, tokens = marshal.load(process.stdout)
    except (OSError, EOFError, ValueError, TypeError):
        return None
    return np.split(np.frombuffer(tokens, dtype=dtype), np.cumsum(lengths)[:-1]) if lengths else []


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what could not be written to a worker that has gone
                stream.close()
        process.wait()


def work() -> None:
    """The loop of a worker process: reads the tokenizer, then encodes lists of texts until its input ends."""
    from dlm.data.words import Words

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        core, dtype, before, after = marshal.load(asked)
        words = Words(SimpleNamespace(backend_tokenizer=Tokenizer.from_str(core)), dtype)
        words.before, words.after = before, after
        while True:
            arrays = words.encode_pieces(marshal.load(asked))
            marshal.dump(([len(array) for array in arrays], b"".join(arrays)), answers)
            answers.flush()
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    work()
