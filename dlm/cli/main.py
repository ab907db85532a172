"""The command line, `dlm generate | infill | chat | choose | serve | replay | info | train | eval | bench | launch`.

Nothing heavy is imported before a command needs it: `dlm --help` answers without torch.
Shapes: B batch, T canvas.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from dlm.cli.scripts import check_output
from dlm.utils.errors import one_line
from dlm.utils.names import nearest
from dlm.utils.peers import first_to_say, rank_prefix

COMMANDS = {  # name: (where its function is, one line for the help)
    "generate": ("dlm.cli.generate:generate", "continue a text, and watch it denoise"),
    "infill": ("dlm.cli.infill:infill", "fill the blanks ___ of a text"),
    "chat": ("dlm.cli.chat:chat", "talk with an instruct checkpoint"),
    "choose": ("dlm.cli.choose:choose", "say how probable each option of a blank ___{a|b} is"),
    "replay": ("dlm.cli.replay:replay", "show a recorded run again, or make a page or a film of it"),
    "serve": ("dlm.cli.serve:serve", "an OpenAI-compatible server, with a page on which text denoises"),
    "info": ("dlm.cli.info:info", "say what a checkpoint is, and which methods suit it"),
    "train": ("dlm.cli.scripts:train", "run a training recipe, or estimate what it takes"),
    "eval": ("dlm.cli.scripts:evaluate", "perplexity with its error, generated text judged, lm-eval tasks"),
    "bench": ("dlm.cli.scripts:bench", "measure: the grid of methods, blocks and steps; speed; load"),
    "launch": ("dlm.cli.launch:launch", "start train, eval or bench in several processes"),
}
HELP = """usage: dlm COMMAND ...

Masked diffusion language models: text appears in any order, not left to right.

commands:
{commands}

examples:
  dlm generate "Once upon a time"
  dlm infill "The fox was ___{{2}}, so he went ___{{6}}."

Without --model the small model that ships with dlm is used.
dlm COMMAND --help lists a command's options; dlm --version prints the version.
"""


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
    written = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"dlm: warning: {' '.join(str(message).split())}\n"
    try:
        check_output()
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
        if first_to_say():  # of several processes
            print(f"dlm: error: {rank_prefix()}{one_line(error)}", file=sys.stderr)
        return 2 if known else 1
    finally:
        signal.signal(signal.SIGTERM, before)
        warnings.formatwarning = written
