"""`dlm train | eval | bench NAME ...`: runs a script of the folder of that kind, from a clone or from a wheel.

A script is a file whose `main(argv) -> int` runs it and whose docstring's first line says what it does.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dlm.utils.distributed import leave_processes
from dlm.utils.errors import one_line
from dlm.utils.names import nearest
from dlm.utils.peers import first_to_say, let_others_ask, rank_prefix

FOLDERS = {"train": "train", "eval": "eval", "bench": "benchmarks"}  # command: folder


def scripts(command: str) -> dict[str, Path]:
    """The scripts of a command by name: in a wheel in the folder dlm/recipes, in a clone beside dlm/."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "recipes" / FOLDERS[command], here.parent / FOLDERS[command]):
        if folder.is_dir():
            return {file.stem: file for file in sorted(folder.glob("*.py")) if "\ndef main(" in file.read_text("utf-8")}
    return {}


def run(command: str, argv: Sequence[str], more: str = "") -> int:
    """Run a script's `main`, or list the scripts. more: lines for the list."""
    files = scripts(command)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: dlm {command} NAME [options]      (dlm {command} NAME --help lists them)\n{more}")
        wide = max(map(len, files), default=0)
        for name, file in files.items():
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            print(f"  {name:<{wide}}  {text.splitlines()[0] if text else ''}")
        return 0
    name, rest = argv[0], list(argv[1:])
    if name not in files:
        near = f": the nearest is {nearest(name, list(files))!r}" if files else ""
        raise ValueError(f"no {name!r} in dlm {command}{near} (see dlm {command} --help)")
    label = f"dlm.recipes.{FOLDERS[command]}.{name}"
    spec = importlib.util.spec_from_file_location(label, files[name])
    beside = str(files[name].parents[1])  # a script may import what stands beside it: benchmarks.peers, train.texts
    if beside not in sys.path:
        sys.path.insert(0, beside)
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module
    spec.loader.exec_module(module)
    return int(module.main(rest) or 0)


def train(argv: Sequence[str]) -> int:
    """`dlm train NAME ...`: a training recipe. `dlm train --estimate`: what a run would take."""
    if "--estimate" in argv:
        from dlm.cli.estimate import main as estimate

        return estimate([word for word in argv if word != "--estimate"])
    return run("train", argv, "       dlm train --estimate [options]  (memory and time of a run)\n")


def evaluate(argv: Sequence[str]) -> int:
    """`dlm eval NAME ...`."""
    return run("eval", argv)


def bench(argv: Sequence[str]) -> int:
    """`dlm bench NAME ...`."""
    return run("bench", argv)


def check_output() -> None:
    """Raises ValueError where standard output is closed: what a command says would be lost without a word."""
    if sys.stdout is None:
        raise ValueError("standard output is closed, so nothing could be shown: redirect it to a file or /dev/null")


def guarded(prog: str, run: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Run a script's `run(argv)`; a user's mistake is one line and exit code 2, Ctrl-C 130."""
    try:
        check_output()
        return run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if first_to_say():  # of several processes
            print(f"{prog}: error: {rank_prefix()}{one_line(error)}", file=sys.stderr, flush=True)
        let_others_ask()
        leave_processes(failed=True)
        return 2
