"""Offline batches: prompts of a file through the engine, each text on a line of a file, in the order of the prompts.

However many prompts there are, only a window of them is in memory: the engine's rows and those that wait for one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from dlm.sampling.config import SamplingConfig
from dlm.serving.engine import Engine
from dlm.serving.requests import Handle, PassFailed, Request, RowFailed

if TYPE_CHECKING:
    from dlm.serving.resume import Output

__all__ = ["Text", "records", "texts", "write"]

AHEAD = 4  # the window, in rows of the engine: texts that are done wait in it for one that takes long


@dataclass(frozen=True)
class Text:
    """One text to write: its place among all of them, its prompt, its seed."""

    index: int
    prompt: str
    seed: int


def texts(prompts: Iterable[str], samples: int, seed: int, first: int = 0, rank: int = 0, size: int = 1):
    """The texts of process `rank` of `size`, `samples` for each prompt, the first `first` of them left out."""
    pairs = ((prompt, number) for prompt in prompts for number in range(samples))
    share = islice(enumerate(pairs), rank, None, size)
    for index, (prompt, _) in islice(share, first, None):
        yield Text(index, prompt, (seed + index) % 2**63)


def records(
    engine: Engine, wanted: Iterable[Text], config: SamplingConfig, encode: Callable[[str], list[int]]
) -> Iterator[dict[str, Any]]:
    """The record of each text, in order; one whose prompt does not fit has an `error` in place of a text.

    encode: a prompt's ids. Each text is what its prompt alone would give. Raises ServingError where the engine ends.
    """
    engine.wait_until_loaded()
    window = engine.settings.max_rows + min(engine.settings.max_waiting, (AHEAD - 1) * engine.settings.max_rows)
    ahead: deque[tuple[Text, Handle | Exception]] = deque()
    region = [engine.pretrained.mask_id] * config.start_length
    for text in wanted:
        ahead.append((text, _submitted(engine, text, config, encode, region)))
        if len(ahead) >= window:
            yield _record(*ahead.popleft())
    while ahead:
        yield _record(*ahead.popleft())


def _submitted(engine: Engine, text: Text, config: SamplingConfig, encode, region: list[int]) -> Handle | Exception:
    try:
        text.prompt.encode("utf-8")
        with engine.text_lock:
            ids = encode(text.prompt)
        return engine.submit(Request([*ids, *region], replace(config, seed=text.seed)))
    except UnicodeEncodeError:
        return ValueError("the prompt is not UTF-8 text (a lone surrogate)")
    except ValueError as error:
        return error


def _record(text: Text, handle: Handle | Exception) -> dict[str, Any]:
    head = {"index": text.index, "prompt": text.prompt, "seed": text.seed}
    try:
        if isinstance(handle, Exception):
            raise handle
        result = handle.result()
    except PassFailed:
        raise  # it says nothing about this prompt
    except (ValueError, RowFailed) as error:
        return head | {"error": str(error).replace("max_tokens", "gen_length")}  # the protocol's word
    return head | {
        "text": result.text,
        "token_ids": list(result.ids),
        "finish_reason": result.finish_reason,
        "nfe": result.nfe,
        "tokens_per_forward": round(result.tokens_per_forward, 4),
    }


def write(records: Iterable[dict[str, Any]], output: Output) -> tuple[int, int, float]:
    """Writes records as they come; returns how many had an error, the tokens written, and the seconds.

    Raises ValueError for an error in the very first text: most likely all have it.
    """
    wrong = tokens = 0
    began = time.monotonic()
    for record in records:
        if "error" in record:
            if record["index"] == 0:
                raise ValueError(f"the first prompt: {record['error']}")
            wrong += 1
        tokens += len(record.get("token_ids", ()))
        output.append(record)
    return wrong, tokens, time.monotonic() - began
