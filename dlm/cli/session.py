"""A checkpoint that is open on the command line: denoise jobs with it, watch them, print what came out.

Shapes: B batch, T canvas.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from dlm.checkpoints.files import sampling_with
from dlm.cli import live
from dlm.cli.lines import PROMPT, QUIET, Glyphs, Piece, RowText, fit, paint
from dlm.sampling.options import NEEDS, SAMPLING
from dlm.utils.jsonio import to_json
from dlm.utils.printable import safe
from dlm.utils.settings import flag, refuse_idle

if TYPE_CHECKING:
    from dlm.checkpoints.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class Job:
    """One text to write: its canvas as ids (the mask id where to write), what the user gave, its seed."""

    ids: list[int]
    prompt: str
    seed: int
    blanks: tuple[tuple[int, int, str | None], ...] = ()  # of a template: start, length and pattern of each


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out for one job; `row` is the valid part of its canvas, `editable` where it was written."""

    job: Job
    row: list[int]
    editable: list[bool]
    masked: list[bool]
    written: int
    nfe: int
    seconds: float
    positions_computed: int = 0

    @property
    def ids(self) -> list[int]:
        """The ids at the editable slots, in order; an interrupted run holds mask ids."""
        return [token for token, ours in zip(self.row, self.editable, strict=True) if ours]

    @property
    def finished(self) -> bool:
        return not any(self.masked)

    def record(self, text: str) -> dict[str, Any]:
        """The JSON object of this result."""
        return {
            "prompt": self.job.prompt,
            "text": text,
            "token_ids": self.ids,
            "nfe": self.nfe,
            "tokens_per_forward": round(self.written / max(self.nfe, 1), 4),
            "positions_computed": self.positions_computed,
            "latency_s": round(self.seconds, 4),
            "seed": self.job.seed,
            "finished": self.finished,
        }


# ---------------------------------------------------------------- opening a checkpoint


PATTERNS = ("regex", "json_schema", "choices")  # options whose values can be checked without a model


def open_checkpoint(args, check: bool = True, model: bool = False) -> Pretrained:
    """Load the checkpoint that the options name, onto the device that they name.

    check: whether to make the settings first, so that a wrong option does not wait for the weights. model: whether
    more than the predictor is wanted.
    Errors: as `dlm.load`; a pattern that cannot be used, before anything is loaded; a device that cannot be used; a
    checkpoint without a tokenizer.
    """
    settings(argparse.Namespace(**{name: getattr(args, name, None) for name in PATTERNS}), {})
    gc.disable()  # the imports make a million objects and no garbage: a quarter less time
    try:
        from dlm.checkpoints.pretrained import load_pretrained
        from dlm.kernels.threads import settle_threads

        named = ("dtype", "device", "attn_implementation", "cuda_graphs", "compile")
        options = {name: getattr(args, name) for name in named}
        if getattr(args, "tensor_parallel", False):
            options["tensor_parallel"] = True
            if int(os.environ.get("RANK", 0)):  # the first process speaks for all
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        opened = load_pretrained(args.model, revision=args.revision, progress=_say, **options)
        if check:
            settings(args, opened.defaults)
        opened.ready(model)
        if not model:
            settle_threads(opened.predictor)
        return opened
    finally:
        gc.freeze()  # what lives now stays: the next collection would look through all of it
        gc.enable()


def _say(word: str) -> None:
    live.note(sys.stderr, f"{word} ...")


def settings(args, defaults: dict[str, Any], **fixed):
    """SamplingConfig from its own defaults, then the checkpoint's, then `fixed`, then the options given."""
    given = {field: value for field in SAMPLING if (value := getattr(args, field, None)) is not None}
    try:
        config = sampling_with(defaults, fixed | given)
    except ValueError as error:
        raise ValueError(as_options(str(error))) from error
    swept = getattr(args, "swept", ())  # fields that a grid varies: what depends on them is in force somewhere
    needs = {field: need for field, need in NEEDS.items() if need[0] not in swept}
    refuse_idle([field for field, value in given.items() if value is not False], config, needs)
    return config


def as_options(message: str) -> str:
    """A message about fields of SamplingConfig in the words of the command line: `--gen-length is 0 ...`."""
    names = "|".join(SAMPLING)
    message = re.sub(rf"^({names})(?= is )", lambda found: flag(found[0]), message)
    inside = "|".join(name for name in SAMPLING if "_" in name and name != "entropy_bound")  # a commit rule too
    return re.sub(rf"(?<!-)\b({inside})\b", lambda found: flag(found[0]), message)


# ---------------------------------------------------------------- denoising and printing


RECORDED = 5  # how many of the most probable tokens a recording names at each slot


def denoise(
    opened: Pretrained, jobs: Sequence[Job], config, args, show_given: bool = True, recorder=None
) -> list[Result]:
    """Denoise the jobs as one batch; where the output is a terminal it shows them meanwhile.

    Ctrl-C ends it early: the results are then not finished.
    """
    from dlm.sampling import denoise as loop
    from dlm.sampling.canvas import Canvas
    from dlm.sampling.constraints import constraints_of_blanks
    from dlm.sampling.prompts import prepare

    canvas = Canvas.from_templates([job.ids for job in jobs], opened.mask_id, device=opened.device)
    config = dataclasses.replace(config, seed=tuple(job.seed for job in jobs))
    _, known = prepare(opened.predictor, canvas, config, opened.codec)
    if config.moves and recorder is not None:
        raise ValueError(f"a recording has fixed slots, and grow {config.grow!r} moves them: leave --record out")
    if any(pattern for job in jobs for *_, pattern in job.blanks):
        if known["constraints"] is not None:
            raise ValueError("a blank has a pattern of its own: leave --regex, --json-schema and --choices out")
        eos = config.eos_ids or known["eos_token_ids"]
        known["constraints"] = [constraints_of_blanks(opened.codec, job.blanks, eos) for job in jobs]
    shown = not args.json and not args.no_live and live.is_live(sys.stdout)
    view: Any = contextlib.nullcontext()
    if shown:
        passes, blocks = expected(opened, canvas, config)
        rows = row_text(opened, config, show_given)
        view = live.LiveView(sys.stdout, rows, passes=passes, blocks=blocks, delay=args.delay)
    state, written, start = None, [0] * len(jobs), time.perf_counter()
    with view:
        try:
            states = loop.denoise(opened.predictor, canvas, config, **known, likely=RECORDED if recorder else 0)
            if recorder is not None:
                states = recorder.follow(states, canvas, recorded_settings(opened, config))
            for state in states:
                written = [a + b for a, b in zip(written, state.committed.sum(1).tolist(), strict=True)]
                if shown:
                    view.show(state)
        except KeyboardInterrupt:
            pass  # what there is so far is the result
        except ValueError as error:
            raise ValueError(as_options(str(error))) from error
        seconds = time.perf_counter() - start - (view.waited if shown else 0.0)
    final = state.canvas if state else canvas
    masked, results = final.masked, []
    for row, job in enumerate(jobs):
        valid = final.valid[row]
        ids, ours, hidden = (part[row][valid].tolist() for part in (final.tokens, final.editable, masked))
        nfe = int(state.nfe[row]) if state else 0
        computed = int(state.positions_computed[row]) if state else 0
        results.append(Result(job, ids, ours, hidden, written[row], nfe, seconds, computed))
    return results


def expected(opened: Pretrained, canvas, config) -> tuple[int | None, int]:
    """How many passes (None: the commit rule decides) and blocks the longest row of a canvas takes."""
    from dlm.sampling.methods import visibility
    from dlm.sampling.schedule import lay_out

    places = int(canvas.masked.sum(1).max())
    _, sizes = lay_out(canvas, *visibility(opened.predictor, config.method, config.block_length))
    blocks = max(map(len, sizes))
    return ((config.steps or places) if config.commit == "quota" and config.grow == "none" else None), blocks


def ends_of(opened: Pretrained, config) -> frozenset[int]:
    """The ids that end a text."""
    ends = {opened.codec.eos_token_id, *config.eos_ids, *opened.end_ids}
    return frozenset(ends - {None})


def recorded_settings(opened: Pretrained, config) -> dict[str, Any]:
    """What a recording says of its run: the checkpoint's name and the settings that are not the defaults."""
    own = type(config)()
    changed = {field: getattr(config, field) for field in SAMPLING if getattr(config, field) != getattr(own, field)}
    return {"model": opened.name, "confidence": config.ordering} | changed


def row_text(opened: Pretrained, config, show_given: bool = True) -> RowText:
    """How the rows of a canvas are shown on standard output."""
    return RowText(
        opened.text,
        ends_of(opened, config),
        glyphs=Glyphs.of(sys.stdout),
        kind=config.ordering,
        show_given=show_given,
    )


def text_pieces(opened: Pretrained, result: Result, config, head: str) -> list[Piece]:
    """`head` in bold and what was written, up to its end-of-text; where it was interrupted, with its masks."""
    from dlm.tokenizer import decode

    pieces = [Piece(head, (PROMPT,))] if head else []
    if not result.finished:
        return pieces + row_text(opened, config, show_given=False).plain(result.row, result.editable, result.masked)
    ids = result.ids
    for end in config.eos_ids:
        ids = ids[: ids.index(end)] if end in ids else ids
    return [*pieces, Piece(decode(opened.codec, ids))]


def text_of(pieces: Sequence[Piece]) -> str:
    """The pieces' text."""
    return "".join(piece.text for piece in pieces)


def print_text(pieces: Sequence[Piece]) -> None:
    """Prints a text: on a terminal in its styles, elsewhere as it is. The terminal wraps it, so a copy of it has no
    line breaks of ours."""
    stream = sys.stdout
    if not live.is_live(stream):
        print(live.printable(text_of(pieces), stream))
        return
    colour = live.wants_colour(stream)
    print("".join(paint(safe(piece.text), *piece.styles, colour=colour) for piece in pieces))


def print_json(record: dict[str, Any]) -> None:
    """Prints one object on one line, at once; what the stream's encoding lacks is escaped, and NaN becomes null."""
    text = to_json(record, ascii_only=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = to_json(record)
    print(text, flush=True)


def summary(results: Sequence[Result]) -> None:
    """Prints one quiet line on standard error where that is a terminal; an interruption is always said."""
    tokens = sum(result.written for result in results)
    passes, seconds = max(result.nfe for result in results), results[0].seconds
    if not all(result.finished for result in results):
        print(f"dlm: interrupted after {passes} passes, {tokens} tokens", file=sys.stderr)
    elif live.is_live(sys.stderr):
        columns, _ = live.size_of(sys.stderr)
        parts = [
            (0, f"{tokens} tokens"),
            (1, f"{passes} passes"),
            (4, f"{tokens / max(passes * len(results), 1):.1f} tok/pass"),
            (3, f"{seconds:.1f} s"),
            (2, f"{tokens / max(seconds, 1e-9):.0f} tok/s"),
            (5, f"seed {results[0].job.seed}"),
        ]
        print(paint(fit(parts, columns - 1, Glyphs.of(sys.stderr).dot), QUIET), file=sys.stderr)


def check_region(opened: Pretrained, length: int, option: str) -> None:
    """Raises ValueError for more tokens than the model's longest canvas, before memory is taken for them."""
    limit = opened.max_length
    if limit is not None and length > limit:
        raise ValueError(f"{option} is {length}: this model reads {limit} tokens at most, prompt included")


def batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """The jobs in groups of `size`, made as they are needed."""
    jobs = iter(jobs)
    while batch := list(islice(jobs, size)):
        yield batch


def announce(args, check: bool = True) -> Pretrained:
    """`open_checkpoint`, and say so meanwhile on a terminal."""
    if not args.json:
        live.note(sys.stderr, f"loading {args.model or 'the shipped model'} ...")
    try:
        return open_checkpoint(args, check)
    finally:
        live.note(sys.stderr, "")
