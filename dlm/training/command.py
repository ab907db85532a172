"""A training recipe as a command: its options are read without torch, then `recipe.run` does the work."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from dlm.utils.distributed import leave_processes
from dlm.utils.settings import parse

if TYPE_CHECKING:
    from dlm.training.config import RecipeConfig
    from dlm.training.recipe import Prepared

__all__ = ["main"]


def main(
    kind: type[RecipeConfig], prepare: Callable[..., Prepared], argv: list[str] | None, *, prog: str, text: str
) -> int:
    """Run a recipe; a user's mistake is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = parse(kind, argv, prog, text)
        from dlm.training.recipe import run

        code = run(settings, argv, prog, prepare)
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f"{prog}: {error}{': make room, then go on with --resume' if full else ''}", file=sys.stderr)
        code = 2
    leave_processes(failed=code == 2)
    return code
