"""An animated SVG of the live view: a real run of `dlm generate`, recorded frame by frame as a terminal would show it.

    dlm bench picture "Once upon a time" --seed 3 --out docs/live.svg

The frames are those that the live view draws, one a pass; the SVG plays them as a film, in any browser and on GitHub.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside benchmarks/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.cli.parser import Parser, check_least, shown_defaults
from dlm.cli.scripts import guarded

CELL, LINE, MARGIN, BAR = 8.4, 19, 16, 34  # pixels: a column, a line, the frame's margin, its title bar
PAPER, INK, QUIET = "#14161a", "#e8e8e4", "#7d8590"
COLOURS = {160: "#ff5f56", 166: "#ff8a3d", 136: "#d9a520", 100: "#b5b83a", 64: "#7fc241", 28: "#3fb950"}
HOLD_SECONDS = 3.0  # the finished text, before the film begins again
SGR, CODE = re.compile(r"\x1b\[([\d;]*)m"), re.compile(r"38;5;\d+|[1-9]\d*")


class Screen(io.StringIO):
    """A stream that says it is a terminal, for the live view to draw on."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def spans(line: str) -> list[tuple[str, tuple[str, ...]]]:
    """A line with SGR codes as (text, codes) pairs."""
    parts, codes, at = [], (), 0
    for match in SGR.finditer(line):
        if match.start() > at:
            parts.append((line[at : match.start()], codes))
        codes, at = tuple(CODE.findall(match[1])), match.end()
    if at < len(line):
        parts.append((line[at:], codes))
    return parts


def draw_line(line: str) -> str:
    """One line of a frame as SVG, its baseline at y = 0: rectangles behind the newest tokens, then the text."""
    from rich.cells import cell_len

    behind, words, column = [], [], 0
    for text, codes in spans(line):
        x, width = round(column * CELL, 1), round(cell_len(text) * CELL, 1)
        colour = next((COLOURS[int(code[5:])] for code in codes if code.startswith("38;5;")), INK)
        fill = QUIET if "2" in codes else colour
        if "7" in codes:
            behind.append(f'<rect x="{x}" y="{5 - LINE}" width="{width}" height="{LINE}" fill="{fill}"/>')
            fill = PAPER
        weight = ' font-weight="bold"' if "1" in codes else ""
        if text.strip():
            words.append(f'<tspan x="{x}" fill="{fill}"{weight} textLength="{width}">{escape(text)}</tspan>')
        column += cell_len(text)
    return "".join(behind) + (f"<text>{''.join(words)}</text>" if words else "")


def svg(frames: Sequence[Sequence[str]], seconds: float, columns: int, title: str) -> str:
    """The film: the frames below each other, moved up by one height every `seconds` / frames; the last one is held.

    A reader who asks for less motion sees the last frame.
    """
    rows = max(map(len, frames))
    film = [*frames, *[frames[-1]] * max(1, round(HOLD_SECONDS * len(frames) / seconds))]
    width, height = columns * CELL + 2 * MARGIN, rows * LINE + MARGIN + BAR
    known: dict[str, int] = {}  # a line that several frames show is drawn once
    lines, reel = [], []
    for number, frame in enumerate(film):
        for row, line in enumerate(frame):
            if line not in known:
                known[line] = len(known)
                lines.append(f'<g id="l{known[line]}">{draw_line(line)}</g>')
            reel.append(f'<use href="#l{known[line]}" y="{(number * rows + row + 1) * LINE - 5}"/>')
    total, distance = seconds * len(film) / len(frames), len(film) * rows * LINE
    final = (len(film) - 1) * rows * LINE
    lights = "".join(
        f'<circle cx="{MARGIN + 4 + 18 * at}" cy="17" r="5.5" fill="{colour}"/>'
        for at, colour in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
    )
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">
<title>{escape(title)}</title>
<style>
text {{ font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre; }}
.film {{ animation: film {total:.2f}s steps({len(film)}) infinite; }}
@keyframes film {{ to {{ transform: translateY(-{distance}px); }} }}
@media (prefers-reduced-motion: reduce) {{ .film {{ animation: none; transform: translateY(-{final}px); }} }}
</style>
<defs>
{chr(10).join(lines)}
</defs>
<rect width="100%" height="100%" rx="9" fill="{PAPER}"/>{lights}
<text x="{width / 2:.0f}" y="21" text-anchor="middle" fill="{QUIET}">{escape(title)}</text>
<svg x="{MARGIN}" y="{BAR}" width="{columns * CELL:.1f}" height="{rows * LINE}"><g class="film">
{"".join(reel)}
</g></svg>
</svg>
"""


def record(args, columns: int) -> tuple[list[list[str]], float]:
    """(the frames of a run, one a pass, as lines with SGR codes; the seconds that the passes took)."""
    import time
    from dataclasses import replace

    import dlm
    from dlm.cli import live, session
    from dlm.sampling.prompts import prepare
    from dlm.tokenizer import encode_prompt

    opened = session.open_checkpoint(args)
    config = session.settings(args, opened.defaults)
    ids = encode_prompt(opened.tokenizer, args.prompt, opened.mask_id) + [opened.mask_id] * config.gen_length
    canvas = dlm.Canvas.from_templates([ids], opened.mask_id, device=opened.model.device)
    config = replace(config, seed=(config.seed,))
    passes, blocks = session.expected(opened, canvas, config)
    _, known = prepare(opened.model, canvas, config, opened.tokenizer)
    rows, frames, spent = session.row_text(opened, config), [], 0.0
    screen, live.size_of = Screen(), lambda stream: (columns, 40)
    view = live.LiveView(screen, rows, passes=passes, blocks=blocks, colour=True, clock=lambda: spent)
    view._draw = frames.append
    view.started, view.last_frame = 0.0, -1.0
    began = time.perf_counter()
    for state in dlm.denoise(opened.predictor, canvas, config, **known):
        spent += time.perf_counter() - began
        view.last_frame = -1.0  # every pass is a frame
        view.show(state)
        began = time.perf_counter()
    return frames, spent


def run(argv: Sequence[str]) -> int:
    """Record a run and write the SVG."""
    parser = Parser("bench picture", "[PROMPT] [options]", __doc__)
    parser.add_argument("prompt", nargs="?", default="Once upon a time", help="text to continue (Once upon a time)")
    parser.add_argument("--out", default="docs/live.svg", metavar="FILE", help="(default: docs/live.svg)")
    parser.add_argument("--columns", type=int, default=72, metavar="N", help="of the terminal shown (default: 72)")
    parser.add_argument("--seconds", type=float, metavar="X", help="that the film takes (default: as the run)")
    parser.add_model()
    parser.add_sampling(shown_defaults(argv))
    args = parser.parse(argv)
    check_least(args, 20, "columns")
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f"--seconds is {args.seconds}: give more than 0")
    frames, spent = record(args, args.columns)
    seconds, out = args.seconds or spent, Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(svg(frames, seconds, args.columns, f'dlm generate "{args.prompt}"'), encoding="utf-8")
    print(
        f"{len(frames)} passes in {spent:.2f} s, shown in {seconds:.1f} s: {out} ({out.stat().st_size / 1024:.0f} kB)"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is one line and exit code 2."""
    return guarded("dlm bench picture", run, argv)


if __name__ == "__main__":
    sys.exit(main())
