"""`dlm choose`: how probable each option of a text's blanks is."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dlm.cli.parser import Parser, check_least
from dlm.cli.session import announce, print_json
from dlm.utils.printable import safe


def choose(argv: Sequence[str]) -> int:
    """`dlm choose`: rank options."""
    parser = Parser(
        "choose",
        "TEXT ... [options]",
        'Say how probable each option of a text\'s blanks is: "The capital of France is ___{Paris|Rome|Berlin}."',
    )
    parser.add_argument("text", nargs="+", metavar="TEXT", help="text with blanks and their options")
    parser.add_argument(
        "--orders", type=int, default=8, metavar="N", help="orders of the tokens to average over (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the orders (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each text")
    parser.add_model()
    args = parser.parse(argv)
    check_least(args, 2, "orders")
    check_least(args, 0, "seed")
    from dlm.sampling.choose import choose as rank
    from dlm.sampling.choose import read_options

    for text in args.text:
        read_options(text)  # before the weights are read
    opened = announce(args, check=False)
    known = {"tokenizer": opened.tokenizer, "mask_id": opened.mask_id, "orders": args.orders, "seed": args.seed}
    for number, text in enumerate(args.text):
        chosen = rank(opened.predictor, text, **known)
        if args.json:
            rows = [
                {"options": row.options, "probability": row.probability, "standard_error": row.error}
                for row in chosen.ranked
            ]
            print_json({"text": text, "best": chosen.best, "options": rows})
            continue
        if number:
            print()
        for row in chosen.ranked:
            error = f" ± {row.error:.4f}" if row.error else ""
            print(f"{row.probability:8.4f}{error}  {safe(' | '.join(row.options))}")
    sys.stdout.flush()
    return 0
