"""The commands that run a model: generate, infill and chat; each parses its options, denoises and prints."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence

from dlm.chat_template import chat_ids
from dlm.checkpoints.pretrained import Opened
from dlm.cli import live
from dlm.cli.parser import Parser, check_least, shown_defaults
from dlm.cli.prompts import gather_prompts
from dlm.cli.session import (
    Job,
    Result,
    announce,
    batches,
    denoise,
    print_json,
    print_text,
    row_text,
    settings,
    summary,
    text_of,
    text_pieces,
)
from dlm.tokenizer import template


def add_common(parser: Parser, argv: Sequence[str], leave_out: Sequence[str] = ()) -> None:
    """Options that generate and infill share."""
    parser.add_argument("--prompts", metavar="FILE", help='one a line, or JSONL with "prompt"; - is standard input')
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts at a time (default: 8)")
    parser.add_model().add_argument(
        "--tensor-parallel", action="store_true", help="share layers out over torchrun's processes, a GPU each"
    )
    parser.add_sampling(shown_defaults(argv), leave_out)
    parser.add_output()


def check_counts(args) -> None:
    """Errors: counts below one, a negative delay."""
    check_least(args, 1, *(name for name in ("num_samples", "batch_size", "blank_length") if name in args))
    if not args.delay >= 0:
        raise ValueError(f"--delay is {args.delay}: give 0 or more seconds")


def run_jobs(opened: Opened, jobs: Sequence[Job], config, args, show: Callable[[Result], None]) -> int:
    """Denoise all jobs, batch by batch; `show` prints one result. Returns the exit code."""
    for number, batch in enumerate(batches(jobs, args.batch_size)):
        results = denoise(opened, batch, config, args)
        for index, result in enumerate(results):
            if not args.json and (number or index):
                print()
            show(result)
        sys.stdout.flush()
        if not args.json:
            summary(results)
        if not all(result.finished for result in results):
            return 130
    return 0


def generate(argv: Sequence[str]) -> int:
    """`dlm generate`: continue texts."""
    parser = Parser("generate", "[PROMPT ...] [options]", "Continue each prompt with text that denoises.")
    parser.add_argument("prompt", nargs="*", help="text to continue")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    add_common(parser, argv)
    args = parser.parse(argv)
    check_counts(args)
    prompts = gather_prompts(args, 'dlm generate "Once upon a time"')
    opened = announce(args)
    config = settings(args, opened.defaults)
    from dlm.tokenizer import encode_prompt

    if args.chat:
        check_chat(opened)
    region = [opened.mask] * config.gen_length
    ids = [
        chat_ids(opened.tokenizer, [{"role": "user", "content": prompt}], opened.mask)
        if args.chat
        else encode_prompt(opened.tokenizer, prompt, opened.mask)
        for prompt in prompts
    ]
    pairs = [(prompt, head) for prompt, head in zip(prompts, ids, strict=True) for _ in range(args.num_samples)]
    jobs = [Job(head + region, prompt, config.seed + index) for index, (prompt, head) in enumerate(pairs)]

    def show(result: Result) -> None:
        pieces = text_pieces(opened, result, config, head="" if args.json or args.chat else result.job.prompt)
        if args.json:
            print_json(result.record(text_of(pieces)))
        else:
            print_text(pieces)

    return run_jobs(opened, jobs, config, args, show)


def infill(argv: Sequence[str]) -> int:
    """`dlm infill`: fill blanks."""
    parser = Parser(
        "infill",
        "[TEXT ...] [options]",
        "Fill the blanks of each text: ___ is a blank, ___{12} one of twelve tokens.",
    )
    parser.add_argument("prompt", nargs="*", metavar="TEXT", help="text with blanks")
    parser.add_argument("--blank-length", type=int, default=4, metavar="N", help="tokens in a blank (default: 4)")
    add_common(parser, argv, leave_out=("gen_length",))
    args = parser.parse(argv)
    check_counts(args)
    texts = gather_prompts(args, 'dlm infill "The cat ___ on the mat."')
    opened = announce(args, check=False)
    rows = [template(opened.tokenizer, text, args.blank_length, opened.mask) for text in texts]
    places = max(row.count(opened.mask) for row in rows)
    # A blank is in the middle of a text, so the text may not end in it.
    config = settings(args, opened.defaults, gen_length=places, suppress_eos=opened.has_end)
    pairs = [(text, row) for text, row in zip(texts, rows, strict=True) for _ in range(args.num_samples)]
    jobs = [Job(row, text, config.seed + index) for index, (text, row) in enumerate(pairs)]

    def show(result: Result) -> None:
        pieces = filled_pieces(opened, result, config)
        if args.json:
            fills = [piece.text for piece in pieces if piece.styles]
            print_json(result.record(text_of(pieces)) | {"fills": fills})
        else:
            print_text(pieces)

    return run_jobs(opened, jobs, config, args, show)


def filled_pieces(opened: Opened, result: Result, config) -> list[live.Piece]:
    """The whole text, one piece a blank in the style FILLED; what is still masked as its glyph."""
    rows = row_text(opened, config)
    found, at = [], 0
    while at < len(result.row):
        ours, stop = result.editable[at], at + 1
        while stop < len(result.row) and result.editable[stop] == ours:
            stop += 1
        part = rows.plain(result.row[at:stop], result.editable[at:stop], result.masked[at:stop])
        found.append(live.Piece(text_of(part), (live.FILLED,) if ours else ()))
        at = stop
    return found


def chat(argv: Sequence[str]) -> int:
    """`dlm chat`: talk, turn by turn."""
    parser = Parser("chat", "[options]", "Talk with an instruct checkpoint: /reset begins anew, /quit or Ctrl-D ends.")
    parser.add_model()
    parser.add_sampling(shown_defaults(argv))
    parser.add_output()
    args = parser.parse(argv)
    check_counts(args)
    opened = announce(args)
    check_chat(opened)
    config = settings(args, opened.defaults, stop_at_eos=opened.has_end)
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (history and editing for input())
        print(live.paint("/reset begins anew, /quit ends", live.QUIET), file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return 0
        if line == "/quit":
            return 0
        if line == "/reset":
            messages = []
        elif line.startswith("/"):
            print("dlm: the commands are /reset and /quit", file=sys.stderr)
        elif line:
            turn = [*messages, {"role": "user", "content": line}]
            try:
                reply = answer(opened, turn, config, args)
            except ValueError as error:
                if not typed:
                    raise
                print(f"dlm: error: {error}", file=sys.stderr)
                continue
            if reply is not None:
                messages = [*turn, {"role": "assistant", "content": reply}]
            elif not typed:
                return 130


def answer(opened: Opened, messages: Sequence[dict[str, str]], config, args) -> str | None:
    """Write and print the answer to a conversation; None where it was interrupted."""
    ids = chat_ids(opened.tokenizer, messages, opened.mask) + [opened.mask] * config.gen_length
    [result] = denoise(opened, [Job(ids, messages[-1]["content"], config.seed)], config, args, show_given=False)
    pieces = text_pieces(opened, result, config, head="")
    if args.json:
        print_json(result.record(text_of(pieces)))
    else:
        print_text(pieces)
        summary([result])
    return text_of(pieces) if result.finished else None


def check_chat(opened: Opened) -> None:
    """Errors: a checkpoint that was not trained to answer."""
    if opened.defaults.get("chat") is False:
        raise ValueError(
            f"{opened.name} continues texts and was not trained to answer: use dlm generate, or name an "
            "instruct checkpoint with --model"
        )
    if not getattr(opened.tokenizer, "chat_template", None):
        raise ValueError(f"{opened.name} has no chat template, so it is no instruct checkpoint: use dlm generate")
