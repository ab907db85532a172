"""Tasks of EleutherAI's lm_eval under a diffusion model: its command line, with the model `dlm` in it.

dlm eval harness --tasks arc_easy --limit 100                                        (the model that ships)
dlm eval harness --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,method=dual,block_length=32 --tasks gsm8k
accelerate launch eval/harness.py --tasks hellaswag …                                (any number of processes)

model_args: pretrained (folder or hub id), revision, dtype, max_length, greedy=false (leave out whether an option is
what greedy decoding writes, which few tasks read); any setting of sampling (method, steps, temperature …) and of
bounds (estimator, draws, target_error …). All other options are lm_eval's: `dlm eval harness run --help` lists them.
lm_eval finds models by import alone, so that its own command does not know this one.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # `accelerate launch eval/harness.py` from a clone: find dlm/ beside eval/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.utils.errors import one_line


def main(argv: list[str] | None = None) -> int:
    """lm_eval's command line with `--model dlm`; a user's mistake is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: dlm eval harness [run | ls | validate] [options]\n\n{__doc__}")
        return 0
    before = sys.argv
    try:
        from dlm.evaluation.lm_eval import register

        register()
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging

        setup_logging()
        commands = ("run", "ls", "validate")
        command, rest = (argv[0], argv[1:]) if argv[0] in commands else ("run", argv)
        if command == "run" and "--model" not in rest:
            rest = ["--model", "dlm", *rest]
        sys.argv = ["lm_eval", command, *rest]  # where lm_eval reads its options
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
        return 0
    except SystemExit as error:
        return int(error.code or 0) if not isinstance(error.code, str) else 2
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"dlm eval harness: error: {one_line(error)}", file=sys.stderr)
        return 2
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main())
