"""What `dlm generate` and `dlm infill` share: their options, and the loop over batches of texts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dlm.cli.parser import Parser, check_least, shown_defaults
from dlm.cli.session import Job, Result, batches, denoise, ends_of, summary

if TYPE_CHECKING:
    from dlm.checkpoints.pretrained import Pretrained

MOST_SAMPLES, MOST_DELAY = 1_000_000, 60


def add_common(parser: Parser, argv: Sequence[str], use: str, texts: Mapping[str, str] | None = None) -> None:
    """Options that generate and infill share. use: what of the checkpoint's defaults the help shows, as
    `shown_defaults`; texts: as `Parser.add_sampling`."""
    parser.add_argument(
        "--prompts", metavar="FILE", help='file of prompts: one a line, or JSONL with "prompt"; - is standard input'
    )
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts at a time (default: 8)")
    parser.add_model().add_argument(
        "--tensor-parallel", action="store_true", help="share layers out over torchrun's processes, a GPU each"
    )
    parser.add_sampling(shown_defaults(argv, use), texts=texts)
    parser.add_output().add_argument("--record", metavar="FILE", help="write every pass there, for dlm replay")
    parser.writes(record="recording")


def check_counts(args) -> None:
    """Errors: counts below one, a negative delay."""
    check_least(args, 1, *(name for name in ("num_samples", "batch_size", "blank_length") if name in args))
    if getattr(args, "num_samples", 1) > MOST_SAMPLES:
        raise ValueError(
            f"--num-samples is {args.num_samples}: give at most {MOST_SAMPLES:,}, and run it several times"
        )
    if not 0 <= args.delay <= MOST_DELAY:
        raise ValueError(f"--delay is {args.delay}: give 0 to {MOST_DELAY} seconds")


def check_texts(opened: Pretrained, texts: Sequence[str]) -> None:
    """Raises ValueError for a text that cannot fit the model, before it is cut into tokens: that takes long.

    A text has at least as many tokens as its UTF-8 bytes over the bytes of the vocabulary's longest token.
    """
    if opened.max_length is None:
        return
    longest = max((len(token.encode("utf-8")) for token in opened.codec.get_vocab()), default=1)
    most = 4 * longest * opened.max_length  # a normaliser may shorten a text, not to a quarter
    for text in texts:
        if len(text) > most:
            raise ValueError(
                f"the prompt {text[:24]!r}... has {len(text):,} characters, and this model reads {opened.max_length} "
                "tokens at most: shorten it"
            )


def run_jobs(opened: Pretrained, jobs: Iterable[Job], config, args, show: Callable[[Result], None]) -> int:
    """Denoise all jobs, batch by batch; `show` prints one result. Returns the exit code."""
    with contextlib.ExitStack() as stack:
        recorder = None
        if args.record:
            from dlm.sampling.trajectory import Recorder

            recorder = stack.enter_context(Recorder(args.record, opened.codec, ends_of(opened, config)))
        return _run(opened, jobs, config, args, show, recorder)


def _run(opened, jobs, config, args, show, recorder) -> int:
    for number, batch in enumerate(batches(jobs, args.batch_size)):
        asked = getattr(args, "chat", False)  # the words of a chat template are not for people
        results = denoise(opened, batch, config, args, show_given=not asked, recorder=recorder)
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
