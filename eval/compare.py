"""A diffusion model against its autoregressive twin: likelihood, text, speed, infilling, and the line before.

dlm eval compare --data a.txt b.txt --stories a.txt --out compare.json      (the models that ship)
dlm eval compare --model my-model --twin my-twin --data …

--data: held-out texts for bits per byte. --stories: held-out text of sentences, for everything else. Each part is
written to --out as it ends, and the same command goes on after a kill; a table in Markdown is printed at the end.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # `accelerate launch eval/compare.py` from a clone: find dlm/ beside eval/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dlm.checkpoints.files import TWIN
from dlm.cli.parser import Parser
from dlm.cli.scripts import guarded
from dlm.data.sources import read_documents
from dlm.sampling.config import SamplingConfig
from dlm.utils.files import write_json
from dlm.utils.hardware import commit, hardware, synchronise, versions
from dlm.utils.stats import Measure

if TYPE_CHECKING:
    from dlm.checkpoints.pretrained import Pretrained
    from dlm.data.examples import Example
    from dlm.objectives.likelihood import Bound

LINE = re.compile(r"[A-Z][^.!?\n]{15,140}[.!?]")  # a sentence, without what speech is quoted with
CHOICES = 4


def parse(argv: list[str]):
    """The options of a command line."""
    parser = Parser("eval compare", "--data PATH ... --stories PATH --out FILE [options]", __doc__)
    add = parser.add_argument
    add("--model", metavar="PATH", help="the diffusion model (default: the one that ships)")
    add(
        "--twin", metavar="PATH", help="the autoregressive model in LLaDA's layout (default: that of the default model)"
    )
    add("--judge", metavar="PATH", help="of the texts written (default: the twin, which favours its own)")
    add("--data", nargs="+", required=True, metavar="PATH", help="held-out texts, for bits per byte")
    add("--stories", required=True, metavar="PATH", help="held-out text of sentences, for all else")
    add("--out", required=True, metavar="FILE", help="results as JSON")
    parser.writes(out="json")
    add("--max-bytes", type=int, metavar="N", help="of each text of --data (default: all)")
    add("--length", type=int, default=256, metavar="N", help="tokens of a window and of a text (default: 256)")
    add("--draws", type=int, default=2, metavar="N", help="of noise for a window of --data (default: 2)")
    add("--samples", type=int, default=64, metavar="N", help="texts for each model and temperature (default: 64)")
    add("--gen-length", type=int, default=128, metavar="N", help="tokens of a text that is written (default: 128)")
    add("--temperatures", default="0.6,0.8,1.0,1.2", metavar="T,T,…", help="the frontier (default: 0.6,0.8,1.0,1.2)")
    add("--questions", type=int, default=200, metavar="N", help="of infilling and of the line before (default: 200)")
    add("--repeats", type=int, default=5, metavar="N", help="of each timing (default: 5)")
    add("--seed", type=int, default=0, metavar="N")
    add("--batch-size", type=int, default=16, metavar="N")
    args = parser.parse(argv)
    if args.twin is None and args.model is not None:
        raise ValueError("this model has no twin of its own: give --twin the autoregressive model to compare it with")
    args.twin = args.twin or str(TWIN)
    return args


# ---------------------------------------------------------------------------------------------------------- the parts


def likelihoods(args, model: Pretrained, twin: Pretrained) -> list[dict]:
    """Bits per byte of each text: a bound for the model, exact for the twin, in the same windows."""
    from dlm.data.windows import CorpusConfig, load_corpus
    from dlm.evaluation.perplexity import open_scorer, score_corpus, summarise, unscored_bytes
    from dlm.objectives.likelihood import LikelihoodConfig

    rows = []
    config = LikelihoodConfig(draws=args.draws, seed=args.seed, batch_size=args.batch_size)
    for path in args.data:
        for place in (args.model, args.twin):
            scorer = open_scorer(place)
            form = CorpusConfig(args.length, max_bytes=args.max_bytes)
            corpus = load_corpus(path, scorer.tokenizer, form)
            began = time.perf_counter()
            bounds = score_corpus(scorer, corpus, config, report=tell)
            size = corpus.bytes - unscored_bytes(scorer, corpus)
            score = summarise(bounds, corpus, size, time.perf_counter() - began)
            rows.append({"text": Path(path).name, "model": scorer.name, "exact": scorer.exact} | score.record())
    return rows


def texts(args, model: Pretrained, twin: Pretrained) -> dict:
    """Judged perplexity over temperatures for both, and at the entropy of held-out text of the same length."""
    from dlm.evaluation.generations import at_entropy, quality, write
    from dlm.evaluation.judge import open_judge

    judge = open_judge(args.judge or args.twin)
    places, curves = [float(part) for part in args.temperatures.split(",")], {}
    stories, beginning = list(read_documents(args.stories)), {}
    for writer in (model, twin):
        points, beginning[writer.name] = [], prompt_of(writer)
        for temperature in places:
            config = SamplingConfig(gen_length=args.gen_length, temperature=temperature, seed=args.seed, block_length=8)
            ids = write(writer, [prompt_of(writer)] * args.samples, config, batch_size=args.batch_size)
            points.append(quality([writer.tokenizer.decode(row, skip_special_tokens=True) for row in ids], judge))
            tell(f"texts: {writer.name} at {temperature:g}")
        curves[writer.name] = points
    encoded = [judge.tokenizer(text, add_special_tokens=False)["input_ids"] for text in stories[: args.samples]]
    human = quality([judge.tokenizer.decode(row[: args.gen_length]) for row in encoded], judge)
    matched = {name: at_entropy(points, human.entropy.value) for name, points in curves.items()}
    return {
        "judge": judge.facts,
        "temperatures": places,
        "held_out": human.record(),
        "frontiers": {name: [point.record() for point in points] for name, points in curves.items()},
        "at_the_entropy_of_held_out_text": {name: got and vars(got) for name, got in matched.items()},
    }


def latencies(args, model: Pretrained, twin: Pretrained) -> list[dict]:
    """Milliseconds a token of one text, with a cache on both sides: the median of the repeats, settings in turn."""
    from dlm.checkpoints.generation import generate
    from dlm.sampling import autoregressive

    length, cells = args.gen_length, {}

    def diffusion(steps: int):
        config = SamplingConfig(gen_length=length, steps=steps, method="dual", block_length=32, seed=args.seed)
        return lambda: generate(model.model, [prompt_of(model)], config, tokenizer=model.tokenizer)

    for steps in (length, length // 2, length // 4, length // 8):
        if steps * 32 >= length:
            cells[f"{model.name}, dual cache, {length / steps:g} tokens a pass"] = diffusion(steps)
    for cached in (True, False):
        cells[f"{twin.name}, {'KV cache' if cached else 'no cache'}"] = lambda cached=cached: autoregressive.generate(
            twin.model, [prompt_of(twin)], length, cached=cached, forbidden=[twin.mask_id]
        )
    times: dict[str, list[float]] = {name: [] for name in cells}
    for turn in range(args.repeats + 1):
        for name, work in cells.items():
            synchronise(model.model.device)
            began = time.perf_counter()
            work()
            synchronise(model.model.device)
            if turn:  # the first is to warm up
                times[name].append((time.perf_counter() - began) * 1000 / length)
        tell(f"latency: repeat {turn} of {args.repeats}")
    return [
        {"setting": name, "ms_per_token": median(t), "fastest": min(t), "slowest": max(t)} for name, t in times.items()
    ]


def infilling(args, model: Pretrained, twin: Pretrained) -> dict:
    """The middle of held-out passages given both sides, which the twin cannot see: nats a token, and how many tokens
    of the middle are written right at temperature 0."""
    from dlm.data.examples import Example
    from dlm.evaluation.generations import continue_all, fill

    passages, middle = [], 16
    for text in read_documents(args.stories):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids) - 4 * middle, 16 * middle):
            passages.append(ids[start : start + 4 * middle])
    picked = np.random.default_rng(args.seed).permutation(len(passages))[: args.questions]
    both, left, masked, ahead = [], [], [], []
    first = prompt_of(model)
    for number, place in enumerate(picked.tolist()):
        ids = np.array(first + passages[place])
        start = len(first) + int(1.5 * middle)
        target = (np.arange(len(ids)) >= start) & (np.arange(len(ids)) < start + middle)
        both.append(Example(ids, target, number))
        left.append(Example(ids[: start + middle], target[: start + middle], number))
        masked.append(np.where(target, model.mask_id, ids).tolist())
        ahead.append(ids[:start].tolist())
    truth = np.array([example.tokens[example.target] for example in both])
    wrote = np.array(fill(model, masked, args.batch_size))
    went_on = np.array(continue_all(twin, ahead, middle, args.batch_size))
    return {
        "passages": len(both),
        "middle": middle,
        "nats": {
            f"{model.name}, both sides": vars(per_token(model_bounds(args, model, both))),
            f"{model.name}, left side": vars(per_token(model_bounds(args, model, left))),
            f"{twin.name}, left side": vars(per_token(twin_values(args, twin, left))),
        },
        "right": {
            f"{model.name}, both sides": vars(Measure.of((wrote == truth).mean(axis=1).tolist())),
            f"{twin.name}, left side": vars(Measure.of((went_on == truth).mean(axis=1).tolist())),
        },
    }


def reversal(args, model: Pretrained, twin: Pretrained) -> dict:
    """Which of four lines stood before (or after) a given line: the one that the line makes likeliest, compared with
    how likely it is on its own.

    The model scores a candidate in its place, before the line or after it. The twin reads forward alone: asked for
    the line before, it is given the line and scores the candidate as what follows; `by Bayes` asks it the other way
    round, how likely the line is after each candidate. Gain: what the line adds for the right candidate, nats a token.
    """
    questions = line_pairs(args, model.tokenizer)
    answers = {}
    for way in ("before", "after"):
        for writer in (model, twin):
            answers[f"{writer.name}, the line {way}"] = asked(args, writer, questions, way)
    answers[f"{twin.name}, the line before, by Bayes"] = asked(args, twin, questions, "bayes")
    return {"questions": len(questions), "choices": CHOICES, "results": answers}


def line_pairs(args, tokenizer) -> list[tuple[list[list[int]], list[list[int]]]]:
    """For each question the right line before and three of other texts, and likewise the lines after: ids."""
    pairs = []
    for text in read_documents(args.stories):
        lines = [match.group() for match in LINE.finditer(text)]
        at = len(lines) // 2
        if len(lines) >= 4 and lines[at] + " " + lines[at + 1] in text.replace("\n", " "):
            pairs.append([tokenizer(" " + part, add_special_tokens=False)["input_ids"] for part in lines[at : at + 2]])
    generator = np.random.default_rng(args.seed)
    picked = generator.permutation(len(pairs))[: args.questions]
    questions = []
    for place in picked.tolist():
        others = generator.choice([i for i in range(len(pairs)) if i != place], CHOICES - 1, replace=False)
        chosen = [place, *others.tolist()]
        questions.append(([pairs[i][0] for i in chosen], [pairs[i][1] for i in chosen]))
    return questions


def asked(args, writer: Pretrained, questions, way: str) -> dict:
    """Accuracy over questions and the gain of the right candidate, with errors."""
    first, given, alone = prompt_of(writer), [], []
    for number, (befores, afters) in enumerate(questions):
        line, candidates = (afters[0], befores) if way != "after" else (befores[0], afters)
        for candidate in candidates:
            if way == "bayes":  # the line, after each candidate
                given.append(example(first + candidate, line, [], number))
                alone.append(example(first, line, [], number))
            elif way == "before" and not writer.autoregressive:
                given.append(example(first, candidate, line, number))
                alone.append(example(first, candidate, [], number))
            else:
                given.append(example(first + line, candidate, [], number))
                alone.append(example(first, candidate, [], number))
    values = twin_values if writer.autoregressive else model_bounds
    cond, uncond = values(args, writer, given), values(args, writer, alone)
    gains = np.array([before.nats - after.nats for after, before in zip(cond, uncond, strict=True)])
    gains = gains.reshape(-1, CHOICES)
    tokens = np.array([one.tokens for one in cond]).reshape(-1, CHOICES)
    right = Measure.of((gains.argmax(axis=1) == 0).astype(float).tolist())
    gain = Measure.of((gains[:, 0] / tokens[:, 0]).tolist())
    return {"accuracy": vars(right), "gain": vars(gain)}


# -------------------------------------------------------------------------------------------------------- what they use


def prompt_of(writer: Pretrained) -> list[int]:
    """What every text begins with: begin-of-text, where the tokenizer has one."""
    bos = writer.tokenizer.bos_token_id
    return [] if bos is None else [bos]


def example(before: list[int], target: list[int], after: list[int], index: int) -> Example:
    from dlm.data.examples import Example

    tokens = np.array([*before, *target, *after], dtype=np.int64)
    place = np.arange(len(tokens))
    return Example(tokens, (place >= len(before)) & (place < len(before) + len(target)), index)


def model_bounds(args, writer: Pretrained, examples: list[Example]) -> list[Bound]:
    from dlm.objectives.likelihood import LikelihoodConfig, bound

    config = LikelihoodConfig(draws=16, seed=args.seed, batch_size=8 * args.batch_size)
    return bound(writer.model, examples, config, mask_id=writer.mask_id)


def twin_values(args, writer: Pretrained, examples: list[Example]) -> list[Bound]:
    from dlm.models.attention import causal
    from dlm.objectives.likelihood import likelihood

    def logits(tokens, valid, keep):
        return writer.model.predict(tokens, visible=causal, logits_to_keep=keep)

    return likelihood(logits, examples, device=writer.model.device, batch_size=args.batch_size)


def per_token(bounds: list[Bound]) -> Measure:
    """The mean nats a token over examples of one length, and its error over them."""
    return Measure.of([one.per_token for one in bounds])


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------- the script


PARTS = {
    "likelihood": likelihoods,
    "texts": texts,
    "latency": latencies,
    "infilling": infilling,
    "reversal": reversal,
}


def run(args, argv: list[str]) -> int:
    """Every part that is not yet in the results file, then the table."""
    import torch

    from dlm.evaluation.generations import open_writer

    model, twin = open_writer(args.model), open_writer(args.twin)
    if model.autoregressive or not twin.autoregressive:
        wrong, kind = (model, "autoregressive") if model.autoregressive else (twin, "a diffusion model")
        raise ValueError(f"{wrong.name} is {kind}: --model takes the diffusion model and --twin the autoregressive one")
    if model.tokenizer.get_vocab() != twin.tokenizer.get_vocab():
        raise ValueError(f"{model.name} and {twin.name} have different vocabularies: a twin has the same")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "batch_size")}
    settings |= {"weights": [model.digest, twin.digest]}
    made = {"settings": settings, "parts": {}}
    out = Path(args.out)
    if out.is_file():
        before = json.loads(out.read_text(encoding="utf-8"))
        if before.get("settings") != json.loads(json.dumps(settings)):
            raise ValueError(f"--out {out} was made with other settings or weights: name another file")
        made = before
    made |= {
        "command": shlex.join(["python", "-m", "eval.compare", *argv]), "commit": commit(), "hardware": hardware(),
        "versions": versions(),
    }  # fmt: skip
    for name, part in PARTS.items():
        if name not in made["parts"]:
            began = time.perf_counter()
            with torch.inference_mode():
                got = part(args, model, twin)
            made["parts"][name] = {"results": got, "seconds": time.perf_counter() - began}
            write_json(out, made, indent=2)
    print(table({name: part["results"] for name, part in made["parts"].items()}))
    return 0


def table(parts: dict) -> str:
    """All results as Markdown."""
    lines = ["| text | model | bits per byte | nats per token |", "|---|---|---|---|"]
    for row in parts["likelihood"]:
        sign = "" if row["exact"] else "≤ "
        cells = [f"{sign}{number(row[name], 4)}" for name in ("bits_per_byte", "nats_per_token")]
        lines.append(f"| {row['text']} | {row['model']} | {cells[0]} | {cells[1]} |")
    got = parts["texts"]
    lines += ["", "| texts | judged perplexity | unigram entropy | distinct-2 | repetition | degenerate |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    rows = [("held-out text", got["held_out"])]
    for name, points in got["frontiers"].items():
        rows += [(f"{name} at {t:g}", point) for t, point in zip(got["temperatures"], points, strict=True)]
    for name, point in rows:
        digits = {"perplexity": 2, "entropy": 3, "distinct_2": 3, "repetition": 3, "degenerate": 3}
        lines.append(f"| {name} | " + " | ".join(number(point[key], n) for key, n in digits.items()) + " |")
    for name, at in got["at_the_entropy_of_held_out_text"].items():
        value = {"value": math.exp(at["value"]), "error": math.exp(at["value"]) * at["error"]} if at else None
        lines.append(f"| {name} at the entropy of held-out text | {number(value, 2) if value else 'outside'} | | | | |")
    lines += ["", "| one text, batch of 1 | ms per token | fastest to slowest |", "|---|---|---|"]
    for row in parts["latency"]:
        lines.append(f"| {row['setting']} | {row['ms_per_token']:.2f} | {row['fastest']:.2f} to {row['slowest']:.2f} |")
    got = parts["infilling"]
    lines += ["", f"| the middle {got['middle']} tokens | nats per token | tokens right |", "|---|---|---|"]
    for name, value in got["nats"].items():
        right = number(got["right"][name], 3) if name in got["right"] else ""
        lines.append(f"| {name} | {number(value, 3)} | {right} |")
    got = parts["reversal"]
    lines += [
        "",
        f"| one line of {got['choices']}, by its neighbour | accuracy | gain, nats per token |",
        "|---|---|---|",
    ]
    for name, row in got["results"].items():
        lines.append(f"| {name} | {number(row['accuracy'], 3)} | {number(row['gain'], 3)} |")
    return "\n".join(lines)


def number(value: dict, digits: int) -> str:
    return f"{value['value']:.{digits}f} ± {value['error']:.{digits}f}"


def main(argv: list[str] | None = None) -> int:
    """Run the script; a user's mistake is one line and exit code 2."""
    return guarded("dlm eval compare", lambda words: run(parse(words), words), argv)


if __name__ == "__main__":
    sys.exit(main())
