"""`dlm generate --prompts FILE --out FILE.jsonl`: many texts into a file, which the same command goes on with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dlm.cli.chat import check_chat
from dlm.cli.session import announce, as_options, check_region, settings
from dlm.data.prompts import PromptFile, iter_prompts
from dlm.sampling.options import SAMPLING
from dlm.utils.progress import counted, duration

__all__ = ["run_offline"]

IDLE = ("record", "tensor_parallel", "json", "delay", "no_live")  # options of texts that are shown


def run_offline(args) -> int:
    """Writes the texts; 0 where all are there, 2 where some prompts did not fit. Raises ValueError, OSError."""
    check(args)
    rank, size, local = (int(os.environ.get(name, value)) for name, value in PROCESSES.items())
    prompts = PromptFile.of(args.prompts)
    if size > 1 and args.device is None:
        args.device = own_device(local)
    opened = announce(args)
    config = settings(args, opened.chat_defaults if args.chat else opened.defaults)
    from dlm.chat_template import chat_ids
    from dlm.serving.engine import Engine, EngineSettings
    from dlm.serving.offline import AHEAD, records, texts, write
    from dlm.serving.requests import ServingError
    from dlm.serving.resume import Output, merge
    from dlm.tokenizer import encode_prompt

    if args.chat:
        check_chat(opened)
    check_region(opened, config.gen_length, "--gen-length")

    def encode(prompt: str) -> list[int]:
        if args.chat:
            return chat_ids(opened.codec, [{"role": "user", "content": prompt}], opened.mask_id)
        return encode_prompt(opened.codec, prompt, opened.mask_id)

    total, out = prompts.count * args.num_samples, Path(args.out)
    asked = {
        "prompts": prompts.digest, "count": prompts.count, "num_samples": args.num_samples, "processes": size,
        "model": opened.digest, "dtype": args.dtype, "chat": bool(args.chat),
        "sampling": {field: getattr(config, field) for field in SAMPLING},
    }  # fmt: skip
    with Output(out, asked, total, rank, size) as output:
        left = output.share - output.done
        if output.done:
            print(f"{output.path}: {output.done} of {output.share} texts are there", file=sys.stderr)
        if left:
            limits = EngineSettings(max_rows=args.batch_size, max_waiting=(AHEAD - 1) * args.batch_size, timeout=None)
            engine = Engine(opened, limits)
            try:
                wanted = texts(iter_prompts(args.prompts), args.num_samples, config.seed, output.done, rank, size)
                lines = records(engine, wanted, config, encode)
                shown = counted(lines, output.share, "texts", show=rank == 0, start=output.done)
                wrong, tokens, seconds = write(shown, output)
            except ValueError as error:
                raise ValueError(as_options(str(error))) from error
            except ServingError as error:
                raise ValueError(
                    f"{error}; {output.done} texts are in {output.path}, the same command goes on"
                ) from error
            finally:
                engine.close()
            print(summary(output.path, left, wrong, tokens, seconds), file=sys.stderr)
        else:
            wrong = 0
    if merge(out, total, size) and size > 1:
        print(f"all {total} texts are in {out}", file=sys.stderr)
    return 2 if wrong else 0


PROCESSES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}  # what `accelerate launch` and torchrun set


def own_device(local: int) -> str | None:
    """The GPU of process `local` of this machine; None where there is none."""
    import torch

    return f"cuda:{local}" if torch.cuda.is_available() else None


def check(args) -> None:
    """Raises ValueError for options that do not go with --out."""
    if args.prompts in (None, "-") or args.prompt:
        raise ValueError("--out takes its prompts from a file, so that it can go on after a stop: give --prompts FILE")
    given = [name for name in IDLE if getattr(args, name)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise ValueError(f"{option} has no effect with --out, which writes a file of JSON lines: leave it out")
    if Path(args.out).resolve() == Path(args.prompts).resolve():
        raise ValueError(f"--out and --prompts are both {args.out}: give another --out")


def summary(path: Path, count: int, wrong: int, tokens: int, seconds: float) -> str:
    """What was done, in a line."""
    words = f"{path}: {count} texts, {tokens} tokens in {duration(seconds)}, {tokens / max(seconds, 1e-9):.0f} tokens/s"
    return words + (f"; {wrong} prompts did not fit: their lines say why" if wrong else "")
