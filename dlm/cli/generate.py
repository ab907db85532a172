"""`dlm generate`: continue texts."""

from __future__ import annotations

from collections.abc import Sequence

from dlm.cli.batch import add_common, check_counts, check_texts, run_jobs
from dlm.cli.chat import check_chat
from dlm.cli.parser import Parser
from dlm.cli.prompts import gather_prompts
from dlm.cli.session import Job, Result, announce, check_region, print_json, print_text, settings, text_of, text_pieces


def generate(argv: Sequence[str]) -> int:
    """`dlm generate`: continue texts."""
    parser = Parser("generate", "[PROMPT ...] [options]", "Continue each prompt with text that denoises.")
    parser.add_argument("prompt", nargs="*", help="text to continue")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    add_common(parser, argv, "answers" if "--chat" in argv else "text")
    parser.add_argument(
        "--out", metavar="FILE", help="write the texts of --prompts there as JSON lines; the same command goes on later"
    )
    args = parser.parse(argv)
    check_counts(args)
    if args.out is not None:
        from dlm.cli.offline import run_offline

        return run_offline(args)
    prompts = gather_prompts(args, 'dlm generate "Once upon a time"')
    opened = announce(args)
    config = settings(args, opened.chat_defaults if args.chat else opened.defaults)
    from dlm.chat_template import chat_ids
    from dlm.tokenizer import encode_prompt

    if args.chat:
        check_chat(opened)
    check_region(opened, config.gen_length, "--gen-length")
    check_texts(opened, prompts)
    region = [opened.mask_id] * config.start_length
    ids = [
        chat_ids(opened.codec, [{"role": "user", "content": prompt}], opened.mask_id)
        if args.chat
        else encode_prompt(opened.codec, prompt, opened.mask_id)
        for prompt in prompts
    ]
    pairs = ((prompt, head) for prompt, head in zip(prompts, ids, strict=True) for _ in range(args.num_samples))
    jobs = (Job(head + region, prompt, config.seed + index) for index, (prompt, head) in enumerate(pairs))

    def show(result: Result) -> None:
        pieces = text_pieces(opened, result, config, head="" if args.json or args.chat else result.job.prompt)
        if args.json:
            print_json(result.record(text_of(pieces)))
        else:
            print_text(pieces)

    return run_jobs(opened, jobs, config, args, show)
