"""What a benchmark asks a model, and who judges the answers, from its options.

The options are --task, --checker, --prompts, --limit, and --judge, --judge-revision with --model.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm.checkpoints.pretrained import Pretrained
    from dlm.evaluation.judge import Judge
    from dlm.evaluation.tasks import Question

__all__ = ["judge_of", "questions_of"]


def questions_of(args, default: Path) -> list[Question]:
    """The questions of --task or --prompts; default: the file of prompts where neither is given."""
    from dlm.evaluation.tasks import open_task, prompts, tell_apart

    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}: give 1 or more questions")
    if args.task is None:
        if args.checker is not None:
            raise ValueError("--checker checks the answers of a task: give --task FILE.jsonl, in place of --prompts")
        return tell_apart(prompts(args.prompts or str(default)))[: args.limit]
    if args.prompts is not None:
        raise ValueError("--prompts and --task both say what is asked: give one of them")
    command = shlex.split(args.checker) if args.checker else None
    return open_task(args.task, limit=args.limit, command=command)


def judge_of(args, opened: Pretrained) -> Judge | None:
    """The judge, None for `none`. Errors: no judge given for a model other than the one that ships."""
    from dlm.checkpoints.files import TWIN
    from dlm.evaluation.judge import open_judge

    if args.judge == "none":
        return None
    if args.judge is None and args.model is not None:
        raise ValueError(
            "this model has no judge of its own: give --judge with a causal language model, or --judge none"
        )
    return open_judge(
        args.judge or str(TWIN), revision=args.judge_revision, device=opened.model.device,
        tokenizer=opened.tokenizer, vocab_size=opened.config.vocab_size,
    )  # fmt: skip
