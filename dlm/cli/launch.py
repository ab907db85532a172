"""`dlm launch ...`: `accelerate launch` with the same options, whose end is one line and not a stack of the launcher.

Accelerate's launcher raises where a process fails, so that the line which says why is followed by thirty of its own.
Here the process that failed says why and which rank it is; the launcher speaks only where that one could not: killed.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dlm.cli.scripts import FOLDERS
from dlm.utils.peers import SAID

USAGE = """usage: dlm launch [options of accelerate launch] train|eval|bench NAME [options]
       dlm launch [options of accelerate launch] SCRIPT.py [options]

Starts several processes of one job, as accelerate launch does, and ends in one line where one of them fails.

  dlm launch --num_processes 8 --multi_gpu train sft --data chats.jsonl --output runs/sft
  dlm launch --config_file train/configs/accelerate/fsdp2.yaml train/pretrain.py --config my.yaml

accelerate launch --help lists the options that come before the script.
"""
QUIET = logging.ERROR  # the elastic agent logs the failed process and its signals in its own words


def _parsed(argv: Sequence[str]):
    """Accelerate's own arguments. Raises ValueError for those that it does not know, and for no such script."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()

    def refuse(message: str) -> None:
        raise ValueError(f"{message} (accelerate launch --help lists the options before the script)")

    parser.error = refuse
    args = parser.parse_args(list(argv))
    if args.training_script in FOLDERS and not Path(args.training_script).is_file():
        args.module, args.training_script_args = True, [args.training_script, *args.training_script_args]
        args.training_script = "dlm"
    elif not (args.module or args.no_python) and not Path(args.training_script).is_file():
        raise ValueError(f"no script {args.training_script}: give a file, or train, eval or bench and a NAME")
    return args


def _killed(rank: int, size: int | None, number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    of = f" of {size}" if size else ""
    return f"rank {rank}{of} was ended by {name} (killed, or out of memory), so this job ends: go on with --resume"


def launch(argv: Sequence[str]) -> int:
    """Start the processes and wait for them. Returns 0; else the exit code of the first that failed, 1 where killed."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    args = _parsed(argv)
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(QUIET)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        os.environ[SAID] = str(said)
        try:
            launch_command(args)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                return failure.exitcode or 1
            if not said.exists():
                print(f"dlm launch: {_killed(rank, args.num_processes, -failure.exitcode)}", file=sys.stderr)
            return 1
        except subprocess.CalledProcessError as error:  # one process, which said what happened
            return error.returncode if error.returncode > 0 else 1
        except SignalException as stopped:
            return 128 + stopped.sigval
        finally:
            logging.disable(logging.NOTSET)
            os.environ.pop(SAID, None)
    return 0
