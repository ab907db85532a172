"""How well a fine-tuned model follows instructions: the share of requested names, words and endings that it writes.

dlm eval instructions --model my-instruct --data held_out.jsonl     (rows of `dlm train instructions`)

Beside it the same shares against the demands of another row, which is what an answer meets by chance.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside eval/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.cli.parser import Parser, check_least, shown_defaults
from dlm.cli.scripts import guarded
from dlm.data.sources import read_rows
from dlm.utils.files import write_json
from dlm.utils.progress import counted

ASKED = ("names", "words", "ending")


def words_of(text: str) -> list[str]:
    """Its words in lower case."""
    return re.findall(r"[a-z'’]+", text.lower())


def met(answer: str, row: dict) -> dict[str, float | None]:
    """Shares in [0, 1] of the row's names and words in the answer, and of its ending's words in the answer's end.

    None where the row asks for no such thing. The ending counts words in order (the longest common subsequence) against
    the last part of the answer, twice as long as the ending.
    """
    words = words_of(answer)
    held = set(words)
    shares: dict[str, float | None] = {}
    for name in ("names", "words"):
        asked = [word.lower() for word in row[name]]
        shares[name] = sum(word in held for word in asked) / len(asked) if asked else None
    ending = words_of(row["ending"])
    shares["ending"] = common(ending, words[-2 * len(ending) :]) / len(ending) if ending else None
    return shares


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, best[j] = best[j], before + 1 if word == other else max(best[j], best[j - 1])
    return best[-1]


def mean(values: list[float]) -> dict:
    """Mean, its standard error, and how many."""
    count = len(values)
    middle = sum(values) / count if count else float("nan")
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / max(count - 1, 1) / max(count, 1))
    return {"mean": middle, "standard_error": spread, "count": count}


def score(answers: list[str], rows: list[dict]) -> dict[str, dict]:
    """For each thing asked for: its share in the answers, and against the demands of the next row."""
    other = rows[1:] + rows[:1]
    scores = {}
    for name in ASKED:
        own = [met(answer, row)[name] for answer, row in zip(answers, rows, strict=True)]
        chance = [met(answer, row)[name] for answer, row in zip(answers, other, strict=True)]
        scores[name] = mean([v for v in own if v is not None])
        scores[name]["by_chance"] = mean([v for v in chance if v is not None])["mean"]
    return scores


def answer_all(model, tokenizer, rows: list[dict], config, batch: int) -> list[str]:
    """The model's answer to each row's prompt."""
    from dlm import generate
    from dlm.chat_template import chat_ids
    from dlm.tokenizer import decode, mask_id

    mask, answers = mask_id(tokenizer, model.config), []
    parts = [rows[first : first + batch] for first in range(0, len(rows), batch)]
    for number, part in enumerate(counted(parts, len(parts), "batches")):
        prompts = [chat_ids(tokenizer, [{"role": "user", "content": row["prompt"]}], mask) for row in part]
        out = generate(model, prompts, replace(config, seed=config.seed + number * batch), tokenizer=tokenizer)
        answers += [decode(tokenizer, ids) for ids in out.sequences.tolist()]
    return answers


def run(argv: list[str]) -> int:
    """Load the model, answer, print the shares and some answers."""
    parser = Parser("eval instructions", "--model PATH --data FILE [options]", __doc__)
    parser.add_argument("--data", metavar="FILE", help="rows that dlm train instructions wrote")
    parser.add_argument("--rows", type=int, default=100, metavar="N", help="of the data, from its beginning")
    parser.add_argument("--batch-size", type=int, default=10, metavar="N", help="answers at a time (default: 10)")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="answers to print (default: 3)")
    parser.add_argument("--out", "--output", metavar="FILE", help="write answers and shares as JSON")
    parser.writes(out="json")
    parser.add_model()
    parser.add_sampling(shown_defaults(argv))
    args = parser.parse(argv)
    if not args.model or not args.data:
        raise ValueError("give --model with a fine-tuned model and --data with instructions")
    check_least(args, 1, "rows", "batch_size")
    rows = []
    for where, row in read_rows(args.data, "train"):
        missing = [name for name in ("prompt", *ASKED) if name not in row]
        if missing:
            raise ValueError(f"{where}: no {', '.join(missing)}: give rows that dlm train instructions wrote")
        rows.append(row)
    if len(rows) < 2:
        raise ValueError(f"{args.data}: one row: give two or more, chance is measured against another row")
    rows = rows[: max(args.rows, 2)]
    from dlm.cli.chat import check_chat
    from dlm.cli.session import open_checkpoint, settings

    opened = open_checkpoint(args)
    check_chat(opened)
    config = settings(args, opened.defaults)
    answers = answer_all(opened.model, opened.tokenizer, rows, config, args.batch_size)
    shares = score(answers, rows)
    for row, answer in list(zip(rows, answers, strict=True))[: args.show]:
        print(f"> {row['prompt']}\n{answer}\n")
    for name, share in shares.items():
        print(
            f"{name:<7} {share['mean']:.1%} ± {share['standard_error']:.1%} of what {share['count']} prompts ask for "
            f"(by chance {share['by_chance']:.1%})"
        )
    if args.out:
        made = [{"prompt": row["prompt"], "answer": answer} for row, answer in zip(rows, answers, strict=True)]
        write_json(Path(args.out), {"shares": shares, "answers": made}, indent=1)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the evaluation; a user's mistake is one line and exit code 2."""
    return guarded("dlm eval instructions", run, argv)


if __name__ == "__main__":
    sys.exit(main())
