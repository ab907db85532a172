"""`dlm train --estimate`: the memory and the time of a training run, from the model's shape, before any GPU is used."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlm.models.configuration import LLaDAConfig
from dlm.models.flops import PEAKS, parameters, peak_flops, training_flops
from dlm.models.head import loss_chunk
from dlm.utils.names import nearest

LLADA_8B = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464}
MFU = 0.30  # of what is published for training at this scale, on the low side; LLaDA-8B's own cost comes to 0.26
SHARDING = {  # which of (weights, gradients, optimizer state) a process holds a share of, not all
    "none": (False, False, False),
    "zero2": (False, True, True),
    "fsdp": (True, True, True),
}
GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """Of one run. Memory in bytes on each GPU; time in seconds; tokens_per_second over all GPUs."""

    parameters: int
    flops: float
    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    tokens_per_second: float
    seconds: float
    gpu_hours: float

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def activation_bytes(config, tokens: int, predicted: int, *, checkpointing: bool, chunk: int | None = None) -> float:
    """What a forward pass in bf16 keeps for the backward pass of `tokens` tokens, with logits at `predicted` of them.

    A layer keeps 30 bytes a column of the residual stream, 4 of the keys and values and 8 of the MLP (counted with
    saved-tensor hooks under autocast; fused attention); with checkpointing its fp32 input alone, and one layer at a
    time the rest. Logits: bf16, fp32 and their softmax; where the loss takes a chunk of places at a time, of that
    chunk, and the softmax in place of the fp32 ones.
    """
    layer = 30 * config.d_model + 4 * config.n_kv_heads * config.head_dim + 8 * config.mlp_hidden_size
    kept = 4 * config.d_model * config.n_layers + layer if checkpointing else layer * config.n_layers
    logits = predicted * (2 + 4 + 4) if chunk is None else min(predicted, chunk) * (2 + 4)
    return tokens * kept + logits * config.embedding_size


def estimate(
    config, *, tokens: float, gpus: int, peak: float, mfu: float, width: int, rows: int, sharding: str = "none",
    checkpointing: bool = False, ema: bool = True, optimizer: str = "adamw", block_diffusion: bool = False,
    predicted: float = 0.5,
) -> Estimate:  # fmt: skip
    """Memory and time of training on `tokens` tokens.

    peak: operations a second of one GPU; mfu: the share of it that is reached. width, rows: of one micro-batch on one
    GPU. predicted: share of the tokens that logits are computed at (half of them are masked on average). Block
    diffusion computes every row twice, noisy and clean.
    """
    copies = 2 if block_diffusion else 1
    total = training_flops(config, tokens * copies, width * copies, tokens * predicted)
    size = parameters(config)
    weights, gradients, states = (gpus if share else 1 for share in SHARDING[sharding])
    seconds = total / (gpus * peak * mfu)
    held = 8 if optimizer == "adamw" else 4  # Muon has one moment for its matrices
    return Estimate(
        parameters=size,
        flops=total,
        weights=size * (4 + 2) / weights,  # fp32, and the bf16 copies that autocast makes
        gradients=size * 4 / gradients,
        optimizer=size * held / states,
        average=size * 4 / weights if ema else 0.0,
        activations=activation_bytes(
            config,
            rows * width * copies,
            int(rows * width * predicted),
            checkpointing=checkpointing,
            chunk=loss_chunk(rows * width, config.embedding_size),
        ),
        tokens_per_second=tokens / seconds,
        seconds=seconds,
        gpu_hours=seconds * gpus / 3600,
    )


def main(argv: Sequence[str]) -> int:
    """The command. Errors (ValueError): an unknown option or device, a folder without a config."""
    parser = argparse.ArgumentParser(
        prog="dlm train --estimate",
        description="Memory and time of a training run. Without --model and shape: LLaDA-8B.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--model", metavar="FOLDER", help="a checkpoint, or any folder with its config.json")
    for name, value in LLADA_8B.items():
        add("--" + name.replace("_", "-"), type=int, metavar="N", help=f"shape in place of the model's ({value})")
    add("--n-kv-heads", type=int, metavar="N", help="shape: heads of keys and values (as many as heads)")
    add("--weight-tying", action=argparse.BooleanOptionalAction, help="one table for input and output")
    add("--tokens", type=float, default=2.3e12, metavar="N", help="to train on, in all (2.3e12)")
    add("--sequence-length", type=int, default=4096, metavar="N", help="row length (4096)")
    add("--rows", type=int, default=1, metavar="N", help="rows in one micro-batch on one GPU (1)")
    add("--gpus", type=int, default=1, metavar="N", help="how many (1)")
    add("--gpu", default="H100", help=f"which: {', '.join(PEAKS)} (H100)")
    add("--mfu", type=float, default=MFU, help=f"share of the GPU's peak that is reached ({MFU})")
    add("--sharding", choices=SHARDING, default="none", help="none (DDP), zero2 or fsdp (also ZeRO-3)")
    add("--activation-checkpointing", action="store_true")
    add("--no-ema", action="store_true")
    add("--optimizer", choices=("adamw", "muon"), default="adamw")
    add("--objective", choices=("diffusion", "block_diffusion", "autoregressive"), default="diffusion")
    add("--json", action="store_true", help="numbers for a program")
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"the command line: {error}") from error
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"no option {unknown[0]}: the nearest is {nearest(unknown[0], options)}")
    for name in ("tokens", "sequence_length", "rows", "gpus"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be above 0")
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu is {args.mfu}: a share, above 0 and at most 1")
    peak = peak_flops(args.gpu)
    if peak is None:
        raise ValueError(f"--gpu {args.gpu!r} is not known: one of {', '.join(PEAKS)}")
    found = estimate(
        _config(args), tokens=args.tokens, gpus=args.gpus, peak=peak, mfu=args.mfu, width=args.sequence_length,
        rows=args.rows, sharding=args.sharding, checkpointing=args.activation_checkpointing, ema=not args.no_ema,
        optimizer=args.optimizer, block_diffusion=args.objective == "block_diffusion",
        predicted=1.0 if args.objective == "autoregressive" else 0.5,
    )  # fmt: skip
    print(json.dumps({**vars(found), "memory": found.memory}) if args.json else _text(found, args))
    return 0


def _config(args) -> LLaDAConfig:
    shape = dict(LLADA_8B)
    if args.model:
        path = Path(args.model) / "config.json"
        try:
            shape = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'not JSON'}") from error
    names = (*LLADA_8B, "n_kv_heads", "weight_tying")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "n_heads" in changes:
        shape.pop("n_kv_heads", None)
    if "vocab_size" in changes:
        shape.pop("embedding_size", None)
    return LLaDAConfig.from_dict({**shape, **changes})


def _text(found: Estimate, args) -> str:
    days = found.seconds / 86400
    rows = [
        ("parameters", f"{found.parameters / 1e9:.3f} billion"),
        ("arithmetic", f"{found.flops:.3g} operations for {args.tokens:.3g} tokens"),
        ("speed", f"{found.tokens_per_second:,.0f} tokens/s on {args.gpus} x {args.gpu} at {args.mfu:.0%} of its peak"),
        ("time", f"{days:,.1f} days" if days >= 2 else f"{found.seconds / 3600:,.1f} hours"),
        ("GPU hours", f"{found.gpu_hours:,.0f}"),
        ("memory on each GPU", f"{found.memory / GB:,.1f} GB"),
        ("  weights", f"{found.weights / GB:,.1f} GB (fp32 and bf16)"),
        ("  gradients", f"{found.gradients / GB:,.1f} GB"),
        ("  optimizer", f"{found.optimizer / GB:,.1f} GB"),
        ("  moving average", f"{found.average / GB:,.1f} GB"),
        ("  activations", f"{found.activations / GB:,.1f} GB ({args.rows} x {args.sequence_length} tokens)"),
    ]
    return "\n".join(f"{name:<20} {value}" for name, value in rows)
