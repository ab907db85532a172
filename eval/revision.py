"""What the rules that revise do: do they repair a damaged text, and what do they do to quality per pass.

dlm eval revision --data valid/stories.txt.xz                        (the model that ships)
dlm eval revision --data held-out.jsonl --model PATH --judge gpt2 --rows 128 --steps 16,32 --out revision.json

Repair: tokens of held-out windows are replaced at random, and a rule goes over each window, which has no mask. A good
rule leaves fewer wrong tokens than it was given. Writing: texts that each rule writes in as many passes, judged.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside eval/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dlm.cli.parser import Parser, check_least
from dlm.cli.scripts import guarded
from dlm.evaluation.rules import fields_of

CHOSEN = "none,edit:0.7,edit:0.9,edit:0.97,shadow:0.9,shadow:0.97,verify,ancestral,cap,rescale,confidence,loop"


def options(argv: list[str]):
    """The options of a command line."""
    parser = Parser("eval revision", "--data FILE [options]", __doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="held-out text: .txt, .jsonl (.xz), .parquet, or hf:NAME")
    add("--rows", type=int, default=64, metavar="N", help="windows that are damaged (default: 64)")
    add("--skip", type=int, default=0, metavar="N", help="windows of the file that are left out first (default: 0)")
    add("--length", type=int, default=64, metavar="N", help="tokens of a window (default: 64)")
    add("--share", type=float, default=0.1, metavar="X", help="of the tokens that are replaced (default: 0.1)")
    add("--texts", type=int, default=32, metavar="N", help="texts that each rule writes; 0: none (default: 32)")
    add("--gen-length", type=int, default=64, metavar="N", help="tokens of a text (default: 64)")
    add("--steps", default="16,32", metavar="N,N", help="passes that each rule has for a text (default: 16,32)")
    add("--temperature", type=float, default=0.8, metavar="T", help="of the texts (default: 0.8)")
    add("--rules", metavar="LIST", default=CHOSEN, help=f"default: {CHOSEN}")
    add("--judge", metavar="PATH", help="any autoregressive model (default: the twin of the model that ships)")
    add("--seed", type=int, default=0, metavar="N", help="of the damage and of the first text")
    add("--out", metavar="FILE", help="write the results there as JSON")
    parser.writes(out="json")
    parser.add_model()
    args = parser.parse(argv)
    check_least(args, 2, "rows", "length", "gen_length")
    check_least(args, 0, "skip", "texts", "seed")
    if not 0 < args.share < 1:
        raise ValueError(f"--share is {args.share:g}: give a share of the tokens, above 0 and below 1")
    try:
        args.passes = [int(part) for part in args.steps.split(",")]
    except ValueError:
        raise ValueError(f"--steps is {args.steps!r}: give whole numbers, as in 16,32") from None
    args.chosen = {rule: fields_of(rule) for rule in args.rules.split(",")}
    if args.texts and args.judge is None and args.model is not None:
        raise ValueError("this model has no judge of its own: give --judge, or --texts 0")
    return args


def windows(args, tokenizer) -> np.ndarray:
    """(rows, length) held-out tokens. Raises ValueError where the file has too few."""
    from dlm.data.windows import CorpusConfig, load_corpus

    corpus = load_corpus(args.data, tokenizer, CorpusConfig(args.length, bos="none", eos="none"))
    whole = [example.tokens for example in corpus.examples if len(example.tokens) == args.length]
    rows = whole[args.skip : args.skip + args.rows]
    if len(rows) < args.rows:
        raise ValueError(f"{args.data} has {len(whole)} windows of {args.length} tokens: give fewer --rows or --skip")
    return np.stack(rows).astype(np.int64)


def damaged(clean: np.ndarray, share: float, ids: np.ndarray, rng) -> np.ndarray:
    """Tokens (R, T) of which a share is replaced by other ones, drawn evenly from `ids`."""
    spoilt = rng.random(clean.shape) < share
    other = rng.choice(ids, size=clean.shape)
    other = np.where(other == clean, ids[(np.searchsorted(ids, other) + 1) % len(ids)], other)
    return np.where(spoilt, other, clean)


def repair(opened, clean: np.ndarray, wrong: np.ndarray, fields: dict) -> dict:
    """What a rule makes of damaged windows: errors in per cent before and after, of rows, with standard errors."""
    import torch

    from dlm import Canvas, SamplingConfig, generate

    length, after, passes = clean.shape[1], [], []
    config = SamplingConfig(gen_length=length, block_length=length, method="none", **fields)
    for at in range(0, len(clean), 32):
        tokens = torch.from_numpy(wrong[at : at + 32])
        yes = torch.ones_like(tokens, dtype=torch.bool)
        out = generate(opened.model, Canvas(tokens, yes, yes, opened.mask_id), replace(config, seed=at))
        after.append(out.canvas.tokens.numpy())
        passes += out.nfe.tolist()
    made = np.concatenate(after)
    spoilt, errors = wrong != clean, made != clean
    gain = (errors.sum(1) - spoilt.sum(1)) / length
    return {
        "before": 100 * spoilt.mean(), "after": 100 * errors.mean(),
        "change": 100 * gain.mean(), "change_error": 100 * gain.std(ddof=1) / math.sqrt(len(gain)),
        "mended": 100 * (~errors)[spoilt].mean(), "spoilt": 100 * errors[~spoilt].mean(),
        "passes": float(np.mean(passes)),
    }  # fmt: skip


def written(opened, judge, fields: dict, steps: int, args) -> dict:
    """Texts of one rule in so many passes, judged."""
    import torch

    from dlm import SamplingConfig, generate
    from dlm.evaluation.generations import quality

    config = SamplingConfig(
        gen_length=args.gen_length, block_length=args.gen_length, method="none", steps=steps,
        temperature=args.temperature, **fields,
    )  # fmt: skip
    prompt, texts, passes = [opened.tokenizer.bos_token_id or 0], [], []
    for at in range(0, args.texts, 16):
        count = min(16, args.texts - at)
        seeds = replace(config, seed=args.seed + at)
        out = generate(opened.model, [prompt] * count, seeds, tokenizer=opened.tokenizer)
        texts += [opened.tokenizer.decode(row, skip_special_tokens=True) for row in out.sequences]
        passes.append(out.nfe.to(torch.float64))
    record = quality(texts, judge).record()
    return {"steps": steps, "passes": float(torch.cat(passes).mean())} | record


def run(argv: list[str]) -> int:
    """Damage, repair, write, judge; print a row for each rule."""
    args = options(argv)
    from dlm.checkpoints.files import TWIN
    from dlm.cli.session import announce
    from dlm.evaluation.judge import open_judge

    args.json = False
    opened = announce(args, check=False)
    clean, rng = windows(args, opened.tokenizer), np.random.default_rng(args.seed)
    special = {*opened.tokenizer.all_special_ids, opened.mask_id}
    ids = np.array([i for i in range(len(opened.tokenizer)) if i not in special])
    wrong = damaged(clean, args.share, ids, rng)
    results: dict[str, list[dict]] = {"repair": [], "writing": []}
    print(
        f"repair of {args.rows} windows of {args.length} tokens, {100 * (wrong != clean).mean():.2f}% of them replaced"
    )
    for name, fields in args.chosen.items():
        if "revise" not in fields:
            continue
        began = time.perf_counter()
        row = {"rule": name} | repair(opened, clean, wrong, fields)
        results["repair"].append(row | {"seconds": time.perf_counter() - began})
        print(
            f"  {name:<13} {row['before']:5.2f}% -> {row['after']:5.2f}% wrong ({row['change']:+.2f} ± "
            f"{row['change_error']:.2f})  mended {row['mended']:4.1f}%  spoilt {row['spoilt']:4.2f}%  "
            f"{row['passes']:.1f} passes",
            flush=True,
        )
    if args.texts:
        judge = open_judge(args.judge or str(TWIN), device=args.device)
        print(f"{args.texts} texts of {args.gen_length} tokens each, temperature {args.temperature:g}")
        for steps in args.passes:
            for name, fields in args.chosen.items():
                row = {"rule": name} | written(opened, judge, fields, steps, args)
                results["writing"].append(row)
                print(
                    f"  {name:<13} {steps:3d} steps, {row['passes']:5.1f} passes: perplexity "
                    f"{row['perplexity']['value']:7.2f} ± {row['perplexity']['error']:.2f}  entropy "
                    f"{row['entropy']['value']:.3f} ± {row['entropy']['error']:.3f}  repetition "
                    f"{row['repetition']['value']:.3f}",
                    flush=True,
                )
    if args.out:
        from dlm.utils.files import write_json
        from dlm.utils.hardware import commit, hardware, versions

        facts = {"commit": commit(), "hardware": hardware(), "versions": versions(), "model": opened.name}
        shown = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float)}
        write_json(Path(args.out), facts | {"settings": shown} | results, indent=1)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return guarded("dlm eval revision", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
