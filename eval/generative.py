"""Text that models write, judged: perplexity beside entropy, distinct n-grams, repetition and length.

dlm eval generative                                                   (the model that ships, 64 texts a temperature)
dlm eval generative --model a b --judge gpt2 --temperatures 0.5,0.7,0.9,1.0 --reference held-out.txt --out g.json

A judge likes repetition, so models are compared where their texts are as varied: --reference measures held-out text
of the same length, and every model's frontier is read off at its entropy. With --out a run that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # `accelerate launch eval/generative.py` from a clone: find dlm/ beside eval/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.cli.parser import Parser
from dlm.cli.scripts import guarded
from dlm.utils.files import write_json

TEMPERATURES = "0.5,0.7,0.85,1.0"


def parse(argv: list[str]):
    """The options of a command line."""
    parser = Parser("eval generative", "[options]", __doc__)
    add = parser.add_argument
    add(
        "--judge",
        metavar="PATH",
        help="any autoregressive model, a GGUF file too (default: the twin of the model that ships)",
    )
    add("--model", nargs="+", default=[None], metavar="PATH", help="folders or hub ids (default: the one that ships)")
    add("--temperatures", default=TEMPERATURES, metavar="T,T,…", help=f"the frontier (default: {TEMPERATURES})")
    add("--num-samples", type=int, default=64, metavar="N", help="texts for each model and temperature (default: 64)")
    add("--prompt", default="", metavar="TEXT", help="what every text goes on from (default: nothing)")
    add("--gen-length", type=int, default=128, metavar="N", help="tokens of a text, at most (default: 128)")
    add("--steps", type=int, metavar="N", help="forward passes of a diffusion model (default: one a token)")
    add("--method", default="none", metavar="NAME", help="of a diffusion model, as in dlm generate (default: none)")
    add("--block-length", type=int, metavar="N", help="of a diffusion model")
    add("--top-p", type=float, metavar="P", help="only the most probable tokens that make up P")
    add("--reference", metavar="PATH", help="held-out text, measured too; models are compared at its entropy")
    add("--seed", type=int, default=0, metavar="N", help="of the first text")
    add("--batch-size", type=int, default=16, metavar="N", help="texts at a time (default: 16)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    add("--dtype", default="auto", help="float32, bfloat16, float16, int8, fp8 (default: as saved)")
    add("--out", metavar="FILE", help="write results and texts there as JSON, and go on from what is done")
    parser.writes(out="json")
    return parser.parse(argv)


def temperatures_of(value: str) -> list[float]:
    """The temperatures of a comma separated list. Errors: one that is no number."""
    try:
        return [float(part) for part in value.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--temperatures is {value!r}: give numbers with commas between them") from None


def run(args, argv: list[str]) -> int:
    """Write, judge and print a row for each model and temperature; then the comparison at the reference's entropy."""
    from dlm.checkpoints.files import TWIN
    from dlm.evaluation.generations import Quality, open_writer, quality
    from dlm.evaluation.judge import open_judge
    from dlm.sampling.config import SamplingConfig

    temperatures = temperatures_of(args.temperatures)
    if args.num_samples < 2:
        raise ValueError(f"--num-samples is {args.num_samples}: errors need 2 texts or more")
    config = SamplingConfig(
        gen_length=args.gen_length, steps=args.steps, method=args.method, block_length=args.block_length,
        top_p=args.top_p, seed=args.seed,
    )  # fmt: skip
    if args.judge is None and args.model != [None]:
        raise ValueError("this model has no judge of its own: give --judge an autoregressive model")
    judge = open_judge(args.judge or str(TWIN), device=args.device, dtype=args.dtype)
    made = results_file(args, argv, judge.facts)
    frontiers: dict[str, list[Quality]] = {}
    for path in args.model:
        writer = open_writer(path, device=args.device, dtype=args.dtype)
        name = str(path) if writer.name in frontiers else writer.name
        frontiers[name] = []
        for temperature in temperatures:
            key = f"{name} at {temperature:g}"
            if made["texts"].get(key, {}).get("weights") != writer.digest:
                began = time.perf_counter()
                texts = write_texts(writer, replace(config, temperature=temperature), args)
                made["texts"][key] = {
                    "texts": texts, "weights": writer.digest, "seconds": time.perf_counter() - began
                }  # fmt: skip
                save(args.out, made)
            point = quality(made["texts"][key]["texts"], judge, args.prompt)
            made["results"][key] = point.record()
            frontiers[name].append(point)
            print(line(key, point, header=len(made["results"]) == 1), flush=True)
    if args.reference:
        measures = quality(reference_texts(args, judge.tokenizer), judge, args.prompt)
        made["results"]["reference"] = measures.record()
        print(line("reference", measures, header=False), flush=True)
        made["matched"] = matched(frontiers, measures)
    save(args.out, made)
    return 0


def write_texts(writer, config, args) -> list[str]:
    """The texts of one model at one temperature."""
    from dlm.evaluation.generations import write
    from dlm.tokenizer import encode_prompt

    prompt = encode_prompt(writer.tokenizer, args.prompt, writer.mask_id)

    def report(done: int) -> None:
        print(f"{writer.name} at {config.temperature:g}: {done}/{args.num_samples} texts", file=sys.stderr, flush=True)

    ids = write(writer, [prompt] * args.num_samples, config, batch_size=args.batch_size, report=report)
    return [writer.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def reference_texts(args, tokenizer) -> list[str]:
    """The first tokens of held-out documents, as many as a model writes."""
    from dlm.data.sources import read_documents

    texts = []
    for text in read_documents(args.reference):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: args.gen_length]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
        if len(texts) == args.num_samples:
            break
    return texts


def matched(frontiers: dict, reference) -> dict:
    """Each model's perplexity where its texts have the reference's entropy, printed and as JSON."""
    from dlm.evaluation.generations import at_entropy

    entropy, matches = reference.entropy.value, {"entropy": reference.entropy.value}
    print(f"\nat the reference's entropy, {entropy:.3f} nats:")
    for name, points in frontiers.items():
        got = at_entropy(points, entropy)
        matches[name] = None if got is None else {"judged": got.value, "error": got.error}
        text = "outside of its frontier: give other temperatures"
        if got is not None:
            text = f"perplexity {math.exp(got.value):.2f} ± {math.exp(got.value) * got.error:.2f}"
        print(f"  {name:<32} {text}")
    return matches


def line(key: str, point, header: bool) -> str:
    """A row of the table, each number with its standard error over texts."""
    columns = (
        ("perplexity", point.perplexity, 2), ("entropy", point.entropy, 3), ("distinct-2", point.distinct_2, 3),
        ("distinct-3", point.distinct_3, 3), ("repetition", point.repetition, 3), ("length", point.length, 1),
        ("degenerate", point.degenerate, 3),
    )  # fmt: skip
    cells = "".join(f"{f'{m.value:.{digits}f} ± {m.error:.{digits}f}':>18}" for _, m, digits in columns)
    head = f"{'model and temperature':<44}" + "".join(f"{name:>18}" for name, _, _ in columns) + "\n"
    return (head if header else "") + f"{key:<44}{cells}"


def results_file(args, argv: list[str], judge: dict) -> dict:
    """What the results file holds: of a run that was stopped, or new. Errors: one that was made otherwise."""
    from dlm.utils.hardware import commit, hardware, versions

    settings = {name: value for name, value in vars(args).items() if name not in ("out", "batch_size", "device")}
    settings |= {"judge": judge}
    same = {name: value for name, value in settings.items() if name not in ("model", "temperatures", "reference")}
    made = {
        "command": shlex.join(["python", "-m", "eval.generative", *argv]), "commit": commit(),
        "hardware": hardware(), "versions": versions(), "settings": settings, "texts": {}, "results": {},
    }  # fmt: skip
    if args.out and Path(args.out).is_file():
        try:
            before = json.loads(Path(args.out).read_text(encoding="utf-8"))
            theirs = {name: before["settings"].get(name) for name in same}
            made["texts"] = before["texts"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--out {args.out} is no results file of this script: name another one") from None
        for name in same:
            if json.dumps(theirs[name]) != json.dumps(same[name]):
                raise ValueError(
                    f"--out {args.out} was made with {name} {theirs[name]!r}, not {same[name]!r}: name another file"
                )
    save(args.out, made)
    return made


def save(out: str | None, made: dict) -> None:
    """The results; the file appears whole or not at all."""
    if out:
        write_json(Path(out), made, indent=2)


def main(argv: list[str] | None = None) -> int:
    """Run the script; a user's mistake is one line and exit code 2."""
    return guarded("dlm eval generative", lambda words: run(parse(words), words), argv)


if __name__ == "__main__":
    sys.exit(main())
