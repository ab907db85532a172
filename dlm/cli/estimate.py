"""`dlm train --estimate`: the memory and the time of a training run, and what fits on the GPUs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from dlm.models.flops import PEAKS, peak_flops
from dlm.objectives.config import AS_MODEL, OBJECTIVE_NAMES
from dlm.training.config import BOTH_SHARE
from dlm.training.estimate import (
    GB,
    LLADA_8B,
    MEMORY,
    MFU,
    RECIPES,
    SHARDING,
    USABLE,
    Estimate,
    estimate,
    work_of,
)
from dlm.utils.jsonio import to_json
from dlm.utils.settings import OptionParser, flag

MOST_GPUS, MOST_ROWS = 4096, 4096


def options() -> OptionParser:
    """The options of the command."""
    text = "Memory and time of a training run, and what fits. Without --model and shape: LLaDA-8B."
    parser = OptionParser("dlm train --estimate", text, "%(prog)s [options]")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", metavar="FOLDER", help="a checkpoint, or any folder with its config.json")
    for name, value in LLADA_8B.items():
        add(flag(name), type=int, metavar="N", help=f"shape in place of the model's ({value})")
    add("--n-kv-heads", type=int, metavar="N", help="shape: heads of keys and values (as many as heads)")
    add("--weight-tying", action=argparse.BooleanOptionalAction, help="one table for input and output")
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--tokens", type=float, default=2.3e12, metavar="N", help="to train on, in all (2.3e12)")
    add("--sequence-length", type=int, default=4096, metavar="N", help="tokens of a row (4096)")
    add("--rows", type=int, default=1, metavar="N", help="rows of one micro-batch on one GPU (1)")
    add("--recipe", choices=RECIPES, default="pretrain", metavar="NAME", help=_names(RECIPES))
    add("--lora", type=int, default=0, metavar="N", help="rank of adapters; 0: all weights are trained (0)")
    add("--draws", type=int, default=8, metavar="N", help="preference: noise draws of an answer (8)")
    add("--steps", type=int, default=128, metavar="N", help="grpo: passes that write an answer (128)")
    add("--passes", type=int, default=1, metavar="N", help="grpo: passes that learn from it, more for a trace (1)")
    add("--inner", type=int, default=1, metavar="N", help="grpo: optimizer steps that use the same answers (1)")
    add("--no-kl", action="store_true", help="grpo: without a reference")
    add("--teacher-passes", type=int, default=0, metavar="N", help="distill: 2 for sdtt, 1 for consistency (0)")
    add(
        "--objective", choices=(*OBJECTIVE_NAMES, AS_MODEL), metavar="NAME",
        help=f"{', '.join(OBJECTIVE_NAMES)}, or that of the model (pretrain: diffusion, else the model's)",
    )  # fmt: skip
    add("--optimizer", choices=("adamw", "muon"), default="adamw", metavar="NAME", help="adamw, muon (adamw)")
    add("--sharding", choices=SHARDING, default="none", metavar="NAME", help="none (DDP), zero2, fsdp (also ZeRO-3)")
    add("--activation-checkpointing", action="store_true", help="less memory, a third more arithmetic")
    add("--no-ema", action="store_true", help="no moving average of the weights")
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="how many (1)")
    add("--gpu", default="H100", metavar="NAME", help=f"{', '.join(PEAKS)} (H100)")
    add("--gpu-memory", type=float, metavar="GB", help="of one GPU (by its name)")
    add("--mfu", type=float, default=MFU, metavar="X", help=f"share of the GPU's peak that is reached ({MFU})")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def _names(names: Sequence[str]) -> str:
    return f"{', '.join(names)} ({names[0]})"


def main(argv: Sequence[str]) -> int:
    """Runs the command. Raises ValueError for an unknown option or device, and for a folder without a config."""
    args = options().parse(argv)
    for name in ("tokens", "sequence_length", "rows", "gpus", "draws", "steps", "passes", "inner"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"{flag(name)} is {getattr(args, name)}: it must be above 0")
    for name in ("lora", "teacher_passes"):
        if getattr(args, name) < 0:
            raise ValueError(f"{flag(name)} is {getattr(args, name)}: it must not be negative")
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu is {args.mfu}: a share, above 0 and at most 1")
    peak = peak_flops(args.gpu)
    if peak is None:
        raise ValueError(f"--gpu {args.gpu!r} is not known: one of {', '.join(PEAKS)}")
    name = next(name for name, rate in PEAKS.items() if rate == peak and name in args.gpu)
    memory = MEMORY[name] if args.gpu_memory is None else args.gpu_memory
    if not memory > 0:
        raise ValueError(f"--gpu-memory is {memory}: it must be above 0")
    config = read_shape(args)
    objective, blocks = trained_for(args, config)
    work = work_of(
        args.recipe, lora=args.lora > 0, draws=args.draws, steps=args.steps, passes=args.passes, inner=args.inner,
        kl=not args.no_kl, teacher_passes=args.teacher_passes,
    )  # fmt: skip

    def run(**changes) -> Estimate:
        asked = {
            "gpus": args.gpus, "rows": args.rows, "sharding": args.sharding,
            "checkpointing": args.activation_checkpointing,
        } | changes  # fmt: skip
        return estimate(
            config, tokens=args.tokens, peak=peak, mfu=args.mfu, width=args.sequence_length, ema=not args.no_ema,
            optimizer=args.optimizer, blocks=blocks,
            predicted=1.0 if objective == "autoregressive" else 0.5, work=work, lora=args.lora, **asked,
        )  # fmt: skip

    result = run()
    fits, advice = what_fits(run, args, memory * GB)
    if args.json:
        print(to_json({**vars(result), "memory": result.memory, "fits": fits, "advice": advice}))
    else:
        print(table(result, args, advice))
    return 0


def trained_for(args, config) -> tuple[str, float]:
    """The objective of the run, and the share of its rows under block diffusion: half of them where it is that of a
    model of both visibilities."""
    objective = args.objective or ("diffusion" if args.recipe == "pretrain" else AS_MODEL)
    if objective != AS_MODEL:
        return objective, float(objective == "block_diffusion")
    if getattr(config, "block_length", None) is None:
        return config.objective, 0.0
    return config.objective, 1 - BOTH_SHARE if getattr(config, "full_attention", False) else 1.0


def what_fits(run: Callable[..., Estimate], args, memory: float) -> tuple[bool, str]:
    """(whether the run fits into `memory` bytes a GPU, one line that says so and what would fit)."""
    room = memory * USABLE
    needed = run().memory
    share = f"{needed / GB:,.1f} of {memory / GB:,.0f} GB"
    if needed <= room:
        low, high = args.rows, MOST_ROWS
        while low < high:  # the most rows that fit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if run(rows=middle).memory <= room else (low, middle - 1)
        return True, f"yes, {share}; up to {low} rows of {args.sequence_length} on a GPU"
    gpus = args.gpus
    while gpus <= MOST_GPUS:
        for sharding in SHARDING if args.sharding == "none" else (args.sharding,):
            for checkpointing in (args.activation_checkpointing, True):
                one = run(gpus=gpus, sharding=sharding, checkpointing=checkpointing)
                if one.memory <= room:
                    words = [f"--gpus {gpus}"] if gpus != args.gpus else []
                    words += [f"--sharding {sharding}"] if sharding != args.sharding else []
                    words += ["--activation-checkpointing"] if checkpointing > args.activation_checkpointing else []
                    return False, f"no, {share}; it does with {' '.join(words)} ({one.memory / GB:,.1f} GB)"
        gpus *= 2
    return False, f"no, {share}: take fewer --rows, a shorter --sequence-length or a GPU with more memory"


def read_shape(args):
    """The configuration of --model or LLaDA-8B with the changes of the options. Raises ValueError as `main`."""
    from dlm.checkpoints.load import read_config
    from dlm.models.configuration import LLaDAConfig

    if args.model and not (Path(args.model) / "config.json").is_file():
        raise ValueError(f"--model {args.model} is no folder with a config.json: give one, or a shape (LLaDA-8B's)")
    config = read_config(Path(args.model)) if args.model else None
    shape = dict(LLADA_8B) if config is None else config.to_dict()
    names = (*LLADA_8B, "n_kv_heads", "weight_tying")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if config is not None and type(config) is not LLaDAConfig:
        if changes:
            raise ValueError(
                f"{flag(next(iter(changes)))} changes a shape of dlm's own kind, and {args.model} is "
                f"{config.model_type}: edit a copy of its config.json"
            )
        return config
    if "n_heads" in changes:
        shape.pop("n_kv_heads", None)
    if "vocab_size" in changes:
        shape.pop("embedding_size", None)
    return LLaDAConfig.from_dict({**shape, **changes})


def table(result: Estimate, args, advice: str) -> str:
    """The estimate as lines of name and value."""
    days = result.seconds / 86400
    rate = f"{result.tokens_per_second:,.0f} tokens/s on {args.gpus} x {args.gpu} at {args.mfu:.0%} of its peak"
    rows = [
        ("parameters", f"{result.parameters / 1e9:.3f} billion"),
        ("arithmetic", f"{result.flops:.3g} operations for {args.tokens:.3g} tokens"),
        ("speed", rate),
        ("time", f"{days:,.1f} days" if days >= 2 else f"{result.seconds / 3600:,.1f} hours"),
        ("GPU hours", f"{result.gpu_hours:,.0f}"),
        ("memory on each GPU", f"{result.memory / GB:,.1f} GB"),
        ("  weights", f"{result.weights / GB:,.1f} GB (fp32 and bf16)"),
        ("  gradients", f"{result.gradients / GB:,.1f} GB"),
        ("  optimizer", f"{result.optimizer / GB:,.1f} GB"),
        ("  moving average", f"{result.average / GB:,.1f} GB"),
        ("  reference, teacher", f"{result.copies / GB:,.1f} GB"),
        ("  activations", f"{result.activations / GB:,.1f} GB ({args.rows} x {args.sequence_length} tokens)"),
        ("fits", advice),
    ]
    return "\n".join(f"{name:<20} {value}" for name, value in rows)
