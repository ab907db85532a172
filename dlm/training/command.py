"""A training recipe as a command: its options are read without torch, then `recipe.run` does the work."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dlm.utils.distributed import leave_processes
from dlm.utils.errors import one_line
from dlm.utils.peers import first_to_say, is_lost_connection, let_others_ask, lost_line, rank_prefix
from dlm.utils.settings import parse

if TYPE_CHECKING:
    from dlm.training.config import RecipeConfig
    from dlm.training.recipe import Prepared

__all__ = ["main"]

LEAVING_SECONDS = 0.5  # until a process that was killed is seen to be gone


def main(
    kind: type[RecipeConfig], prepare: Callable[..., Prepared], argv: list[str] | None, *, prog: str, text: str
) -> int:
    """Run a recipe. Returns 0; 2 for a user's mistake, 1 where memory or a process is lost (one line each); 130.

    Of several processes the first that fails says why, and which it is. With DLM_DEBUG set an error shows its stack.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = parse(kind, argv, prog, text)
        from dlm.training.recipe import run

        code = run(settings, argv, prog, prepare)
    except KeyboardInterrupt:
        print(f"{prog}: stopped at once; the newest checkpoint is as it was", file=sys.stderr)
        code = 130
    except Exception as error:
        line = line_of(error)
        if line is None or os.environ.get("DLM_DEBUG"):
            raise
        if first_to_say():
            print(f"{prog}: {rank_prefix()}{line}", file=sys.stderr, flush=True)
        let_others_ask()
        code = 2 if isinstance(error, ValueError | OSError) else 1
    leave_processes(failed=code != 0)
    return code


def line_of(error: Exception) -> str | None:
    """What to say of an error in one line; None where it is a fault of the program."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{one_line(error)}: make room, then go on with --resume"
    if isinstance(error, ValueError | OSError):
        return one_line(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return "out of memory: give a smaller batch_size, or more accumulation, or --activation-checkpointing"
    if is_lost_connection(error):
        time.sleep(LEAVING_SECONDS)
        return lost_line()
    return None
