"""How this process was started: the command that was typed, the launcher's number of processes, the ranks beside it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


def typed_command(argv: Sequence[str], name: str, without: Sequence[str] = (), more: Sequence[str] = ()) -> str:
    """The command that was typed, to be typed again: `dlm train sft ...`, `accelerate launch train/sft.py ...`.

    argv: its options; name: the command as `dlm` knows it, for a call from Python. without: words to leave out; more:
    words to add at the end.
    """
    tail = list(argv)
    head = _head(sys.orig_argv, tail)
    if launched():
        head = _head(_command_line(os.getppid()), tail) or head
    words = [word for word in tail if word not in without]
    return shlex.join([*(head or name.split()), *words, *(word for word in more if word not in words)])


def _head(words: Sequence[str], tail: list[str]) -> list[str]:
    """The words before `tail` of a command line, as one types them; [] where it does not end so."""
    if not words or list(words[len(words) - len(tail) :]) != tail or len(words) == len(tail):
        return []
    head = list(words[: len(words) - len(tail)])
    if Path(head[0]).name.startswith("python") and len(head) > 1:
        script = Path(head[1])
        if script.is_absolute() and (script.parent == Path(head[0]).parent or shutil.which(script.name) == str(script)):
            head = head[1:]  # a console script: `dlm`, `accelerate`
    first = Path(head[0])
    if first.is_absolute() and shutil.which(first.name) == str(first):
        head[0] = first.name
    elif first.is_absolute() and first.name.startswith("python") and str(first) == sys.executable:
        head[0] = first.name if shutil.which(first.name) else str(first)
    return head


def launched() -> bool:
    """Whether `dlm launch`, `accelerate launch` or torchrun started this process."""
    return any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_RANK"))


def _command_line(pid: int) -> list[str]:
    try:
        import psutil  # Accelerate needs it

        return psutil.Process(pid).cmdline()
    except Exception:  # another user's process, one that has gone, no psutil: then it is not known
        return []


def launcher_processes() -> int | None:
    """The number of processes that the launcher of this process was asked for; None: none, or it is not known."""
    words = _command_line(os.getppid()) if launched() else []
    ours = "launch" in words  # `dlm launch`
    if not ours and not any(name in word for word in words for name in ("accelerate", "torchrun", "torch.distributed")):
        return None
    options = dict(pairwise(words))
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            options[name] = value
    for name in ("--num_processes", "--num-processes", "-n", "--nproc_per_node", "--nproc-per-node"):
        if options.get(name, "").isdigit():
            return int(options[name])
    file = options.get("--config_file") or options.get("--config-file")
    if file and Path(file).is_file():
        import yaml

        try:
            read = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return None
        number = read.get("num_processes") if isinstance(read, dict) else None
        return number if isinstance(number, int) else None
    return None
