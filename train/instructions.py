"""Turn a file of stories into instructions and answers: who is in it, words to use, and how it ends.

python -m train.instructions --data stories.txt --output stories_instruct.jsonl
dlm train sft --config train/configs/instruct.yaml --data stories_instruct.jsonl

Each answer is a short version of a story, its beginning and its end as they are written. The instruction is made from
the answer, so that what it asks for is there: names, rarer words, and often the last sentence.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dlm.cli import story_files
from dlm.cli.scripts import guarded
from dlm.utils.jsonio import to_json
from dlm.utils.random import example_generator

SENTENCE = re.compile(r'(?<=[.!?])["”’]?\s+')
WORD = re.compile(r"[A-Za-z][A-Za-z'’]*")
NAME = re.compile(r"(?<![.!?\"“”:\n] )(?<![\n\"“:])\b[A-Z][a-z]{2,}\b(?!['’])")
ASKS = ("Write a story", "Tell a story", "Write a short story", "Please tell me a story")


@dataclass(frozen=True)
class Limits:
    """Sizes in words: of an answer's beginning and of its end; and the share of stories that a rarer word may be in."""

    beginning: int = 100
    end: int = 35
    common: float = 0.03


def shorten(story: str, limits: Limits) -> str | None:
    """The first paragraphs of a story and its last sentences; None where it has no such parts."""
    paragraphs = [" ".join(part.split()) for part in story.split("\n") if part.strip()]
    if len(paragraphs) > 1 and len(paragraphs[0].split()) < 8:
        paragraphs = paragraphs[1:]  # a title
    first, size = [], 0
    for sentence in (sentence for part in paragraphs for sentence in SENTENCE.split(part)):
        size += len(sentence.split())
        if size > limits.beginning:
            break
        first.append(sentence)
    ending = SENTENCE.split(paragraphs[-1]) if paragraphs else []
    while len(ending) > 1 and sum(len(sentence.split()) for sentence in ending) > limits.end:
        ending = ending[1:]
    if len(first) < 3 or not ending or len(ending[-1].split()) > limits.end or ending[0] in first:
        return None
    return " ".join(first) + "\n\n" + " ".join(ending)


def names_of(text: str) -> list[str]:
    """Names in order of how often they occur: capitalised inside a sentence, twice or more."""
    counts = Counter(NAME.findall(text))
    lower = {word for word in WORD.findall(text) if word.islower()}
    return [name for name, count in counts.most_common() if count > 1 and name.lower() not in lower]


def instruction(answer: str, rare: set[str], rng: np.random.Generator) -> dict | None:
    """What to ask for to get this answer: a row of the output; None where it has nobody to ask about."""
    names = names_of(answer)[:2]
    if not names:
        return None
    words = sorted({word for word in WORD.findall(answer) if word in rare})
    chosen = [words[i] for i in rng.permutation(len(words))[:3]] if rng.random() < 0.8 else []
    ending = SENTENCE.split(answer)[-1] if rng.random() < 0.6 else ""
    text = f"{ASKS[rng.integers(len(ASKS))]} about {' and '.join(names)}."
    if chosen:
        text += f" Use the words: {', '.join(chosen)}."
    if ending:
        text += f" It ends like this: {ending}"
    return {"prompt": text, "response": answer, "names": names, "words": chosen, "ending": ending}


def rarer_words(stories: list[str], limits: Limits) -> set[str]:
    """Lower-case words of four letters or more that are in a few of the stories, but not in many."""
    seen = Counter(word for story in stories for word in {w for w in WORD.findall(story) if w.islower() and len(w) > 3})
    most = max(3, round(limits.common * len(stories)))
    return {word for word, count in seen.items() if 3 <= count <= most}


def run(argv: list[str]) -> int:
    """Read the stories, write one JSON object a line: prompt, response, and what the prompt asks for."""
    parser = story_files.options("train instructions", "FILE", __doc__, "where the JSONL goes")
    parser.writes(output="jsonl")
    args = parser.parse(argv)
    story_files.check(args, "instructions")
    stories = story_files.read(args)
    limits = Limits()
    rare, made = rarer_words(stories, limits), []
    for index, story in enumerate(stories):
        answer = shorten(story, limits)
        row = answer and instruction(answer, rare, example_generator(args.seed, 0, index))
        if row:
            made.append(to_json(row, ascii_only=False) + "\n")
    if not made:
        raise ValueError(f"{args.data}: none of {len(stories)} stories has a beginning, an end and a name in it")
    Path(args.output).write_text("".join(made), encoding="utf-8")
    print(f"wrote {len(made):,} instructions from {len(stories):,} stories to {args.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run it; a user's mistake is one line and exit code 2."""
    return guarded("dlm train instructions", run, argv)


if __name__ == "__main__":
    sys.exit(main())
