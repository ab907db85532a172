"""Texts that a model writes in order to learn from them, with the pass at which each token was committed.

Shapes: B rows, T slots.

They are kept in a file of JSON lines, `texts.jsonl` in the run's output: a header that says who wrote them and how, and
a line for each text with its ids and their passes (-1 for the beginning, which was given). A run that was stopped goes
on behind the last one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from dlm.checkpoints.generation import denoise
from dlm.checkpoints.pretrained import Pretrained
from dlm.evaluation.generations import write
from dlm.evaluation.metrics import repetition
from dlm.sampling.config import SamplingConfig
from dlm.sampling.prompts import prepare
from dlm.utils.jsonio import parse_json, to_json

FORMAT = "dlm-texts"
MOST_REPEATED = 0.05  # share of 4-grams that repeat an earlier one, above which a text is left out
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


@dataclass(frozen=True)
class Text:
    """ids: beginning, what was written, and end-of-text where it was; passes: when each was committed, -1 if given."""

    ids: list[int]
    passes: list[int]


def make_texts(
    path: Path, writer: Pretrained, beginnings: Sequence[Sequence[int]], config: SamplingConfig, batch_size: int = 64
) -> list[Text]:
    """The texts after all beginnings: those that the file holds, and the rest, which is written and put there.

    Text i has the seed config.seed + i. Raises ValueError where the file holds texts that were asked for otherwise.
    """
    said = {"model": writer.name, "texts": len(beginnings), "temperature": config.temperature, "seed": config.seed}
    header = {"format": FORMAT, **said, "gen_length": config.gen_length, "method": config.method}
    found = read_texts(path, header) if path.exists() else []
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(header) + "\n", encoding="utf-8")
    for start in range(len(found), len(beginnings), batch_size):
        part = beginnings[start : start + batch_size]
        made = write_texts(writer, part, config, start)
        lines = "".join(to_json({"ids": text.ids, "passes": text.passes}) + "\n" for text in made)
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        found += made
    return found


def read_texts(path: Path, header: dict | None = None) -> list[Text]:
    """The texts of a file, without a last line that was cut off. header: what its first line has to say.

    Raises ValueError for another file, or one that was written otherwise.
    """
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    first = parse_json(lines[0], f"{path}: line 1") if lines else None
    if not isinstance(first, dict) or first.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of texts that `dlm train distill` wrote: give its texts.jsonl")
    if header is not None:
        for name, value in header.items():
            if first.get(name) != value:
                raise ValueError(
                    f"{path} was written with {name} {first.get(name)}, not {value}: give another --output"
                )
    if rest and header is not None:  # the machine stopped in the middle of a line of its own file
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    found = []
    for number, line in enumerate(lines[1:], start=2):
        row = parse_json(line, f"{path}: line {number}")
        ids, passes = (row.get(name) if isinstance(row, dict) else None for name in ("ids", "passes"))
        if not _numbers(ids) or not _numbers(passes) or len(ids) != len(passes):
            raise ValueError(
                f"{path}: line {number} is no text with ids and passes: give the file as `dlm train distill` wrote it"
            )
        found.append(Text(ids, passes))
    return found


def _numbers(value) -> bool:
    """Whether a value is a list of whole numbers, one at least."""
    return isinstance(value, list) and bool(value) and all(type(number) is int for number in value)


def write_texts(writer: Pretrained, beginnings: Sequence[Sequence[int]], config: SamplingConfig, start: int = 0):
    """What the model writes after each beginning, [Text]; the first of them is text number `start`."""
    seeds = replace(config, seed=config.seed + start)
    if writer.autoregressive:
        rows = write(writer, beginnings, seeds, batch_size=len(beginnings))
        end = list(writer.end_ids[:1])
        rows = [row + (end if len(row) < config.gen_length else []) for row in rows]
        return [
            Text([*begin, *row], [-1] * len(begin) + list(range(len(row))))
            for begin, row in zip(beginnings, rows, strict=True)
        ]
    canvas, settings = prepare(writer.model, beginnings, seeds, writer.tokenizer)
    passes = torch.full(canvas.tokens.shape, -1, dtype=torch.int64)
    state = None
    for state in denoise(writer.model, canvas, seeds, **settings):
        passes[state.committed.cpu()] = state.step
    texts = []
    for row, begin in enumerate(beginnings):
        real = state.canvas.valid[row].cpu()
        ids, own = state.canvas.tokens[row].cpu()[real].tolist(), passes[row][real].tolist()
        ends = (place for place in range(len(begin), len(ids)) if ids[place] in writer.end_ids)
        size = next(ends, len(ids) - 1) + 1
        texts.append(Text(ids[:size], own[:size]))
    return texts


def reads_well(text: Text, words: str) -> bool:
    """Whether no word of `words`, the text decoded, follows itself, and few 4-grams of tokens come again.

    What several tokens a pass do to a text is to double its words; a model must not learn it from itself.
    """
    spoken = [word.lower() for word in WORD.findall(words)]
    return all(a != b for a, b in pairwise(spoken)) and (repetition(text.ids) or 0.0) <= MOST_REPEATED
