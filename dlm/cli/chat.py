"""`dlm chat`: talk with an instruct checkpoint, turn by turn."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlm.cli.batch import check_counts, check_texts
from dlm.cli.lines import QUIET, paint
from dlm.cli.parser import Parser, check_least, shown_defaults
from dlm.cli.session import (
    Job,
    announce,
    check_region,
    denoise,
    print_json,
    print_text,
    settings,
    summary,
    text_of,
    text_pieces,
)
from dlm.utils.errors import one_line

if TYPE_CHECKING:
    from dlm.checkpoints.pretrained import Pretrained


def chat(argv: Sequence[str]) -> int:
    """`dlm chat`: talk, turn by turn."""
    parser = Parser("chat", "[options]", "Talk with an instruct checkpoint: /reset starts over, /quit or Ctrl-D ends.")
    parser.add_model()
    parser.add_argument(
        "--turns",
        type=int,
        metavar="N",
        help="the last N requests are read, with their answers (default: the checkpoint's, or all that fit)",
    )
    parser.add_sampling(shown_defaults(argv, "answers"))
    parser.add_output()
    args = parser.parse(argv)
    check_counts(args)
    check_least(args, 1, "turns")
    opened = announce(args)
    check_chat(opened)
    turns = args.turns or opened.chat_turns
    config = settings(args, opened.chat_defaults, stop_at_eos=opened.has_end)
    check_region(opened, config.gen_length, "--gen-length")
    if sys.stdin is None:
        raise ValueError("standard input is closed: type your lines, or pipe them in")
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (history and editing for input())
        forgets = "" if turns is None else f"; this model reads {'one request' if turns == 1 else f'{turns} requests'}"
        print(paint(f"/reset starts over, /quit ends{forgets}", QUIET), file=sys.stderr)
    from dlm.chat_template import last_turns

    messages: list[dict[str, str]] = []
    while True:
        try:
            line = read_line(typed)
        except EOFError:
            return 0
        except ValueError as error:
            if not typed:
                raise
            print(f"dlm: error: {one_line(error)}", file=sys.stderr)
            continue
        if line == "/quit":
            return 0
        if line == "/reset":
            messages = []
        elif line.startswith("/"):
            print("dlm: the commands are /reset and /quit", file=sys.stderr)
        elif line:
            try:
                asked = last_turns([*messages, {"role": "user", "content": line}], turns)
                turn, ids = fitting(opened, asked, config)
                reply = answer(opened, line, ids, config, args)
            except ValueError as error:
                if not typed:
                    raise
                print(f"dlm: error: {one_line(error)}", file=sys.stderr)
                continue
            if reply is not None:
                messages = [*turn, {"role": "assistant", "content": reply}]
            elif not typed:
                return 130


def read_line(typed: bool) -> str:
    """The next line of standard input, stripped. Raises EOFError at its end, ValueError where it is not UTF-8 text."""
    try:
        line = input("> " if typed else "").strip()
        line.encode("utf-8")
    except UnicodeError:
        raise ValueError("standard input has a line that is not UTF-8 text: convert it to UTF-8") from None
    return line


def fitting(opened: Pretrained, messages: list[dict[str, str]], config) -> tuple[list[dict[str, str]], list[int]]:
    """A conversation and its ids, without its oldest turns where it and an answer are above the longest canvas."""
    from dlm.chat_template import chat_ids

    check_texts(opened, [messages[-1]["content"]])
    limit, kept = opened.max_length, messages
    ids = chat_ids(opened.tokenizer, kept, opened.mask_id)
    while limit and len(ids) + config.gen_length > limit and len(kept) > 1:
        kept = kept[2:]  # a question and its answer
        ids = chat_ids(opened.tokenizer, kept, opened.mask_id)
    if len(kept) < len(messages):
        print(f"dlm: the model reads {limit} tokens at most: it no longer sees the oldest turns", file=sys.stderr)
    return kept, ids


def answer(opened: Pretrained, question: str, ids: Sequence[int], config, args) -> str | None:
    """Write and print the answer to a conversation; None where it was interrupted."""
    ids = [*ids, *[opened.mask_id] * config.start_length]
    [result] = denoise(opened, [Job(ids, question, config.seed)], config, args, show_given=False)
    pieces = text_pieces(opened, result, config, head="")
    if args.json:
        print_json(result.record(text_of(pieces)))
    else:
        print_text(pieces)
        summary([result])
    return text_of(pieces) if result.finished else None


def check_chat(opened: Pretrained) -> None:
    """Errors: a checkpoint that was not trained to answer."""
    if opened.defaults.get("chat") is False:
        raise ValueError(
            f"{opened.name} continues texts and was not trained to answer: use dlm generate, or name an "
            "instruct checkpoint with --model"
        )
    if not getattr(opened.tokenizer, "chat_template", None):
        raise ValueError(f"{opened.name} has no chat template, so it is no instruct checkpoint: use dlm generate")
