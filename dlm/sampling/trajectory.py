"""Recordings of denoising: for each pass what was committed, where, how sure, and what else was likely.

Shapes: B rows, T slots.

A recording is a file of JSON lines. A header (`"format": "dlm-recording"`) opens every batch of rows: the mask id, the
settings, and each row's ids with which of them may be written. A line for each pass follows: the seconds since the run
began, and for every row that had one its block, its passes so far, and the slots that changed as [slot, id, confidence,
what else was likely]; an id that is the mask's means that the slot was masked again. `pieces` gives the text of every
id that is new to the file.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dlm.sampling.canvas import Canvas
from dlm.tokenizer import token_bytes
from dlm.utils.jsonio import parse_json, to_json

__all__ = ["FORMAT", "Change", "Pass", "Recorder", "Recording", "read_recordings"]

FORMAT, VERSION = "dlm-recording", 1
ESCAPE = "surrogateescape"  # bytes that are no UTF-8 by themselves: the parts of a character


class Recorder:
    """Writes recordings into a file, batch after batch; what was there stays until the first batch begins.

    Raises OSError then, where the file cannot be written.
    """

    def __init__(self, path, tokenizer=None, ends: Iterable[int] = ()):
        self.path, self.ends, self.known = Path(path), sorted(set(ends)), set()
        self.words = None if tokenizer is None else token_bytes(tokenizer)
        self.file = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()

    def follow(self, states: Iterable, canvas: Canvas, settings: dict) -> Iterator:
        """Yields the states and writes a line for each. settings: what the header says of the run."""
        before, rows = canvas.tokens, []
        for tokens, editable, valid in zip(canvas.tokens, canvas.editable, canvas.valid, strict=True):
            ids = tokens[valid].tolist()
            rows.append({"ids": ids, "given": [int(not ours) for ours in editable[valid].tolist()]})
        places = [valid.nonzero()[:, 0].tolist() for valid in canvas.valid]
        header = {"format": FORMAT, "version": VERSION, "mask_id": canvas.mask_id, "ends": self.ends}
        self._write(header | {"settings": settings, "rows": rows}, {i for row in rows for i in row["ids"]})
        spent, began = [0] * len(rows), time.perf_counter()
        for state in states:
            seconds = round(time.perf_counter() - began, 4)
            changed = state.canvas.tokens != before
            likely = state.likely or {}
            line, ids, nfe, blocks = [], set(), state.nfe.tolist(), state.block.tolist()
            for row, index in enumerate(places):
                if nfe[row] == spent[row]:
                    continue
                changes = []
                for place, slot in enumerate(index):
                    if bool(changed[row, slot] | state.committed[row, slot]):
                        token = int(state.canvas.tokens[row, slot])
                        others = likely.get((row, slot), [])
                        ids |= {token, *(other for other, _ in others)}
                        changes.append([place, token, round(float(state.confidence[row, slot]), 5), others])
                line.append({"row": row, "block": blocks[row], "nfe": nfe[row], "changes": changes})
            self._write({"pass": state.step, "seconds": seconds, "rows": line}, ids)
            before, spent = state.canvas.tokens, nfe
            yield state

    def _write(self, line: dict, ids: set[int]) -> None:
        new = sorted(ids - self.known)
        self.known |= ids
        if self.words is not None:
            sized = [i for i in new if i < len(self.words)]
            line["pieces"] = {str(i): self.words[i].decode("utf-8", ESCAPE) for i in sized}
        if self.file is None:
            self.file = self.path.open("w", encoding="utf-8")
        self.file.write(to_json(line) + "\n")
        self.file.flush()  # what an interrupted run has written can be read


@dataclass(frozen=True)
class Change:
    """slot: the place in its row; token: what it holds now; confidence; likely: other ids with their probability."""

    slot: int
    token: int
    confidence: float
    likely: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Pass:
    """One turn of the loop: for each row that had a pass its block, its passes so far, and its changes.

    seconds: from the beginning of the run to the end of the pass; None where the recording does not say.
    """

    number: int
    rows: dict[int, tuple[int, int, tuple[Change, ...]]]
    seconds: float | None = None


@dataclass
class Recording:
    """A batch of rows and its passes. ids, given: each row's ids at the start, and which are not written. pieces: the
    bytes of each id."""

    mask_id: int
    ends: frozenset[int]
    settings: dict
    ids: list[list[int]]
    given: list[list[bool]]
    passes: list[Pass] = field(default_factory=list)
    pieces: dict[int, bytes] = field(default_factory=dict)

    def text(self, ids: Iterable[int]) -> str:
        """The text of ids; ids without a piece are their numbers."""
        return b"".join(self.pieces.get(i, f"[{i}]".encode()) for i in ids).decode("utf-8", "replace")


def read_recordings(path) -> list[Recording]:
    """The recordings of a file, in order.

    Raises ValueError with the line for a file that is none or is damaged, OSError where it cannot be read.
    """
    found: list[Recording] = []
    pieces: dict[int, bytes] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no recording: it is not text; make one with --record") from None
    for number, text in enumerate(lines, 1):
        try:
            line = parse_json(text, f"{path}:{number}")
        except ValueError as error:
            if number == 1:
                raise ValueError(f"{path} is no recording of dlm's: make one with --record") from None
            raise ValueError(f"{error}: the recording is damaged here") from None
        try:
            if number == 1 and (not isinstance(line, dict) or line.get("format") != FORMAT):
                raise ValueError(f"{path} is no recording of dlm's: make one with --record")
            pieces |= {int(i): piece.encode("utf-8", ESCAPE) for i, piece in line.get("pieces", {}).items()}
            if "format" in line:
                if line["version"] != VERSION:
                    raise ValueError(f"{path}:{number}: a recording of version {line['version']}; dlm reads {VERSION}")
                ids = [[int(i) for i in row["ids"]] for row in line["rows"]]
                given = [[bool(g) for g in row["given"]] for row in line["rows"]]
                if [*map(len, ids)] != [*map(len, given)]:
                    raise KeyError("given")
                mask_id, ends = int(line["mask_id"]), frozenset(line["ends"])
                found.append(Recording(mask_id, ends, dict(line["settings"]), ids, given, [], pieces))
            else:
                found[-1].passes.append(_pass(line, found[-1]))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            if number == 1:
                raise ValueError(f"{path} is no recording of dlm's: make one with --record") from None
            raise ValueError(f"{path}:{number}: the recording is damaged here ({type(error).__name__})") from None
    if not found:
        raise ValueError(f"{path} is empty: make a recording with --record")
    return found


def _pass(line: dict, recording: Recording) -> Pass:
    rows = {}
    for row in line["rows"]:
        changes = []
        for slot, token, confidence, likely in row["changes"]:
            if not 0 <= slot < len(recording.ids[row["row"]]):
                raise IndexError(slot)
            others = tuple((int(i), float(p)) for i, p in likely)
            changes.append(Change(int(slot), int(token), float(confidence), others))
        rows[int(row["row"])] = (int(row["block"]), int(row["nfe"]), tuple(changes))
    seconds = line.get("seconds")
    return Pass(int(line["pass"]), rows, None if seconds is None else float(seconds))
