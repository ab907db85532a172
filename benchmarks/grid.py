"""The grid: methods x block lengths x steps on your prompts, with latency, perplexity and what perplexity hides.

    dlm bench grid                                                        (the model that ships; some minutes)
    dlm bench grid --methods none,dual,c2f --gen-length 128 --prompts questions.txt --out runs/grid.json
    dlm bench grid --model GSAI-ML/LLaDA-8B-Instruct --chat --judge Qwen/Qwen2.5-7B --gen-length 512
    accelerate launch benchmarks/grid.py ...                              (cells are shared out over all processes)

Every cell is on the disk before the next one begins: Ctrl-C or a kill loses one cell at most, and the same command
goes on. With another --judge the answers that are there are judged anew, and nothing is measured again.
Then: dlm bench plot runs/grid.json
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # `accelerate launch benchmarks/grid.py` from a clone: find dlm/ beside benchmarks/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlm
from dlm.benchmarking.journal import Journal, check_output, journal_path, read_journals, remove_results
from dlm.cli.asked import judge_of, questions_of
from dlm.cli.parser import Parser, check_least, shown_defaults
from dlm.cli.session import as_options, check_region, open_checkpoint, settings
from dlm.sampling.config import SamplingConfig
from dlm.utils.distributed import Sharing, leave_processes

if TYPE_CHECKING:
    from dlm.benchmarking.grid import GridConfig
    from dlm.checkpoints.pretrained import Pretrained
    from dlm.evaluation.tasks import Question

PROMPTS = Path(__file__).parent / "prompts.txt"
SWEPT = ("steps", "block_length", "method", "commit", "threshold", "factor", "entropy_bound")
GEN_LENGTH = 64  # where neither the options nor anything else says


def parser(argv: Sequence[str]) -> Parser:
    made = Parser("bench grid", "[options]", __doc__)
    made.add_argument("--out", default="runs/grid.json", metavar="FILE", help="results (default: runs/grid.json)")
    made.add_argument("--fresh", action="store_true", help="begin again: what FILE and its journal hold is lost")
    group = made.add_argument_group("what is swept (LIST: values with commas between them)")
    group.add_argument("--gen-length", type=int, metavar="N", help=f"tokens to generate (default: {GEN_LENGTH})")
    group.add_argument("--methods", metavar="LIST", help="default: all that suit the model")
    group.add_argument("--block-lengths", metavar="LIST", help="default: powers of two up to --gen-length")
    group.add_argument("--steps", dest="passes", metavar="LIST", help="default: powers of two up to --gen-length")
    group.add_argument("--commits", default="quota", metavar="LIST", help="quota, threshold:0.9, factor:1.0, ...")
    group.add_argument("--prompts", metavar="FILE", help="one a line, or JSONL (default: three that come with dlm)")
    group.add_argument("--task", metavar="NAME", help="in place of prompts: sudoku, gsm8k, gsm8k:FILE, or FILE.jsonl")
    group.add_argument("--checker", metavar="COMMAND", help="for FILE.jsonl: reads JSON, prints true or false")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    group.add_argument("--chat", action="store_true", help="put questions into the checkpoint's chat template")
    group = made.add_argument_group("how it is measured")
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="timed generations a cell (default: 3)")
    group.add_argument(
        "--judge", metavar="PATH", help="folder, hub id or GGUF file of a causal language model, or none"
    )
    group.add_argument("--judge-revision", metavar="NAME", help="branch, tag or commit of the judge")
    group.add_argument(
        "--bound-draws", type=int, default=8, metavar="N", help="for bound_per_token; 0: none (default: 8)"
    )
    made.set_defaults(swept=SWEPT)
    made.add_model()
    made.add_sampling(shown_defaults(argv), leave_out=(*SWEPT, "gen_length"))
    return made


def numbers(text: str | None, option: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """A comma separated list of whole numbers. Errors: anything else in it."""
    if text is None:
        return default
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} is {text!r}: give whole numbers with commas between them, as in 4,16") from None


def sampling_of(args, opened: Pretrained) -> SamplingConfig:
    """What is not swept: the options, then our length, then the checkpoint's own defaults."""
    own = {name: value for name, value in opened.defaults.items() if name not in SWEPT}
    return settings(args, own if args.gen_length else own | {"gen_length": GEN_LENGTH})


def configure(args, opened: Pretrained, sampling: SamplingConfig, places: int) -> GridConfig:
    """The GridConfig of the options. places: most that a canvas has to fill, to which the default lists go."""
    from dlm.benchmarking.grid import GridConfig, powers_of_two
    from dlm.sampling.methods import METHODS, methods_for

    counting = [name for name in methods_for(opened.config) if not METHODS[name].several]  # suits commit quota
    powers, trained = powers_of_two(places), opened.block_length
    try:
        return GridConfig(
            methods=tuple((args.methods or ",".join(counting)).split(",")),
            commits=tuple(args.commits.split(",")),
            block_lengths=numbers(args.block_lengths, "--block-lengths", powers if trained is None else (trained,)),
            steps=numbers(args.passes, "--steps", powers),
            sampling=sampling,
            repeats=args.repeats,
        )
    except ValueError as error:
        raise ValueError(as_options(str(error))) from error


def fixed_settings(args, opened: Pretrained, config: GridConfig, questions: list[Question]) -> dict:
    """What was measured: a run that goes on must have the same."""
    model = opened.model
    return {
        "dlm": dlm.__version__,
        "model": opened.name,
        "revision": opened.digest,
        "dtype": opened.number_type,
        "device": model.device.type,
        "attn_implementation": model.config._attn_implementation,
        **{name: value for name, value in dataclasses.asdict(config).items() if name != "sampling"},
        "sampling": {k: v for k, v in dataclasses.asdict(config.sampling).items() if k not in SWEPT},
        "task": args.task,
        "chat": args.chat,
        "questions": [question.text for question in questions],
    }


def main(argv: Sequence[str]) -> int:
    args = parser(argv).parse(argv)
    from dlm.benchmarking.grid import Runner, plan
    from dlm.benchmarking.quality import Appraiser
    from dlm.benchmarking.sweep import sweep, told_apart, write_results

    check_least(args, 0, "bound_draws")
    out = check_output(args.out)
    questions = questions_of(args, PROMPTS)
    sharing = Sharing(cpu=args.device == "cpu")
    args.device = args.device or sharing.device
    opened = open_checkpoint(args, model=True)
    model, tokenizer, sampling = opened.model, opened.tokenizer, sampling_of(args, opened)
    check_region(opened, sampling.gen_length, "--gen-length")
    canvases = [
        question.canvas(tokenizer, sampling.gen_length, opened.mask_id, chat=args.chat, device=model.device)
        for question in questions
    ]
    config = configure(args, opened, sampling, max(int(canvas.masked.sum()) for canvas in canvases))
    cells, left_out = plan(model, canvases, config)
    judge = judge_of(args, opened)
    fixed = fixed_settings(args, opened, config, questions)
    judging = {"judge": judge.facts if judge else None, "bound_draws": args.bound_draws, "checker": args.checker}
    records = [] if args.fresh else told_apart(sharing.gather(read_journals(out, fixed)))
    journal = Journal(journal_path(out, sharing.rank), fixed, args.fresh)
    if args.fresh:
        sharing.gather([])  # every process has locked its journal
        if sharing.rank == 0:
            remove_results(out, sharing.size)
        sharing.gather([])
    again = shlex.join(["dlm", "bench", "grid", *(word for word in argv if word != "--fresh")])
    try:
        runner = Runner(model, tokenizer, questions, canvases, config)
        appraiser = Appraiser(model, questions, canvases, judge, args.bound_draws, args.chat)
        records += sharing.gather(sweep(cells, records, runner, appraiser, journal, sharing, judging, again))
        code = 0
    except KeyboardInterrupt:
        records, code = read_journals(out, fixed), 130
    finally:
        journal.close()
    if sharing.rank == 0:
        done = write_results(out, records, cells, left_out, questions, fixed, judging)
        if code:
            measured = sum(record["kind"] == "cell" for record in records)
            print(
                f"stopped: {measured} of {len(cells)} cells are measured and kept, {done} of them judged and in {out}. "
                f"Go on with:\n  {again}",
                file=sys.stderr,
            )
        else:
            print(f"wrote {out}: {done} cells, {len(left_out)} settings left out. Now: dlm bench plot {out}")
    leave_processes(failed=code != 0)
    return code


if __name__ == "__main__":
    from dlm.cli.main import main as command

    sys.exit(command(["bench", "grid", *sys.argv[1:]]))
