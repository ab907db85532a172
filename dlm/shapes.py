"""Named shapes of models for benchmarks, with random weights: what a measurement of speed needs, and no download.

Shapes: d_model, heads, layers, MLP width and vocabulary as in a checkpoint's config.json.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dlm.cache import METHODS
from dlm.cli import Parser, check_least
from dlm.models import LLaDAConfig, LLaDAModelLM, load
from dlm.models.linear import QUANTIZED, quantize_
from dlm.names import check_name

__all__ = [
    "SHAPES",
    "Workload",
    "clock_of",
    "model_options",
    "open_model",
    "open_workload",
    "parse_cell",
    "random_model",
    "workload_options",
]

# name: (d_model, n_heads, n_kv_heads, n_layers, mlp_hidden_size, vocabulary)
SHAPES = {
    "small": (128, 4, 4, 4, 384, 2048),
    "25m": (384, 6, 6, 8, 1536, 8192),
    "120m": (768, 12, 12, 12, 2048, 32_000),
    "wide-vocabulary": (512, 8, 8, 4, 1536, 126_464),
    "llada-1b": (2048, 32, 4, 22, 5634, 126_464),  # SMDM's 1B body (arXiv:2410.18514) with LLaDA's vocabulary
    "llada-8b": (4096, 32, 32, 32, 12_288, 126_464),
}


def random_model(name: str, *, dtype=torch.float32, device="cpu", seed: int = 0, length: int = 16_384) -> LLaDAModelLM:
    """A model of that shape with weights N(0, 1 / fan-in), in evaluation mode, for canvases of up to `length` slots.

    The last id is the mask token and the one before it end-of-text. Raises ValueError for an unknown name.
    """
    check_name("config", name, SHAPES)
    width, heads, kv_heads, layers, hidden, vocabulary = SHAPES[name]
    config = LLaDAConfig(
        d_model=width,
        n_heads=heads,
        n_kv_heads=kv_heads,
        n_layers=layers,
        mlp_hidden_size=hidden,
        vocab_size=vocabulary,
        embedding_size=vocabulary,
        mask_token_id=vocabulary - 1,
        eos_token_id=vocabulary - 2,
        pad_token_id=vocabulary - 2,
        max_sequence_length=length,
    )
    config._attn_implementation = "sdpa"
    device = torch.device(device)
    with torch.device("meta"):
        model = LLaDAModelLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.fill_(1)
            else:
                weight.normal_(
                    std=1 if weight is model.get_input_embeddings().weight else weight.shape[1] ** -0.5,
                    generator=generator,
                )
    return model


def parse_cell(text: str) -> tuple[str, int, int]:
    """`dual:32:64` -> ("dual", 32, 64): method, block length, steps. Raises ValueError for anything else."""
    method, *numbers = text.split(":")
    check_name("method", method, METHODS)
    if len(numbers) != 2 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise ValueError(f"cell {text!r} is not METHOD:BLOCK:STEPS, such as dual:32:64")
    return method, int(numbers[0]), int(numbers[1])


def model_options(parser: Parser) -> None:
    """The options of every measurement of a model: which one, on what, by which clock."""
    add = parser.add_argument
    add("--model", metavar="PATH", help="a checkpoint; without one, random weights of --config")
    add("--config", default="25m", metavar="NAME", help=f"{', '.join(SHAPES)} (default: 25m)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16", *QUANTIZED))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU where there is one")
    add("--cuda-graphs", action="store_true", help="replay passes on a GPU")
    add("--threads", type=int, metavar="N", help="of torch on a CPU")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and of the given tokens")
    add("--clock", default="wall", choices=("wall", "cpu"), help="cpu: the process's own time, for a machine in use")
    add("--json", metavar="FILE", help="write the rows there")


def workload_options(parser: Parser) -> None:
    """The options of a measurement of generation: those of the model, which cells, how often."""
    model_options(parser)
    add = parser.add_argument
    add("--cells", nargs="+", default=["none:32:64", "dual:32:64"], metavar="METHOD:BLOCK:STEPS")
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
    if args.cuda_graphs and torch.device(args.device).type != "cuda":
        raise ValueError(f"--cuda-graphs needs a GPU, and --device is {args.device}: leave it out")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.model:
        model, _ = load(args.model, dtype=args.dtype, device=args.device)
    else:
        base = QUANTIZED[args.dtype].base if args.dtype in QUANTIZED else args.dtype
        whole = torch.float32 if base == "auto" else getattr(torch, base)
        model = random_model(args.config, dtype=whole, device=args.device, seed=args.seed, length=length)
        if args.dtype in QUANTIZED:
            model = quantize_(model, args.dtype)
    model.cuda_graphs = args.cuda_graphs
    return model


def clock_of(args: Namespace) -> Callable[[], float]:
    """The clock of --clock, in seconds."""
    return time.process_time if args.clock == "cpu" else time.perf_counter
