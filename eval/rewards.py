"""What reward functions say of a model's answers, with standard errors: before and after training, on held-out prompts.

dlm eval rewards held_out.jsonl --model my-model --rewards sudoku4x4 --gen-length 16 --steps 16

The file is as `dlm train grpo` reads it: a prompt, and the columns of the reward functions.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside eval/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.cli.parser import Parser, check_least, shown_defaults
from dlm.cli.scripts import guarded
from dlm.rewards.table import REWARDS, check_columns, open_rewards, score


def run(argv: list[str]) -> int:
    """Answer the prompts, print a line for each reward, write the result."""
    parser = Parser("eval rewards", "FILE --rewards NAME [options]", __doc__)
    parser.add_argument("file", metavar="FILE", help="prompts with the columns of the rewards: .jsonl, .parquet")
    parser.add_argument("--rewards", metavar="A|B", help=f"{', '.join(REWARDS)}, regex:EXPRESSION or module:function")
    parser.add_argument("--format", default="plain", metavar="NAME", help="plain or chat (plain)")
    parser.add_argument("--separator", default="\n", metavar="TEXT", help="behind a prompt in format plain ('\\n')")
    parser.add_argument("--limit", type=int, metavar="N", help="prompts from the beginning of the file (all)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="answers at a time (64)")
    parser.add_argument("--out", metavar="FILE", help="write the result and the answers there, as JSON")
    parser.writes(out="json")
    parser.add_sampling(shown_defaults(argv))
    parser.add_model()
    args = parser.parse(argv)
    check_least(args, 1, "batch_size")
    rewards = open_rewards((args.rewards or "").split("|"))
    from dlm.cli.session import announce, settings
    from dlm.data.conversations import ChatFormat
    from dlm.data.questions import load_questions
    from dlm.training.rollouts import answer_text, write
    from dlm.utils.stats import mean_and_error

    args.json = False
    opened = announce(args, check=False)
    sampling = settings(args, opened.defaults)
    form = ChatFormat(args.format == "chat", opened.config.max_sequence_length, separator=args.separator)
    data = load_questions(
        [args.file], opened.tokenizer, form, mask=opened.mask_id, region=sampling.gen_length, answers=1
    )
    check_columns(rewards, tuple(data.columns))
    numbers = range(len(data))[: args.limit]
    ids, seeds = [data.ids(index) for index in numbers], [sampling.seed + index for index in numbers]
    made, passes, committed = write(
        opened.predictor, ids, seeds, sampling,
        mask_id=opened.mask_id, vocab_size=len(opened.tokenizer), ends=opened.end_ids, rows=args.batch_size,
    )  # fmt: skip
    texts = [answer_text(row, opened.tokenizer) for row in made]
    prompts = [data.prompts[index] for index in numbers]
    columns = {name: [values[index] for index in numbers] for name, values in data.columns.items()}
    places = [data.places[index] for index in numbers]
    report = {"file": args.file, "model": opened.name, "answers": len(texts), "tokens_per_pass": committed / passes}
    for reward in rewards:
        values = [value for value in score(reward, prompts, texts, columns, places) if value is not None]
        mean, error = mean_and_error(sum(values), sum(value**2 for value in values), len(values))
        whole = sum(value == 1 for value in values) / len(values)
        report[reward.name] = {"mean": mean, "error": error, "share_of_1": whole, "values": values}
        print(f"{reward.name}: {mean:.4f}{'' if error is None else f' ± {error:.4f}'}, {whole:.1%} have 1")
    print(f"{len(texts)} answers, {committed / passes:.2f} tokens a pass")
    if args.out:
        from dlm.utils.files import write_json

        write_json(Path(args.out), report | {"texts": texts})
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run it; a user's mistake is one line and exit code 2."""
    return guarded("dlm eval rewards", run, argv)


if __name__ == "__main__":
    sys.exit(main())
