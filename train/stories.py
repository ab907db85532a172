"""Clean stories, divide them by how simple their words are, and make requests that they answer.

dlm train stories --data stories.txt.xz,books.jsonl --simple-words child_stories.txt --output data/stories
train/release_gpu.sh data/stories runs/release 540

Written to the output: simple.txt.xz and rest.txt.xz (documents separated by <|endoftext|>), and chat.jsonl.xz
(prompt, response): whole stories made short, each with a request for what it is about. Labels such as "CHAPTER 5:",
stage directions, sound effects and markup go out; so do texts that end in the middle or hold links, code or tables.
"""

from __future__ import annotations

import json
import lzma
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
from dlm.data.sources import read_documents
from dlm.utils.random import example_generator

LABEL = re.compile(
    r"\s*((chapter|part|scene|act)\s+(\d+|[ivxlc]+|one|two|three|four|five|six|seven|eight|nine|ten)\b[^\n]{0,80}"
    r"|(prologue|epilogue|title|the end)\b(\s*[:.][^\n]{0,80})?)",
    re.IGNORECASE,
)
SOUND = re.compile(
    r"[\[(][^\])\n]*(sound|music|fade|cue|pause|whisper|soft|voice|tone|audio|wind|intro|opening|creak|chime)"
    r"[^\])\n]*[\])]",
    re.IGNORECASE,
)
SPEAKER = re.compile(
    r"^((narrator|host|voiceover|voice)[^:\n]{0,60}|[A-Z][A-Za-z. ]{1,25}\s*\([^)\n]{0,60}\))\s*:\s*", re.IGNORECASE
)
DIRECTION = re.compile(r"[\[(].*[\])]")
PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "\u00a0": " "})
LETTERS = re.compile(r"[\x20-\x7e\n—–éèêñçöüáíóï]*")
FOREIGN = ("http", "```", "|", "@", "{", "<", "#", "=", "*", "[")
ENDS = (".", "!", "?", '"', "'", ")")
LOWER = re.compile(r"\b[a-z][a-z']*\b")
HERO = re.compile(r"\b([Aa]n?) ((?:[a-z-]+,? (?:and )?){1,5}?)(?:named|called) ([A-Z][a-z]+)\b")
NAME = re.compile(r"\b[A-Z][a-z]{2,}\b")
NOUN = re.compile(r"\ban? ([a-z]{3,12})[.!?;]")  # nothing follows it: no adjective
REQUESTS = {  # how a story is asked for: how often
    "Tell me a story about {}.": 8,
    "Tell me a story about {}": 2,
    "Tell me a short story about {}.": 2,
    "Write a story about {}.": 2,
    "Can you tell me a story about {}?": 2,
    "Please tell me a story about {}.": 2,
    "I want to hear a story about {}.": 1,
    "Write a short story about {}.": 1,
}
OPENERS = re.compile(  # of sentences, which are no names
    "The|And|But|One|She|Her|His|They|Then|With|From|When|Once|There|This|That|What|How|Why|Yes|You|For|All|Now|Just|Soon|"
    "Suddenly|After|Before|Every|Some|Maybe|Each|Their|Our|Let|Never|Not|Who|Where"
)
ANY = ("Tell me a story.", "Tell me a story, please.", "Tell me a bedtime story.", "Write a story.")


@dataclass(frozen=True)
class Limits:
    """least: characters of a text; common: kinds of words that count as simple; rare: the share of other words that a
    simple text may have; beginning, end: words of a short story's two parts, (least, most)."""

    least: int = 300
    common: int = 3000
    rare: float = 0.105
    beginning: tuple[int, int] = (55, 140)
    end: tuple[int, int] = (15, 70)


# ---------------------------------------------------------------- cleaning


def clean(text: str) -> str:
    """A story without title, labels, directions, sound effects, speakers' names and markup."""
    lines: list[str] = []
    for line in text.translate(PLAIN).split("\n"):
        line = SOUND.sub("", SPEAKER.sub("", line.replace("**", "").strip(), count=1))
        if LABEL.fullmatch(line):
            continue
        line = re.sub(r"^[*#_-]+\s*", "", line.strip()).strip("*_ ")
        if DIRECTION.fullmatch(line):
            continue
        if line or (lines and lines[-1]):
            lines.append(line)
    whole = "\n".join(lines).strip()
    title, _, rest = whole.partition("\n")
    if rest and len(title) < 80 and not title.endswith((*ENDS, "…", ",", ":")):
        whole = rest.strip()
    whole = re.sub(r"[ \t]+", " ", re.sub(r"\n{3,}", "\n\n", whole))
    return whole[1:].strip() if whole.startswith('"') and whole.count('"') % 2 else whole


def usable(text: str, limits: Limits) -> bool:
    """Whether a cleaned text is a whole story in plain prose."""
    if len(text) < limits.least or not text.endswith(ENDS) or not LETTERS.fullmatch(text):
        return False
    letters = sum(mark.isalpha() or mark in " ,.'\"\n!?-" for mark in text)
    return letters >= 0.97 * len(text) and not any(mark in text for mark in FOREIGN)


def rarity(text: str, simple: set[str]) -> float:
    """The share of a text's lower-case words that are not among the simple ones; names do not count."""
    words = LOWER.findall(text)
    return sum(word not in simple for word in words) / max(1, len(words))


# ---------------------------------------------------------------- requests


def shorten(story: str, limits: Limits, rng: np.random.Generator) -> str | None:
    """The first paragraphs and the last ones, as they are written; None where they do not make a story together."""
    paragraphs = [part.strip() for part in story.split("\n") if part.strip()]
    sizes = [len(part.split()) for part in paragraphs]
    tail, last = len(paragraphs), int(rng.integers(*limits.end, endpoint=True))
    while tail > 2 and (tail == len(paragraphs) or sum(sizes[tail - 1 :]) <= last):
        tail -= 1
    room, head = int(rng.integers(*limits.beginning, endpoint=True)), 0
    while head < tail and sum(sizes[: head + 1]) <= room:
        head += 1
    beginning, end = "\n\n".join(paragraphs[:head]), "\n\n".join(paragraphs[tail:])
    if sum(sizes[:head]) < limits.beginning[0] or not limits.end[0] <= sum(sizes[tail:]) <= limits.end[1]:
        return None
    whole = beginning.endswith(ENDS) and end.endswith(ENDS) and not end.startswith(('"', "'"))
    if not whole or beginning.count('"') % 2 or end.count('"') % 2 or not names(end) <= names(beginning):
        return None
    return beginning + "\n\n" + end


def names(text: str) -> set[str]:
    """Capitalised words that are nowhere in lower case."""
    lower = set(LOWER.findall(text))
    return {name for name in NAME.findall(text) if name.lower() not in lower and not OPENERS.fullmatch(name)}


def topic(answer: str, nouns: set[str], rng: np.random.Generator) -> str | None:
    """What a short story is about: its hero, or a thing named more than once; None where neither is clear."""
    hero, choice = HERO.search(answer[:400]), rng.random()
    if hero and choice < 0.4:
        kind = hero[2].split()[-1]
        return (f"{hero[1].lower()} {hero[2].strip()} named {hero[3]}", f"{article(kind)} named {hero[3]}", hero[3])[
            rng.integers(3)
        ]
    counts = Counter(word for word in LOWER.findall(answer) if word in nouns)
    often = [word for word, count in counts.most_common(3) if count > 1]
    return article(often[rng.integers(len(often))]) if often else None


def article(noun: str) -> str:
    """a dragon, an owl."""
    return ("an " if noun[0] in "aeiou" and not noun.startswith("uni") else "a ") + noun


def known_nouns(stories: list[str], limits: Limits) -> set[str]:
    """Nouns that stories introduce with "a" or "an", a hundredth of them or fewer, three of them at least."""
    seen = Counter(word for story in stories for word in set(NOUN.findall(story)))
    most = max(3, len(stories) // 100)
    return {word for word, count in seen.items() if 3 <= count <= most}


def request(story: str, nouns: set[str], limits: Limits, rng: np.random.Generator) -> dict | None:
    """A row of the chat file; None where a story cannot be made short or nobody could ask for it."""
    answer = shorten(story, limits, rng)
    if answer is None:
        return None
    if rng.random() < 0.05:
        return {"prompt": ANY[rng.integers(len(ANY))], "response": answer}
    about = topic(answer, nouns, rng)
    weights = np.array([*REQUESTS.values()], dtype=float)
    form = rng.choice([*REQUESTS], p=weights / weights.sum())
    return about and {"prompt": str(form).format(about), "response": answer}


# ---------------------------------------------------------------- the script


def run(argv: list[str]) -> int:
    """Read, clean, divide, and write the three files."""
    parser = story_files.options("train stories", "FOLDER", __doc__, "where the three files go")
    parser.add_argument("--simple-words", metavar="FILE", help="their commonest words are simple (default: --data)")
    args = parser.parse(argv)
    story_files.check(args, "folder")
    limits = Limits()
    raw = story_files.read(args)
    plain = read_documents(args.simple_words, args.text_column) if args.simple_words else raw
    counts = Counter(word for text in plain for word in LOWER.findall(text))
    simple = {word for word, _ in counts.most_common(limits.common)}
    cleaned = {re.sub(r"\W+", "", text.lower())[:200]: text for text in map(clean, raw) if usable(text, limits)}
    if not cleaned:
        raise ValueError(f"{args.data}: none of {len(raw)} texts is a whole story in plain prose")
    easy, rest = [], []
    for text in cleaned.values():
        (easy if rarity(text, simple) < limits.rare else rest).append(text)
    nouns = known_nouns(easy, limits)
    rows = [request(text, nouns, limits, example_generator(args.seed, 0, i)) for i, text in enumerate(easy)]
    rows = [json.dumps(row, ensure_ascii=False) for row in rows if row]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    document = "\n<|endoftext|>\n"
    files = {"simple.txt.xz": (easy, document), "rest.txt.xz": (rest, document), "chat.jsonl.xz": (rows, "\n")}
    for name, (parts, end) in files.items():
        with lzma.open(folder / name, "wt", encoding="utf-8") as file:
            file.write("".join(part + end for part in parts))
    print(
        f"{len(raw):,} texts: {len(easy):,} simple, {len(rest):,} other, {len(raw) - len(cleaned):,} left out "
        f"(not whole, not plain, or twice); {len(rows):,} requests; in {folder}"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run it; a user's mistake is one line and exit code 2."""
    return guarded("dlm train stories", run, argv)


if __name__ == "__main__":
    sys.exit(main())
