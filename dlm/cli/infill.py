"""`dlm infill`: fill the blanks of texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlm.cli import live
from dlm.cli.batch import add_common, check_counts, check_texts, run_jobs
from dlm.cli.lines import FILLED, Piece
from dlm.cli.parser import Parser
from dlm.cli.prompts import gather_prompts
from dlm.cli.session import Job, Result, announce, check_region, print_json, print_text, row_text, settings, text_of

if TYPE_CHECKING:
    from dlm.checkpoints.pretrained import Pretrained


def infill(argv: Sequence[str]) -> int:
    """`dlm infill`: fill blanks."""
    parser = Parser(
        "infill",
        "[TEXT ...] [options]",
        "Fill the blanks of each text: ___ is a blank of --blank-length tokens, ___{12} one of twelve,\n"
        "___{2..20} of two to twenty, ___* of 1 to 16, ___{12:/[0-9]+/} one that matches a pattern.\n"
        "A token is a short word, or a part of a word.",
    )
    parser.add_argument("prompt", nargs="*", metavar="TEXT", help="text with blanks")
    parser.add_argument("--blank-length", type=int, default=4, metavar="N", help="tokens in a blank (default: 4)")
    add_common(parser, argv, "blanks", {"gen_length": "for --grow expand: most tokens of all blanks together"})
    args = parser.parse(argv)
    check_counts(args)
    if args.gen_length is not None and args.grow != "expand":
        raise ValueError("--gen-length is the most tokens of blanks that expand: add --grow expand, or write ___{12}")
    if args.grow == "confidence":
        raise ValueError(
            "--grow confidence is for a text that goes on: here give a blank a range of lengths, ___{2..20}"
        )
    from dlm.sampling.patterns import check_pattern
    from dlm.tokenizer import BLANK, blank_ranges, blanks

    texts = gather_prompts(args, 'dlm infill "The cat ___ on the mat."')
    places = max(sum(high for _, high in blank_ranges(text, args.blank_length)) for text in texts)
    for blank in (found for text in texts for found in BLANK.finditer(text)):
        if blank["pattern"] is not None:
            check_pattern("a blank's pattern", blank["pattern"])
    opened = announce(args, check=False)
    check_texts(opened, texts)
    check_region(opened, args.blank_length, "--blank-length")
    check_region(opened, places, "the blanks' length")
    places = 4 * places if args.grow == "expand" else places
    # A blank is in the middle of a text, so the text may not end in it.
    config = settings(args, opened.blank_defaults, gen_length=places, suppress_eos=opened.has_end)
    rows = [
        blanks(opened.codec, text, args.blank_length, opened.mask_id, lengths=lengths_of(opened, text, config, args))
        for text in texts
    ]
    pairs = ((text, row) for text, row in zip(texts, rows, strict=True) for _ in range(args.num_samples))
    jobs = (Job(row, text, config.seed + i, tuple(wanted)) for i, (text, (row, wanted)) in enumerate(pairs))

    def show(result: Result) -> None:
        pieces = filled_pieces(opened, result, config)
        if args.json:
            fills = [piece.text for piece in pieces if piece.styles]
            print_json(result.record(text_of(pieces)) | {"fills": fills})
        else:
            print_text(pieces)

    return run_jobs(opened, jobs, config, args, show)


def lengths_of(opened: Pretrained, text: str, config, args) -> tuple[int, ...]:
    """The tokens of each blank of a text: where one has a range, those with the lowest bound of the filled text."""
    from dlm.sampling.lengths import choose_lengths

    ids = {"mask_id": opened.mask_id, "eos": config.eos_ids or opened.end_ids}
    if not args.json:
        live.note(sys.stderr, "choosing lengths ...")
    try:
        return choose_lengths(
            opened.predictor, text, config, tokenizer=opened.codec, blank_length=args.blank_length, **ids
        )
    finally:
        live.note(sys.stderr, "")


def filled_pieces(opened: Pretrained, result: Result, config) -> list[Piece]:
    """The whole text, one piece a blank in the style FILLED; what is still masked as its glyph."""
    rows = row_text(opened, config)
    pieces, at = [], 0
    while at < len(result.row):
        ours, stop = result.editable[at], at + 1
        while stop < len(result.row) and result.editable[stop] == ours:
            stop += 1
        part = rows.plain(result.row[at:stop], result.editable[at:stop], result.masked[at:stop])
        pieces.append(Piece(text_of(part), (FILLED,) if ours else ()))
        at = stop
    return pieces
