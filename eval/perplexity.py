"""Perplexity and bits per byte of texts, each with its error: bounds of diffusion models, exact of autoregressive ones.

dlm eval perplexity --data wikitext2.txt                              (the model that ships)
dlm eval perplexity --data a.txt b.jsonl --model mine gpt2 --wrap --detokenizer wikitext --out ppl.json
accelerate launch eval/perplexity.py …                                (any number of processes: the same numbers)

With --out what is done is kept beside it, and the same command goes on after a kill.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):  # `accelerate launch eval/perplexity.py` from a clone: find dlm/ beside eval/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.cli.parser import Parser
from dlm.cli.scripts import guarded
from dlm.utils.distributed import leave_processes
from dlm.utils.files import write_json
from dlm.utils.names import check_name

PATTERNS = {"decoding": "chain"}  # what is masked when a token is scored: the estimator that draws it
LENGTH = 1024  # tokens of a window, where the models read as many


def parse(argv: list[str]):
    """The options of a command line."""
    parser = Parser("eval perplexity", "--data PATH ... [options]", __doc__)
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="PATH", help=".txt, .jsonl (.xz), .parquet, or hf:NAME")
    add("--model", nargs="+", default=[None], metavar="PATH", help="folders or hub ids (default: the one that ships)")
    add("--out", metavar="FILE", help="write the results there as JSON, and go on from what is done")
    parser.writes(out="json")
    windows = parser.add_argument_group("windows")
    add = windows.add_argument
    add(
        "--length",
        type=int,
        metavar="N",
        help=f"tokens of a window (default: what every model reads, {LENGTH} at most)",
    )
    add("--wrap", action="store_true", help="documents end to end, not one by one")
    add("--overlap", type=int, default=0, metavar="N", help="tokens before a window that are given, not scored")
    add("--bos", default="auto", metavar="NAME", help="auto, none, document or window: begin-of-text, not scored")
    add("--eos", default="document", metavar="NAME", help="document or none: end-of-text after each document, scored")
    add("--detokenizer", default="none", metavar="NAME", help="none, ptb, wikitext, lm1b or lambada")
    add("--column", default="text", metavar="NAME", help="where rows hold the text; several: a,b (default: text)")
    add("--split", default="test", metavar="NAME", help="of a data set of the hub (default: test)")
    add("--max-bytes", type=int, metavar="N", help="the first N bytes of a corpus alone")
    noise = parser.add_argument_group("bounds")
    add = noise.add_argument
    add("--estimator", metavar="NAME", help="count (default), uniform, stratified, chain or block")
    add(
        "--pattern",
        metavar="NAME",
        help="decoding: clean text before a token, it and all after it masked, as left-to-right decoding shows it; the "
        "same as estimator chain, comparable with what an autoregressive model says of the same text",
    )
    add("--visibility", metavar="NAME", help="full (default) or block_causal, of a model trained under both")
    add("--draws", type=int, default=2, metavar="N", help="for each window (default: 2)")
    add(
        "--target-error",
        type=float,
        metavar="X",
        help="draw until a corpus's standard error is this, in nats per token",
    )
    add("--block-length", type=int, metavar="N", help="of estimator block")
    add("--seed", type=int, default=0, metavar="N", help="of the noise")
    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--batch-size", type=int, default=16, metavar="N", help="windows of a forward pass (default: 16)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    add("--dtype", default="auto", help="float32, bfloat16, float16, int8, fp8 (default: as saved)")
    add("--also-dtype", metavar="NAME", help="score in this type too: what rounding alone changes")
    return parser.parse(argv)


def run(args, argv: list[str]) -> int:
    """Score every corpus under every model, print a table, and write the JSON."""
    from accelerate import PartialState

    from dlm.data.windows import CorpusConfig, load_corpus
    from dlm.evaluation.perplexity import Store, open_scorer, score_corpus, store_folder, summarise, unscored_bytes
    from dlm.objectives.likelihood import LikelihoodConfig

    if args.target_error is not None and not args.target_error > 0:
        raise ValueError(f"target_error is {args.target_error}: it is a standard error in nats per token, above 0")
    config = LikelihoodConfig(
        estimator_of(args), args.draws, args.block_length, seed=args.seed, batch_size=args.batch_size,
        visibility=args.visibility,
    )  # fmt: skip
    state = PartialState(cpu=args.device == "cpu")
    device = args.device or str(state.device)
    report = None if not state.is_main_process else lambda line: print(line, file=sys.stderr, flush=True)
    types = [args.dtype] if args.also_dtype is None else [args.dtype, args.also_dtype]
    scorers = [open_scorer(path, device=device, dtype=dtype) for path in args.model for dtype in types]
    for scorer in scorers:
        if args.length is not None and scorer.limit is not None and args.length > scorer.limit:
            raise ValueError(f"--length is {args.length}: {scorer.name} reads {scorer.limit} tokens at most")
    length = args.length or min([LENGTH, *(scorer.limit for scorer in scorers if scorer.limit)])
    rows, folders = [], []
    for path in args.data:
        for scorer in scorers:
            form = CorpusConfig(
                length, args.wrap, args.overlap, args.bos, args.eos, args.detokenizer, args.column, args.split,
                args.max_bytes,
            )  # fmt: skip
            corpus = load_corpus(path, scorer.tokenizer, form)
            store = Store.open(store_folder(args.out, scorer, corpus, config))
            began = time.perf_counter()
            bounds = score_corpus(
                scorer, corpus, config, state=state, store=store, target_error=args.target_error, report=report
            )
            size = corpus.bytes - unscored_bytes(scorer, corpus)
            score = summarise(bounds, corpus, size, time.perf_counter() - began)
            own = {"corpus": str(path), "model": scorer.name, "exact": scorer.exact, "weights": scorer.digest}
            own["dtype"] = scorer.dtype
            shape = {"documents": corpus.documents, "windows": len(corpus.examples), "bos": corpus.bos}
            rows.append(own | score.record() | shape)
            folders.append(store.folder)
            if state.is_main_process:
                print(line(rows[-1], header=len(rows) == 1), flush=True)
                if args.also_dtype is not None and len(rows) % 2 == 0:
                    rows[-1]["change"] = rows[-1]["nats_per_token"]["value"] - rows[-2]["nats_per_token"]["value"]
                    print(f"{rows[-1]['dtype']} for {rows[-2]['dtype']}: {rows[-1]['change']:+.2e} nats a token")
                if (words := remark(rows[-1])) is not None:
                    print(words, file=sys.stderr, flush=True)
    if args.out and state.is_main_process:
        write(args.out, argv, {"length": length} | {"likelihood": asdict(config)} | vars(args), rows)
        shutil.rmtree(f"{args.out}.parts", ignore_errors=True)
    state.wait_for_everyone()
    leave_processes()
    return 0


def estimator_of(args) -> str | None:
    """The estimator that the options name. Errors: a pattern that is none, or another estimator beside it."""
    if args.pattern is None:
        return args.estimator
    check_name("pattern", args.pattern, PATTERNS)
    if args.estimator not in (None, PATTERNS[args.pattern]):
        raise ValueError(
            f"--pattern {args.pattern} is estimator {PATTERNS[args.pattern]}, and --estimator is {args.estimator}: "
            f"give one of them"
        )
    return PATTERNS[args.pattern]


def cut(name: str, wide: int) -> str:
    """A name without its middle where it is longer than its column."""
    return name if len(name) <= wide else f"{name[: wide // 2 - 1]}…{name[-(wide - wide // 2) :]}"


def line(row: dict, header: bool) -> str:
    """A row of the table: bounds are marked <=, every number has the error of its noise, "-" where there is none."""
    sign = " " if row["exact"] else "≤"
    cells = []
    for name, digits in (("nats_per_token", 4), ("perplexity", 2), ("bits_per_byte", 4)):
        value, error = row[name]["value"], row[name]["error"]
        form = f".{digits}f" if value < 1e5 else ".3e"
        cells.append(f"{sign}{value:{form}} ± {'-' if math.isnan(error) else format(error, form)}")
    sampling = row["nats_per_token"]["sampling_error"]
    text = (
        f"{cut(Path(row['corpus']).name, 28):<28} {cut(row['model'], 32):<32} {cells[0]:>18} {cells[1]:>22} "
        f"{cells[2]:>18} {'-' if math.isnan(sampling) else f'{sampling:.4f}':>8} {row['tokens']:>11,} "
        f"{row['evaluations']:>11,} {row['seconds']:>8.1f}"
    )
    head = (
        f"{'corpus':<28} {'model':<32} {'nats/token':>18} {'perplexity':>22} {'bits/byte':>18} {'sampling':>8} "
        f"{'tokens':>11} {'passes':>11} {'seconds':>8}\n"
    )
    return head + text if header else text


def remark(row: dict) -> str | None:
    """Why a row has no error, in a line; None where it has both."""
    if math.isnan(row["nats_per_token"]["error"]):
        return f"no error of the noise for {Path(row['corpus']).name}: it needs two draws of it, give --draws 2 or more"
    if not math.isnan(row["nats_per_token"]["sampling_error"]):
        return None
    from dlm.data.sources import SEPARATOR

    what = "one document" if row["documents"] == 1 else "one window"
    return (
        f"no sampling error for {Path(row['corpus']).name}: it is {what}, and the error needs two or more (a line "
        f"{SEPARATOR} ends a document of a .txt file; in .jsonl each line is one)"
    )


def write(out: str, argv: list[str], settings: dict, rows: list[dict]) -> None:
    """The results, with all that is needed to get them again; the file appears whole or not at all."""
    from dlm.utils.hardware import commit, hardware, versions

    made = {
        "command": shlex.join(["python", "-m", "eval.perplexity", *argv]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "settings": settings,
        "results": rows,
    }
    write_json(Path(out), made, indent=2)


def main(argv: list[str] | None = None) -> int:
    """Run the script; a user's mistake is one line and exit code 2."""
    return guarded("dlm eval perplexity", lambda words: run(parse(words), words), argv)


if __name__ == "__main__":
    sys.exit(main())
