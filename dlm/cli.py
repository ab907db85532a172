"""The command line: `dlm generate | infill | chat | info | train | eval | bench`: parse, call, print.

Nothing heavy is imported before a command needs it: `dlm --help` answers without torch.
Shapes: B batch, T canvas.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from dlm.names import nearest

COMMANDS = {  # name: (where its function is, one line for the help)
    "generate": ("dlm.commands:generate", "continue a text, and watch it denoise"),
    "infill": ("dlm.commands:infill", "fill the blanks ___ of a text"),
    "chat": ("dlm.commands:chat", "talk with an instruct checkpoint"),
    "info": ("dlm.info:info", "say what a checkpoint is, and which methods suit it"),
    "train": ("dlm.scripts:train", "run a training recipe, or estimate what it takes"),
    "eval": ("dlm.scripts:evaluate", "perplexity with its error, generated text judged, lm-eval tasks"),
    "bench": ("dlm.scripts:bench", "the grid of block lengths and steps; speed"),
}

HELP = """usage: dlm COMMAND ...

Masked diffusion language models: text appears in any order, not left to right.

commands:
{commands}

examples:
  dlm generate "Once upon a time"
  dlm generate --method dual --steps 32 --temperature 0.7 "The old house"
  dlm generate --model GSAI-ML/LLaDA-8B-Base --json --prompts prompts.txt
  dlm infill "The cat ___ on the mat, and then ___{{12}}."
  dlm info path/to/checkpoint

Without --model the small model that ships with dlm is used.
dlm COMMAND --help lists a command's options; dlm --version prints the version.
"""

# Field of SamplingConfig: (type, help). The one place where the options of sampling are written.
SAMPLING: dict[str, tuple[Callable, str]] = {
    "gen_length": (int, "tokens to generate"),
    "steps": (int, "forward passes in all (default: one a token)"),
    "block_length": (int, "tokens in a block; blocks are written left to right"),
    "method": (str, "none, prefix, dual, vicinity, c2f or block_causal: order and cache"),
    "commit": (str, "quota, threshold, factor or entropy_bound: how many tokens a pass"),
    "threshold": (float, "for --commit threshold: least confidence"),
    "factor": (float, "for --commit factor"),
    "entropy_bound": (float, "for --commit entropy_bound, in nats"),
    "split": (str, "remainder_first or rounded: how a block's tokens are shared over its passes"),
    "confidence": (str, "probability, margin, entropy or random: which tokens come first"),
    "temperature": (float, "above 0: draws from the sharpened or flattened prediction; 0: the most probable token"),
    "tempered_confidence": (bool, "confidence from the tempered probabilities, as Dream does"),
    "top_k": (int, "only the K most probable tokens"),
    "top_p": (float, "only the most probable tokens that make up P"),
    "cfg_scale": (float, "strength of classifier-free guidance"),
    "window": (int, "for --method vicinity: positions on each side of the block"),
    "seed": (int, "of the first text; the next ones count up from it"),
    "stop_at_eos": (bool, "stop a text at its end-of-text token"),
    "eos_token_id": (int, "in place of the checkpoint's end-of-text token"),
    "suppress_eos": (bool, "never write end-of-text"),
    "delay_eos": (bool, "write end-of-text only where nothing else is left"),
}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which name the nearest option for one that does not exist."""

    def __init__(self, command: str, usage: str, text: str) -> None:
        super().__init__(
            prog=f"dlm {command}",
            usage=f"dlm {command} {usage}",
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")

    def options(self) -> list[str]:
        """All the options' names."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; an option that does not exist is an error with the nearest one that does."""
        args, unknown = self.parse_known_intermixed_args(list(argv))
        for word in unknown:
            name = word.split("=")[0]
            raise ValueError(
                f"no option {name}: the nearest is {nearest(name, self.options())} (see {self.prog} --help)"
            )
        return args

    def add_model(self):
        """Options that choose the model and where it runs; returns their group."""
        group = self.add_argument_group("model")
        group.add_argument("--model", metavar="PATH", help="folder or hub id (default: the model that ships)")
        group.add_argument("--revision", help="branch, tag or commit of a hub id")
        group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
        group.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, int8, fp8 (default: as saved)")
        group.add_argument(
            "--attn-implementation", metavar="NAME", help="eager, sdpa, flash_attention_2 or flex_attention"
        )
        group.add_argument("--cuda-graphs", action="store_true", help="replay passes on a GPU: a launch for each")
        return group

    def add_sampling(self, defaults, leave_out: Sequence[str] = ()) -> None:
        """One option for each field of SamplingConfig; not given it is None, so that the checkpoint's counts.

        defaults: a SamplingConfig whose values the help shows.
        """
        group = self.add_argument_group("sampling")
        for field, (kind, text) in SAMPLING.items():
            if field in leave_out:
                continue
            value = getattr(defaults, field, None)
            if value is not None and kind is not bool:
                text += f" (default: {value})"
            more = (
                {"action": argparse.BooleanOptionalAction}
                if kind is bool
                else {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
            )
            group.add_argument(flag(field), default=None, help=text, **more)

    def add_output(self) -> None:
        """Options that choose what is printed."""
        group = self.add_argument_group("output")
        group.add_argument("--json", action="store_true", help="one JSON object a line for each text")
        group.add_argument("--no-live", action="store_true", help="do not show the text while it denoises")
        group.add_argument(
            "--delay",
            type=float,
            default=0.0,
            metavar="SECONDS",
            help="wait after each pass of the live view",
        )


def flag(field: str) -> str:
    """`gen_length` -> `--gen-length`."""
    return "--" + field.replace("_", "-")


def check_least(args: argparse.Namespace, least: int, *fields: str) -> None:
    """Raises ValueError where one of these options is given and below `least`."""
    for field in fields:
        if (value := getattr(args, field)) is not None and value < least:
            raise ValueError(f"{flag(field)} is {value}: give {least} or more")


def shown_defaults(argv: Sequence[str]):
    """SamplingConfig's defaults where help is asked for, else None: nothing else needs them so early."""
    if not {"-h", "--help"} & set(argv):
        return None
    import dlm

    return dlm.SamplingConfig()


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def overview() -> str:
    """What `dlm --help` prints."""
    return HELP.format(commands="\n".join(f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()))


def run(argv: Sequence[str]) -> int:
    """Run one command; errors come out as exceptions."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if argv[0] == "--version":
        import dlm

        print(f"dlm {dlm.__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}: the nearest is {nearest(name, list(COMMANDS))!r} (see dlm --help)")
    module, function = COMMANDS[name][0].split(":")
    return getattr(importlib.import_module(module), function)(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 what was given does not work, 1 out of memory, 130 Ctrl-C.

    With DLM_DEBUG set an error shows its stack.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the terminal is restored then too
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")  # what matters to a user, dlm says itself
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? for what it lacks
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("dlm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone (`dlm generate ... | head -1`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        known = isinstance(error, (ValueError, OSError, ImportError, ArithmeticError))
        if os.environ.get("DLM_DEBUG") or not (known or type(error).__name__ == "OutOfMemoryError"):
            raise
        print(f"dlm: error: {one_line(error)}", file=sys.stderr)
        return 2 if known else 1
    finally:
        signal.signal(signal.SIGTERM, before)
