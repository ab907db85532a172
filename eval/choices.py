"""How good and how honest a model's choices are: accuracy, calibration error, Brier score, a reliability diagram.

dlm eval choices questions.jsonl --out choices.json

Each line of the file is {"text": "The sky is ___{blue|green}.", "answer": "blue"}. A part of the questions, --held-out,
chooses the temperature that calibrates; all numbers with it are of the others. --also-dtype judges all of them once
more in another number type: what other hardware alone may change.
"""

from __future__ import annotations

import random
import sys
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside eval/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.cli.parser import Parser, check_least
from dlm.cli.scripts import guarded
from dlm.models.choices import DTYPES, float_name
from dlm.utils.names import check_name


def diagram(bins) -> str:
    """The reliability diagram as text: for each bin how sure, how right, how many."""
    lines = ["   sure   right  questions"]
    for _, _, count, sure, right in bins:
        lines.append(f"  {sure:5.3f}   {right:5.3f}  {count:9d}  {'#' * round(30 * right)}{'' if right else '.'}")
    return "\n".join(lines)


def judge(args, questions, dtype: str) -> tuple[str, list]:
    """(the model's name, a `Judged` for each question), with weights of a number type."""
    from dlm.cli.session import announce
    from dlm.evaluation.choices import Judged
    from dlm.sampling.choose import choose

    args.json, args.dtype = False, dtype
    opened = announce(args, check=False)
    known = {"tokenizer": opened.tokenizer, "mask_id": opened.mask_id, "orders": args.orders, "seed": args.seed}
    judged = []
    for text, answer in questions:
        ranked = sorted(choose(opened.predictor, text, **known).ranked, key=lambda row: row.options)
        logs = tuple(row.log_probability for row in ranked)
        judged.append(Judged(logs, [row.options for row in ranked].index(answer)))
    return opened.name, judged


def run(argv: list[str]) -> int:
    """Judge the questions, print a table, write the result."""
    parser = Parser("eval choices", "FILE [options]", __doc__)
    parser.add_argument("file", metavar="FILE", help="questions, a JSON object a line")
    parser.add_argument(
        "--held-out", type=float, default=0.3, metavar="X", help="share that fits the temperature (0.3)"
    )
    parser.add_argument("--orders", type=int, default=8, metavar="N", help="orders that are averaged (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the orders and of the held-out part")
    parser.add_argument("--out", metavar="FILE", help="write the result there, as JSON")
    parser.writes(out="json")
    parser.add_argument(
        "--also-dtype", type=float_name, metavar="NAME", help="judge in this type too: what rounding alone changes"
    )
    parser.add_model()
    args = parser.parse(argv)
    check_least(args, 2, "orders")
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held-out is {args.held_out}: give a share from 0 to below 1")
    if args.also_dtype is not None:
        check_name("also-dtype", args.also_dtype, DTYPES[1:])
    from dlm.evaluation.choices import calibration, fit_temperature, read_questions, spread

    questions = read_questions(args.file)
    name, judged = judge(args, questions, args.dtype)
    order = list(range(len(judged)))
    random.Random(args.seed).shuffle(order)
    held = round(args.held_out * len(judged))
    fit, rest = [judged[i] for i in order[:held]], [judged[i] for i in order[held:]]
    plain = calibration(rest)
    report = {"file": args.file, "model": name, "questions": len(rest), "as_it_is": asdict(plain)}
    error = f" ± {plain.accuracy_error:.3f}" if plain.accuracy_error is not None else ""
    print(f"accuracy {plain.accuracy:.3f}{error}  ECE {plain.ece:.3f}  Brier {plain.brier:.3f}  nats {plain.nll:.3f}")
    print(diagram(plain.bins))
    if len(fit) >= 2:
        temperature = fit_temperature(fit)
        scaled = calibration(rest, temperature)
        report |= {"temperature": temperature, "held_out": len(fit), "scaled": asdict(scaled)}
        print(f"at temperature {temperature:.2f}, from {len(fit)} held-out questions:")
        print(f"accuracy {scaled.accuracy:.3f}  ECE {scaled.ece:.3f}  Brier {scaled.brier:.3f}  nats {scaled.nll:.3f}")
    if args.also_dtype is not None:
        _, again = judge(args, questions, args.also_dtype)
        report["also_dtype"] = {"dtype": args.also_dtype} | asdict(spread(judged, again))
        print(f"in {args.also_dtype}: {spread(judged, again)}")
    if args.out:
        from dlm.utils.files import write_json

        write_json(Path(args.out), report)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return guarded("dlm eval choices", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
