"""Sources of data -> rows and documents: text, JSONL and Parquet files, data sets of the Hugging Face hub.

A source is named by a path, or by `hf:` and a hub id or folder (`hf:openai/gsm8k`, `hf:openai/gsm8k/main` with a
configuration). A list of sources may carry weights: `a.jsonl:0.7,b.jsonl:0.3`.
"""

from __future__ import annotations

import lzma
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dlm.utils.errors import cause_of, shortened
from dlm.utils.jsonio import parse_json, read_json

SEPARATOR = "<|endoftext|>"  # on a line of its own between the documents of a text file
TEXT_SUFFIXES = (".txt", ".txt.xz")
ROW_SUFFIXES = (".jsonl", ".jsonl.xz", ".json", ".parquet")
SUFFIXES = TEXT_SUFFIXES + ROW_SUFFIXES
HUB = "hf:"
LONGEST_LINE = 2**26  # characters: what is longer is no row or paragraph, and would take gigabytes to tokenize

OnBad = Callable[[ValueError], None]  # what is told of a row that cannot be read


@dataclass(frozen=True)
class Source:
    """Where data comes from, and its share of the examples (None where no source of the list has one)."""

    path: str
    weight: float | None = None


def parse_sources(value: str) -> list[Source]:
    """The sources of a comma separated list, `path` or `path:weight`.

    Errors: some with a weight and some without; a weight that is not above 0.
    """
    sources = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        path, colon, tail = part.rpartition(":")
        try:
            weight = float(tail) if colon else None
        except ValueError:
            weight = None
        sources.append(Source(part) if weight is None else Source(path, weight))
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        plain = next(source.path for source in sources if source.weight is None)
        raise ValueError(f"{plain} has no weight and others do: give path:weight for every source, or for none")
    for source in sources:
        if source.weight is not None and not 0 < source.weight < math.inf:
            raise ValueError(f"{source.path} has weight {source.weight}: a weight is a share, above 0")
    return sources


def plain_paths(value: str, what: str) -> list[str]:
    """The paths of a list of sources of which all is taken. what: that is, for the message.

    Raises ValueError for a source with a weight, and as `parse_sources`.
    """
    sources = parse_sources(value)
    for source in sources:
        if source.weight is not None:
            raise ValueError(
                f"{source.path} has weight {source.weight:g}, and {what} are taken once each in a pass over the data: "
                f"leave the weight out"
            )
    return [source.path for source in sources]


def identity(path: str | os.PathLike, split: str) -> tuple:
    """What tells a source from another, or from itself after a change: for the name of what is made from it.

    Errors: a file that does not exist or is of an unknown kind; a data set that cannot be loaded.
    """
    if str(path).startswith(HUB):
        files = [file["filename"] for file in _hub(str(path), split).cache_files]
        return str(path), split, tuple((name, *_moment(Path(name))) for name in files)
    path = _known(path)
    return str(path.resolve()), *_moment(path)


def _moment(path: Path) -> tuple[int, ...]:
    """Size, times and number of a file: a rewrite that keeps size and modification time still changes the others."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def read_documents(
    path: str | os.PathLike,
    column: str = "text",
    split: str = "train",
    streaming: bool = False,
    on_bad: OnBad | None = None,
) -> Iterator[str]:
    """The documents of a source, odd whitespace normalised, empty ones left out.

    column: where rows hold the text; split, streaming, on_bad: as in `read_rows`. Errors: those of `read_rows`; text
    that is not UTF-8, a row without text in `column`, a source without a document; each names the file (and line).
    """
    found = False
    rows = str(path).startswith(HUB) or not str(path).endswith(TEXT_SUFFIXES)
    for text in _texts(path, column, split, streaming, on_bad) if rows else _split_file(_known(path)):
        text = normalise(text)
        if text:
            found = True
            yield text
    if not found:
        raise ValueError(f"{path}: the file holds no text; give a file with at least one document")


def read_rows(
    path: str | os.PathLike, split: str = "train", streaming: bool = False, on_bad: OnBad | None = None
) -> Iterator[tuple[str, dict]]:
    """The rows of a source, each with the words that say where it stands, for messages.

    split: of a data set of the hub; streaming: read that while it is fetched. on_bad: called with the error of a row
    that does not parse, which is then left out; without it that row ends the reading. Errors: a missing file, another
    suffix, a JSONL line that does not parse or is no object, a damaged file, a library that is needed and missing.
    """
    on_bad = on_bad or _refuse
    if str(path).startswith(HUB):
        yield from _hub_rows(str(path), split, streaming)
        return
    path = _known(path)
    if path.name.endswith(TEXT_SUFFIXES):
        raise ValueError(f"{path}: a text file has no columns; give a {', '.join(ROW_SUFFIXES)} file")
    yield from _parquet(path) if path.suffix == ".parquet" else _json_rows(path, on_bad)


def _refuse(error: ValueError) -> None:
    raise error


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


def _known(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        hint = "" if path.suffix else f", or {HUB}{path} if it is a data set of the hub"
        raise ValueError(f"{path}: no such file; give the path of a {', '.join(SUFFIXES)} file{hint}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: unknown kind of file; data files end in {', '.join(SUFFIXES)}")
    return path


def _lines(path: Path) -> Iterator[str]:
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8-sig") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise ValueError(
                        f"{path}, line {number}: longer than {LONGEST_LINE:,} characters; cut it into documents"
                    )
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); convert it, e.g. with iconv") from error
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: not a complete .xz file ({error}); fetch it again") from error


def _split_file(path: Path) -> Iterator[str]:
    parts: list[str] = []
    for line in _lines(path):
        if line.strip() == SEPARATOR:
            yield "".join(parts)
            parts = []
        else:
            parts.append(line)
    yield "".join(parts)


def _texts(path, column: str, split: str, streaming: bool, on_bad: OnBad | None) -> Iterator[str]:
    for where, row in read_rows(path, split, streaming, on_bad):
        try:
            if not isinstance(row.get(column), str):
                raise ValueError(f"{where}: no text in column {column!r}; the columns are {columns_of(row)}")
            yield checked(row[column], where)
        except ValueError as error:
            (on_bad or _refuse)(error)


def checked(text: str, where: str) -> str:
    """The text. Raises ValueError for one that is no Unicode text: half of a character (a lone surrogate)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: half of a character, {text[error.start]!a}, at character {error.start}; remove or mend it"
        ) from None
    return text


def columns_of(row: dict) -> str:
    """The names of a row's columns, for a message."""
    return ", ".join(sorted(map(str, row))) or "none"


def _json_rows(path: Path, on_bad: OnBad) -> Iterator[tuple[str, dict]]:
    """The objects of a file: one a line, or the elements of one array (Alpaca's alpaca_data.json)."""
    if path.suffix == ".json" and _begins_with(path, "["):
        for number, record in enumerate(read_json(path)):
            where = f"{path}, element {number}"
            if isinstance(record, dict):
                yield where, record
            else:
                on_bad(ValueError(f"{where}: a JSON {type(record).__name__}, not an object with columns"))
        return
    for number, line in enumerate(_lines(path), start=1):
        line = line.lstrip("\ufeff")  # files that were joined bring their marks along
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = parse_json(line, where)
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a JSON {type(record).__name__}, not an object with columns")
        except ValueError as error:
            on_bad(error)
            continue
        yield where, record


def _begins_with(path: Path, character: str) -> bool:
    return next((line.lstrip("\ufeff \t")[0] for line in _lines(path) if line.strip()), "") == character


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow; install it with: pip install 'dlm[data]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    yield f"{path}, row {number}", record
                    number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); fetch it again") from error


def _hub_rows(name: str, split: str, streaming: bool) -> Iterator[tuple[str, dict]]:
    rows, number = iter(_hub(name, split, streaming)), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of `datasets`, of Arrow, of the network: each has classes of its own
            raise ValueError(
                f"{name}, row {number}: the data set cannot be read on ({shortened(cause_of(error))})"
            ) from error
        yield f"{name}, row {number}", row
        number += 1


def _hub(name: str, split: str, streaming: bool = False):
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name}: it needs the library datasets; install it with: pip install 'dlm[data]'") from error
    place, configuration = name.removeprefix(HUB), None
    if not Path(place).is_dir() and place.count("/") == 2:
        place, _, configuration = place.rpartition("/")
    try:
        return datasets.load_dataset(place, configuration, split=split, streaming=streaming)
    except Exception as error:  # of `datasets`, of Arrow, of the hub: each has classes of its own
        raise ValueError(f"{name}: the data set cannot be loaded ({shortened(cause_of(error))})") from error
