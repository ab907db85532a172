"""What drafts save: forward passes, slots computed and seconds of plain decoding and of drafts of 1 to 7 states.

    dlm bench draft --prompts 4 --drafts 1 3 7 --temperature 0.8

The same texts with and without drafts, which must be equal; runs of one text follow each other, plain decoding first,
so that a ratio is of neighbours. Everything else is the checkpoint's own default. One thread.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside benchmarks/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.cli.parser import Parser, check_least

PROMPTS = Path(__file__).parent / "prompts.txt"


def measure(model, tokenizer, prompts: Sequence[str], config, drafts: Sequence[int], clock) -> list[dict]:
    """A row for plain decoding and one for each draft: passes and slots a token, median seconds a text and the median
    ratio to plain decoding of the same text. Raises RuntimeError where a text differs."""
    import torch

    import dlm

    rows = [{"draft": draft, "tokens": 0, "passes": 0, "slots": 0, "seconds": []} for draft in (0, *drafts)]
    for number, prompt in enumerate(prompts):
        plain = None
        for row in rows:
            settings = dataclasses.replace(config, draft=row["draft"], seed=config.seed + number)
            began = clock()
            out = dlm.generate(model, [prompt], settings, tokenizer=tokenizer)
            row["seconds"].append(clock() - began)
            plain = out if plain is None else plain
            if not torch.equal(out.sequences, plain.sequences):
                raise RuntimeError(f"the text of {prompt!r} is another one with a draft of {row['draft']}")
            row["tokens"] += round(float(out.tokens_per_forward[0] * out.nfe[0]))
            row["passes"] += int(out.nfe[0])
            row["slots"] += int(out.positions_computed[0])
    for row in rows:
        row["ratio"] = statistics.median(a / b for a, b in zip(rows[0]["seconds"], row["seconds"], strict=True))
    return rows


def line(row: dict) -> str:
    return (
        f"draft {row['draft']}: {row['tokens'] / row['passes']:.2f} tokens a pass, "
        f"{row['slots'] / row['tokens']:.1f} slots a token, {statistics.median(row['seconds']):.3f} s a text, "
        f"{row['ratio']:.2f}x"
    )


def parser() -> Parser:
    made = Parser("bench draft", "[options]", __doc__)
    add = made.add_argument
    add("--model", metavar="PATH", help="default: the model that ships")
    add("--prompts", type=int, default=8, metavar="N", help="texts (default: 8)")
    add("--gen-length", type=int, default=128, metavar="N", help="tokens of a text (default: 128)")
    add("--temperature", type=float, metavar="X", help="default: the checkpoint's")
    add("--method", metavar="NAME", help="default: the checkpoint's")
    add("--drafts", type=int, nargs="+", default=[1, 2, 3, 5, 7], metavar="K", help="states (default: 1 2 3 5 7)")
    return made


def main(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    check_least(args, 1, "prompts", "gen_length")
    for draft in args.drafts:
        if draft < 1:
            raise ValueError(f"--drafts {draft}: give 1 or more; plain decoding is measured beside each")
    import torch

    import dlm

    torch.set_num_threads(1)
    opened = dlm.load_pretrained(args.model)
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    prompts = [lines[i % len(lines)] for i in range(args.prompts)]
    own = {name: value for name, value in opened.defaults.items() if name in dlm.SamplingConfig.__dataclass_fields__}
    given = {"gen_length": args.gen_length, "temperature": args.temperature, "method": args.method}
    config = dlm.SamplingConfig(**own | {name: value for name, value in given.items() if value is not None})
    model, tokenizer = opened.model, opened.tokenizer
    dlm.generate(model, prompts[:1], dataclasses.replace(config, gen_length=16, draft=2), tokenizer=tokenizer)  # warm
    for row in measure(model, tokenizer, prompts, config, args.drafts, time.process_time):
        print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    from dlm.cli.main import main as command

    sys.exit(command(["bench", "draft", *sys.argv[1:]]))
