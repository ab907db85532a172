"""Named shapes of models for benchmarks, with random weights: what a measurement of speed needs, and no download.

Shapes: d_model, heads, layers, MLP width and vocabulary as in a checkpoint's config.json.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlm.cli.parser import Parser, check_least
from dlm.models.choices import DTYPES, float_name
from dlm.models.shapes import SHAPES
from dlm.sampling.config import METHOD_NAMES
from dlm.utils.names import check_name

if TYPE_CHECKING:
    import torch

    from dlm.models.transformer import LLaDAModelLM

__all__ = ["Workload", "clock_of", "model_options", "open_model", "open_workload", "parse_cell", "workload_options"]


def parse_cell(text: str) -> tuple[str, int, int]:
    """`dual:32:64` -> ("dual", 32, 64): method, block length, steps. Raises ValueError for anything else."""
    method, *numbers = text.split(":")
    check_name("method", method, METHOD_NAMES)
    if len(numbers) != 2 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise ValueError(f"cell {text!r} is not METHOD:BLOCK:STEPS, such as dual:32:64")
    return method, int(numbers[0]), int(numbers[1])


def model_options(parser: Parser) -> None:
    """The options of every measurement of a model: which one, on what, by which clock."""
    add = parser.add_argument
    add("--model", metavar="PATH", help="a checkpoint; without one, random weights of --config")
    add("--config", default="25m", metavar="NAME", help=f"{', '.join(SHAPES)} (default: 25m)")
    add("--dtype", default="float32", type=float_name, choices=DTYPES[1:], help="(default: float32)")
    add("--device", metavar="NAME", help="(default: a GPU where there is one)")
    add("--cuda-graphs", action="store_true", help="replay passes on a GPU")
    add("--compile", action="store_true", help="float32 on a CPU: compile whole passes once")
    add("--threads", type=int, metavar="N", help="of torch on a CPU")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and of the given tokens")
    add("--clock", default="wall", choices=("wall", "cpu"), help="cpu: the process's own time, for a machine in use")
    add("--json", metavar="FILE", help="write the rows there")


def workload_options(parser: Parser) -> None:
    """The options of a measurement of generation: those of the model, which cells, how often."""
    model_options(parser)
    add = parser.add_argument
    add("--cells", nargs="+", default=["none:32:64", "dual:32:64"], metavar="METHOD:BLOCK:STEPS", help="what is timed")
    add("--prompt-length", type=int, default=32, metavar="N", help="tokens of the prompt (default: 32)")
    add("--gen-length", type=int, default=256, metavar="N", help="tokens to generate (default: 256)")
    add("--batch", type=int, default=1, metavar="N", help="prompts at a time (default: 1)")
    add("--repeats", type=int, default=3, metavar="N", help="timed generations a cell (default: 3)")


@dataclass(frozen=True)
class Workload:
    """What is measured: the model, prompts (B, P), cells (method, block length, steps), and the clock in seconds."""

    model: LLaDAModelLM
    prompts: torch.Tensor
    cells: Sequence[tuple[str, int, int]]
    clock: Callable[[], float]


def open_workload(args: Namespace) -> Workload:
    """The workload of `workload_options`. Errors: numbers below 1, cells that are none, as `dlm.load`."""
    import torch

    check_least(args, 1, "prompt_length", "gen_length", "batch", "repeats", "threads")
    cells = [parse_cell(cell) for cell in args.cells]
    model = open_model(args)
    generator = torch.Generator().manual_seed(args.seed)
    most = max(1, model.config.vocab_size - 8)
    prompts = torch.randint(0, most, (args.batch, args.prompt_length), generator=generator)
    return Workload(model, prompts.to(args.device), cells, clock_of(args))


def open_model(args: Namespace, length: int = 16_384) -> LLaDAModelLM:
    """The model of `model_options`: --model, or random weights of --config for canvases of up to `length`, with
    --threads in force. Errors: --cuda-graphs without a GPU, as `dlm.load`, `random_model`, `quantize_`."""
    import torch

    from dlm.checkpoints.pretrained import load_pretrained
    from dlm.kernels.linear import QUANTIZED, quantize_
    from dlm.kernels.native import library
    from dlm.models.shapes import random_model

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.cuda_graphs and torch.device(args.device).type != "cuda":
        raise ValueError(f"--cuda-graphs needs a GPU, and --device is {args.device}: leave it out")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.model:
        opened = load_pretrained(args.model, dtype=args.dtype, device=args.device)
        opened.check_diffusion()
        model = opened.model
    else:
        base = QUANTIZED[args.dtype].base if args.dtype in QUANTIZED else args.dtype
        whole = torch.float32 if base == "auto" else getattr(torch, base)
        model = random_model(args.config, dtype=whole, device=args.device, seed=args.seed, length=length)
        if args.dtype in QUANTIZED:
            model = quantize_(model, args.dtype)
    if args.compile:
        library(lambda word: print(f"{word} ...", file=sys.stderr))
    model.cuda_graphs, model.compiled = args.cuda_graphs, args.compile
    return model


def clock_of(args: Namespace) -> Callable[[], float]:
    """The clock of --clock, in seconds."""
    return time.process_time if args.clock == "cpu" else time.perf_counter
