"""Tune: the fastest settings that write as well as one token a pass does, for a model, a task and a machine.

    dlm bench tune                                                       (the model that ships and its judge)
    dlm bench tune --model PATH --task gsm8k --keep 0.98 --budget 1800
    dlm bench tune --model PATH --judge Qwen/Qwen2.5-7B --write TUNED    (a copy of the checkpoint with these defaults)

Methods, block lengths, steps or thresholds and revisions are measured on a few questions; what is slow or clearly worse
is dropped and the rest measured on more. The choice is compared with the reference once more on fresh questions. A
run that was stopped goes on with the same command.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside benchmarks/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlm
from dlm.benchmarking.journal import Journal, check_output, journal_path, meta_path, read_journals, remove_results
from dlm.cli.asked import judge_of, questions_of
from dlm.cli.parser import Parser, shown_defaults
from dlm.cli.session import check_region, open_checkpoint, settings
from dlm.cli.workload import clock_of
from dlm.utils.names import check_name

if TYPE_CHECKING:
    from dlm.benchmarking.tune import Candidate, Outcome
    from dlm.checkpoints.pretrained import Pretrained
    from dlm.sampling.config import SamplingConfig

PROMPTS = Path(__file__).parent / "tune_prompts.txt"
TUNED = (
    "method", "block_length", "commit", "steps", "steps_per_block", "threshold", "factor", "entropy_bound", "revise",
    "edit_threshold", "edit_shadow", "max_post_passes", "verify_threshold",
)  # fmt: skip
BLOCKS = (8, 16, 32, 64)
BUDGET = 300.0


def parser(argv: Sequence[str]) -> Parser:
    made = Parser("bench tune", "[options]", __doc__)
    add = made.add_argument
    add("--out", default="runs/tune.json", metavar="FILE", help="results (default: runs/tune.json)")
    add("--fresh", action="store_true", help="begin again: what FILE and its journal hold is lost")
    add("--keep", type=float, default=0.98, metavar="X", help="share of the quality to keep (default: 0.98)")
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"of generating (default: {BUDGET:g})")
    add(
        "--write", nargs="?", const="", metavar="FOLDER",
        help="write the choice into the sampling defaults: of a copy in FOLDER, or of --model itself without one",
    )  # fmt: skip
    add("--clock", default="wall", choices=("wall", "cpu"), help="cpu: the process's own time, for a machine in use")
    group = made.add_argument_group("what is asked")
    group.add_argument("--prompts", metavar="FILE", help="one a line, or JSONL (default: 36 that come with dlm)")
    group.add_argument("--task", metavar="NAME", help="in place of prompts: sudoku, gsm8k, gsm8k:FILE, or FILE.jsonl")
    group.add_argument("--checker", metavar="COMMAND", help="for FILE.jsonl: reads JSON, prints true or false")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    group.add_argument("--confirm", type=int, metavar="N", help="questions held back for the end (default: a third)")
    group.add_argument("--chat", action="store_true", help="put questions into the checkpoint's chat template")
    group.add_argument("--judge", metavar="PATH", help="folder or hub id of a causal language model")
    group.add_argument("--judge-revision", metavar="NAME", help="branch, tag or commit of the judge")
    group = made.add_argument_group("what is searched (LIST: values with commas between them)")
    group.add_argument("--methods", metavar="LIST", help="default: all that suit the model")
    group.add_argument("--block-lengths", metavar="LIST", help="default: 8,16,32,64, or what the model was trained on")
    group.add_argument("--revisions", metavar="LIST", help="of none, edit, shadow, verify (default: none,edit,verify)")
    made.set_defaults(swept=TUNED)
    made.add_model()
    made.add_sampling(shown_defaults(argv), leave_out=TUNED)
    return made


def check(args) -> None:
    """Raises ValueError for options that cannot work."""
    if not 0 < args.keep <= 1:
        raise ValueError(f"--keep is {args.keep:g}: give a share of the quality, above 0 and at most 1")
    if not 0 < args.budget < float("inf"):
        raise ValueError(f"--budget is {args.budget:g}: give the seconds that may be spent generating, above 0")
    if args.judge == "none" and args.task is None:
        raise ValueError("--judge is none: without a judge or a --task nothing says which settings are good")
    if args.write == "" and args.model is None:
        raise ValueError("--write without a folder changes --model itself, and none is given: give --write FOLDER")
    if args.confirm is not None and args.confirm < 0:
        raise ValueError(f"--confirm is {args.confirm}: give 0 or more questions")


class Bench:
    """Measures candidates on questions, one text at a time, and keeps what a journal holds."""

    def __init__(
        self, opened: Pretrained, questions, canvases, sampling: SamplingConfig, appraiser, judging, journal, clock
    ):
        from dlm.benchmarking.grid import Runner

        self.opened, self.questions, self.canvases, self.sampling = opened, questions, canvases, sampling
        self.appraiser, self.judging, self.journal = appraiser, judging, journal
        self.clock, self.known = clock, {}
        self.ends = Runner.ends_of(opened.tokenizer, opened.model, sampling)
        self.warm: set = set()

    def remember(self, records: Sequence[dict]) -> None:
        """Takes what a journal holds of an earlier run."""
        from dlm.benchmarking.quality import finished

        cells = finished(records, self.judging)
        self.known |= {key: record for key, record in cells.items() if record["judged"]}

    def __call__(self, pairs: Sequence[tuple[Candidate, int]]) -> list[dict]:
        """A record for each (candidate, question): from the journal, or measured and judged now."""
        todo = [(one, question) for one, question in pairs if f"{one}|{question}" not in self.known]
        new = [self.measure(*pair) for pair in todo]
        for record in new:
            self.journal.append({"kind": "cell", "time": time.time(), **record})
        for record, fields in zip(new, self.appraiser.appraise(new) if new else [], strict=True):
            note = {"kind": "judgement", "time": time.time(), "key": record["key"]}
            self.journal.append(note | {"judging": self.judging, "fields": fields})
            self.known[record["key"]] = record | fields
        return [self.known[f"{one}|{question}"] for one, question in pairs]

    def settings_of(self, candidate: Candidate, question: int) -> SamplingConfig:
        return dataclasses.replace(self.sampling, **candidate.fields, seed=self.sampling.seed + question)

    def measure(self, candidate: Candidate, question: int) -> dict:
        began = self.clock()
        own = candidate.fields
        kind = (own["method"], own["block_length"], own.get("revise"), self.canvases[question].tokens.shape)
        if kind not in self.warm:
            self.generate(candidate, question)
            self.warm.add(kind)
        start = self.clock()
        out = self.generate(candidate, question)
        latency = self.clock() - start
        asked = self.questions[question]
        return {
            "key": f"{candidate}|{question}",
            "question": question,
            "latency": latency,
            "spent": self.clock() - began,
            "nfe": int(out.nfe[0]),
            "tokens_per_forward": int(self.canvases[question].masked.sum()) / int(out.nfe[0]),
            "answer": asked.answer(self.opened.tokenizer, out.canvas, self.ends),
            "token_ids": asked.written(out.canvas, self.ends),
        }

    def generate(self, candidate: Candidate, question: int, telemetry=None):
        from dlm.utils.hardware import synchronise

        model, canvas = self.opened.model, self.canvases[question]
        config = self.settings_of(candidate, question)
        out = dlm.generate(model, canvas, config, tokenizer=self.opened.tokenizer, telemetry=telemetry)
        synchronise(canvas.tokens.device)
        return out

    def watched(self, candidate: Candidate) -> dict:
        """Ties and the cache's error on the first question."""
        from dlm.sampling.telemetry import Telemetry

        telemetry = Telemetry()
        self.generate(candidate, 0, telemetry)
        return telemetry.facts()


def block_lengths(args, opened: Pretrained, length: int):
    """The block lengths that are tried with a method."""
    from dlm.sampling.methods import visibility

    try:
        given = [int(part) for part in args.block_lengths.split(",")] if args.block_lengths else None
    except ValueError:
        raise ValueError(f"--block-lengths is {args.block_lengths!r}: give whole numbers, as in 8,32") from None

    def of(method: str) -> list[int]:
        if given is None and opened.block_length is not None:
            try:
                visibility(opened.model, method, 2 * opened.block_length + 1)
            except ValueError:  # trained with one length alone
                return [opened.block_length]
        return sorted({min(block, length) for block in given or BLOCKS})

    return of


def revisions_of(args, opened: Pretrained) -> list[dict]:
    """Fields of SamplingConfig of each revision that is tried. Errors: a name that is none."""
    from dlm.benchmarking.tune import REVISIONS

    names = args.revisions.split(",") if args.revisions else ["none", "edit", "verify"]
    for name in names:
        check_name("revisions", name, REVISIONS)
    shifted = getattr(opened.config, "shift_logits", False)
    return [REVISIONS[name] for name in names if not (shifted and name in ("shadow", "verify"))]


def main(argv: Sequence[str]) -> int:
    args = parser(argv).parse(argv)
    check(args)
    from dlm.benchmarking.quality import Appraiser
    from dlm.benchmarking.tune import Search, candidates, chosen, feasible, machine_here, predicted
    from dlm.checkpoints.defaults import check_writable
    from dlm.sampling.methods import methods_for

    out = check_output(args.out)
    questions = questions_of(args, PROMPTS)
    held = len(questions) // 3 if args.confirm is None else args.confirm
    count = len(questions) - held
    if count < 2:
        raise ValueError(
            f"{count} of {len(questions)} questions are left to search on: give more, or a lower --confirm"
        )
    opened = open_checkpoint(args, model=True)
    hub = str(opened.folder) != opened.path and args.model is not None
    if args.write is not None:
        check_writable(opened.folder, Path(args.write or opened.folder), hub=hub)
    own = {name: value for name, value in opened.defaults.items() if name not in TUNED}
    sampling, device = settings(args, own), opened.model.device
    check_region(opened, sampling.gen_length, "--gen-length")
    canvases = [
        one.canvas(opened.tokenizer, sampling.gen_length, opened.mask_id, chat=args.chat, device=device)
        for one in questions
    ]
    places = max(int(canvas.masked.sum()) for canvas in canvases)
    sampling = dataclasses.replace(sampling, gen_length=places)
    methods = args.methods.split(",") if args.methods else methods_for(opened.config)
    for method in methods:
        check_name("method", method, methods_for(opened.config))
    reference, others = candidates(sampling, methods, block_lengths(args, opened, places), revisions_of(args, opened))
    others = [one for one in others if feasible(opened.model, canvases, sampling, one)]
    prompt = max(int(canvas.valid.sum()) for canvas in canvases) - places
    machine = machine_here(device, opened.model.dtype, opened.number_type)
    cost = {
        one: predicted(one, opened.config, machine, opened.number_type, places, prompt) for one in [reference, *others]
    }
    faster = [one for one in others if cost[one] < cost[reference]]
    left_out = len(others) - len(faster)
    print(f"{len(others)} candidates, {left_out} of them left out: slower than the reference by the cost model")
    judge = None if args.task is not None and args.judge is None else judge_of(args, opened)
    fixed = {
        "dlm": dlm.__version__, "model": opened.name, "revision": opened.digest, "dtype": opened.number_type,
        "device": device.type, "clock": args.clock, "task": args.task, "chat": args.chat, "reference": reference.fields,
        "sampling": {k: v for k, v in dataclasses.asdict(sampling).items() if k not in TUNED},
        "questions": [question.text for question in questions],
    }  # fmt: skip
    records = [] if args.fresh else read_journals(out, fixed)
    journal = Journal(journal_path(out, 0), fixed, args.fresh)
    if args.fresh:
        remove_results(out, 1)
    appraiser = Appraiser(opened.model, questions, canvases, judge, 0, args.chat)
    judging = {"judge": judge.facts if judge else None, "checker": args.checker}
    prose = all(question.prose for question in questions)
    bench = Bench(opened, questions, canvases, sampling, appraiser, judging, journal, clock_of(args))
    bench.remember(records)
    search = Search(bench, count, args.keep, args.budget, prose, lambda line: print(line, file=sys.stderr, flush=True))
    try:
        outcomes = search.run(reference, faster)
        choice = chosen(outcomes, args.keep)
        again = confirmed(bench, reference, choice.candidate, range(count, len(questions)), prose) if held else None
        watched = {str(one): bench.watched(one) for one in dict.fromkeys((reference, choice.candidate))}
    except KeyboardInterrupt:
        print(f"stopped. Go on with:\n  {shlex.join(['dlm', 'bench', 'tune', *argv])}", file=sys.stderr)
        return 130
    finally:
        journal.close()
    accuracy = all(question.check for question in questions)
    report(outcomes, choice, again, watched, args.keep, search, accuracy)
    write(out, argv, fixed, judging, outcomes, choice, again, watched, args, search, accuracy)
    return finish(args, opened, sampling, choice, again, hub)


def confirmed(bench: Bench, reference: Candidate, choice: Candidate, fresh: range, prose: bool) -> Outcome:
    """The choice on questions that the search did not see."""
    from dlm.benchmarking.tune import outcome

    theirs, mine = (bench([(one, question) for question in fresh]) for one in (reference, choice))
    return outcome(choice, mine, theirs, prose)


def verdict(one: Outcome, keep: float) -> str:
    """Whether fresh questions say that the quality is kept: yes, perhaps or no."""
    return "yes" if one.keeps(keep) else "perhaps" if one.keeps(keep, slack=2.0) else "no"


def line(one: Outcome, accuracy: bool) -> str:
    """A row of the table."""
    quality = 100 * one.quality.value if accuracy else 2.718281828459045**-one.quality.value
    varied = "" if one.varied is None else f"  entropy {100 * one.varied:5.1f}%"
    return (
        f"{1000 * one.latency.value:8.1f} ms  {one.tokens.value:5.2f} tokens/pass  "
        f"{'accuracy' if accuracy else 'perplexity'} {quality:6.2f}  "
        f"kept {100 * one.kept.value:5.1f}% ± {100 * one.kept.error:.1f}{varied}  n {one.questions:3d}  {one.candidate}"
    )


def report(outcomes, choice, again, watched, keep: float, search, accuracy: bool) -> None:
    """Prints the front, the curves with the largest AUP, the choice and whether fresh questions confirm it."""
    from dlm.benchmarking.tune import curves, front

    print("the reference:\n " + line(outcomes[0], accuracy))
    print("the front (nothing is faster and better):")
    for one in front(outcomes):
        print(" " + line(one, accuracy))
    print("AUP (d3LLM's area under accuracy against tokens a pass" + (")" if accuracy else "; of the quality kept)"))
    for each in curves(outcomes, accuracy)[:5]:
        print(f"  {each['aup']:8.1f}  {each['curve']} ({each['points']} points)")
    for name, facts in watched.items():
        error = "no cache" if facts["cache_rms"] is None else (
            f"cache error {facts['cache_rms']:.2g}, same first token {100 * facts['cache_same']:.1f}%"
        )  # fmt: skip
        print(f"{name}: {100 * (facts['ties'] or 0):.2f}% of the commits within rounding of a tie, {error}")
    print(f"the choice, the fastest that keeps {keep:.0%}:\n " + line(choice, accuracy))
    if search.stopped:
        print("the budget was spent before all rungs were measured: a larger --budget goes on from here")
    if again is not None:
        print(f"on {again.questions} fresh questions: {verdict(again, keep)}\n " + line(again, accuracy))


def write(out: Path, argv, fixed, judging, outcomes, choice, again, watched, args, search, accuracy: bool) -> None:
    """Writes the results file and what stands beside it."""
    from dlm.benchmarking.tune import curves, front
    from dlm.utils.files import write_json
    from dlm.utils.hardware import commit, hardware, versions
    from dlm.utils.jsonio import finite

    results = {
        "reference": outcomes[0].record(),
        "choice": choice.record(),
        "confirmation": None if again is None else again.record() | {"confirmed": verdict(again, args.keep)},
        "keep": args.keep,
        "front": [str(one.candidate) for one in front(outcomes)],
        "aup": curves(outcomes, accuracy),
        "telemetry": watched,
        "outcomes": [one.record() for one in outcomes],
    }
    meta = {
        "command": shlex.join(["dlm", "bench", "tune", *argv]), "settings": fixed | judging, "budget": args.budget,
        "spent": search.spent, "commit": commit(), "hardware": hardware(), "versions": versions(),
    }  # fmt: skip
    write_json(out, finite(results), indent=1)
    write_json(meta_path(out), meta, indent=1)
    print(f"wrote {out}")


def finish(args, opened: Pretrained, sampling: SamplingConfig, choice: Outcome, again, hub: bool) -> int:
    """Writes the choice into the sampling defaults where that was asked for; returns the exit code."""
    if args.write is None:
        return 0
    if again is not None and verdict(again, args.keep) == "no":
        print("fresh questions do not confirm the choice, so the sampling defaults are not changed")
        return 1
    from dlm.checkpoints.defaults import write_defaults

    fields = {"gen_length": sampling.gen_length} | choice.candidate.fields
    folder = write_defaults(opened.folder, Path(args.write or opened.folder), fields, hub=hub)
    print(f"wrote the sampling defaults of {folder}")
    return 0


if __name__ == "__main__":
    from dlm.cli.main import main as command

    sys.exit(command(["bench", "tune", *sys.argv[1:]]))
