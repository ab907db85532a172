"""`dlm replay`: a recorded run in the terminal again, pass by pass, as a page for a browser, or as a film."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from dlm.cli.live import is_live
from dlm.cli.parser import Parser, check_least
from dlm.utils.jsonio import to_json
from dlm.utils.printable import safe

if TYPE_CHECKING:
    from dlm.sampling.trajectory import Recording

COLUMNS = 72  # of a film's terminal
SLOWEST, FASTEST = 0.001, 1000  # passes a second


def replay(argv: Sequence[str]) -> int:
    """`dlm replay`: show a recording."""
    parser = Parser("replay", "FILE [options]", "Show a run that --record wrote, pass by pass.")
    parser.add_argument("file", metavar="FILE", help="what dlm generate --record FILE wrote")
    parser.add_argument("--speed", type=float, metavar="X", help="passes a second (default: 10; --svg: as it ran)")
    parser.add_argument("--step", action="store_true", help="wait for Enter before each pass")
    parser.add_argument("--html", metavar="OUT", help="write a page in place of showing it")
    parser.add_argument("--svg", metavar="OUT", help="write a film of the first batch, an animated picture")
    parser.add_argument("--columns", type=int, metavar="N", help="of the film's terminal (default: 72)")
    parser.writes(html="html", svg="svg")
    args = parser.parse(argv)
    check(args)
    from dlm.sampling.trajectory import read_recordings

    recordings = read_recordings(args.file)
    if args.html:
        write(args.html, page(recordings))
    if args.svg:
        from dlm.cli.film import film

        if not recordings[0].passes:
            raise ValueError(f"{args.file} holds no pass: there is no film to draw")
        write(args.svg, film(recordings[0], args.columns or COLUMNS, args.speed))
    if args.html or args.svg:
        return 0
    for recording in recordings:
        show(recording, args.speed or 10.0, args.step)
    return 0


def check(args) -> None:
    """Raises ValueError for numbers that are too small, and for options that have no effect."""
    check_least(args, 20, "columns")
    if args.speed is not None and not SLOWEST <= args.speed <= FASTEST:
        raise ValueError(f"--speed is {args.speed}: give passes a second, from {SLOWEST} to {FASTEST:,}")
    if args.columns is not None and not args.svg:
        raise ValueError("--columns is the width of a film, and there is no --svg: leave it out, or add --svg OUT")
    if args.step and (args.html or args.svg):
        raise ValueError("--step waits in the terminal, and --html and --svg write files: leave one of them out")
    if args.step and not is_live(sys.stdout):
        raise ValueError("--step waits in a terminal, and standard output is none: leave it out")
    if args.speed is not None and args.html and not args.svg:
        raise ValueError("--speed has no effect on the page of --html, which has a slider: leave it out")


def write(name: str, text: str) -> None:
    """Writes the file and says so."""
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    print(f"wrote {name}", file=sys.stderr)


def show(recording: Recording, speed: float, step: bool) -> None:
    """Plays a recording in the terminal and leaves its last state; elsewhere prints that alone."""
    from dlm.cli import live
    from dlm.cli.lines import Glyphs, RowText

    rows = RowText(
        recording.text,
        recording.ends,
        glyphs=Glyphs.of(sys.stdout),
        kind=recording.settings.get("confidence", "probability"),
    )
    state = None
    if live.is_live(sys.stdout):
        quiet = without_echo() if step else contextlib.nullcontext()
        with quiet, live.LiveView(sys.stdout, rows, passes=len(recording.passes)) as view:
            for state in states(recording):
                view.last_frame = float("-inf")  # every pass is shown
                view.show(state)
                step = step and waited_for_enter()
                if not step:
                    time.sleep(1 / speed)
    else:
        *_, state = [None, *states(recording)]
    mask = Glyphs.of(sys.stdout).mask
    for row, ids in enumerate(recording.ids):
        last = ids if state is None else state.canvas.tokens[row, : len(ids)].tolist()
        written = (i for i, token in enumerate(last) if token in recording.ends and not recording.given[row][i])
        parts, at = [], 0
        last = last[: next(written, None)]
        while at < len(last):  # runs of tokens and of masks
            stop = at + 1
            while stop < len(last) and (last[stop] == recording.mask_id) == (last[at] == recording.mask_id):
                stop += 1
            masked = last[at] == recording.mask_id
            parts.append(mask * (stop - at) if masked else recording.text(last[at:stop]))
            at = stop
        print(safe("".join(parts)))


def waited_for_enter() -> bool:
    """Waits for Enter; False at the end of standard input, where nobody can press it."""
    try:
        input()
    except (EOFError, RuntimeError):  # RuntimeError: standard input is closed
        return False
    return True


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Typed keys are not shown: Enter would move the cursor out of what the live view drew."""
    if sys.stdin is None or not sys.stdin.isatty() or importlib.util.find_spec("termios") is None:
        yield  # a pipe, a closed stream, Windows
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO  # the local modes
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def states(recording: Recording) -> Iterator:
    """The recording as the states that denoising gave."""
    import torch

    from dlm.sampling.canvas import Canvas
    from dlm.sampling.denoise import DenoiseState

    count, width = len(recording.ids), max(map(len, recording.ids))
    tokens, editable = torch.zeros(count, width, dtype=torch.int64), torch.zeros(count, width, dtype=torch.bool)
    valid, nfe, block = editable.clone(), torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    for row, (ids, given) in enumerate(zip(recording.ids, recording.given, strict=True)):
        tokens[row, : len(ids)], valid[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64), True
        editable[row, : len(ids)] = ~torch.tensor(given)
    for turn in recording.passes:
        tokens, nfe, block = tokens.clone(), nfe.clone(), block.clone()
        committed, sure = torch.zeros_like(valid), torch.zeros(count, width)
        for row, (at, spent, changes) in turn.rows.items():
            nfe[row], block[row] = spent, at
            for change in changes:
                tokens[row, change.slot] = change.token
                if change.token != recording.mask_id:
                    committed[row, change.slot], sure[row, change.slot] = True, change.confidence
        canvas = Canvas(tokens, editable, valid, recording.mask_id)
        yield DenoiseState(canvas, committed, sure, torch.zeros_like(valid), block, turn.number, nfe, nfe)


def page(recordings: Sequence[Recording]) -> str:
    """One self-contained page with every pass of the recordings."""
    data = []
    for recording in recordings:
        passes = [
            [
                [row, [[c.slot, c.token, c.confidence, c.likely] for c in changes]]
                for row, (_, _, changes) in turn.rows.items()
            ]
            for turn in recording.passes
        ]
        data.append(
            {
                "mask": recording.mask_id,
                "ends": sorted(recording.ends),
                "settings": recording.settings,
                "rows": [
                    {"ids": ids, "given": [int(g) for g in given]}
                    for ids, given in zip(recording.ids, recording.given, strict=True)
                ],
                "passes": passes,
            }
        )
    pieces = {str(i): base64.b64encode(piece).decode() for i, piece in recordings[-1].pieces.items()}
    text = to_json({"recordings": data, "pieces": pieces}).replace("<", "\\u003c")
    scale = files("dlm.serving").joinpath("page/scale.js").read_text(encoding="utf-8")  # the server's page has it too
    whole = files("dlm.cli").joinpath("replay.html").read_text(encoding="utf-8")
    return whole.replace("/*SCALE*/", scale).replace("/*DATA*/null", text)
