"""Make an autoregressive checkpoint (llama, qwen2, qwen3, dlm's own) a diffusion one, to be trained further.

    dlm train convert --from Qwen/Qwen3-0.6B --to runs/a2d                      (full attention)
    dlm train convert --from Qwen/Qwen3-0.6B --to runs/bd4 --block-length 4     (block-causal)

Its weights stay; its causal mask goes, and it gets a mask token. It writes text only after training.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from dlm.cli.scripts import guarded
from dlm.utils.settings import OptionParser

ORIGINS = {
    "own": "the tokenizer's own",
    "taken": "a reserved token",
    "free": "in a row of the embeddings that was free",
    "grown": "in one more row of the embeddings",
}


def run(argv: list[str]) -> int:
    """Parse the options, convert, and say what was written and how to train it."""
    parser = OptionParser("dlm train convert", __doc__)
    parser.add_argument("--from", dest="source", required=True, metavar="PATH", help="folder or hub id of a checkpoint")
    parser.add_argument("--to", dest="out", required=True, metavar="PATH", help="folder to write")
    parser.add_argument("--block-length", type=int, metavar="N", help="slots of a block (default: full attention)")
    parser.add_argument("--shift", action="store_true", help="keep the guess for a slot at the slot before")
    parser.add_argument("--mask-token", metavar="TEXT", help="a reserved token, or a new one (default: found or added)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    args = parser.parse(argv)
    from dlm.checkpoints.convert import convert

    made = convert(
        args.source, args.out, block_length=args.block_length, shift=args.shift, mask_token=args.mask_token,
        revision=args.revision,
    )  # fmt: skip
    seen = "full attention" if args.block_length is None else f"block-causal with blocks of {args.block_length}"
    shifted = "guesses at the slot before" if args.shift else "guesses at their own slot"
    mask, word = made.mask, f"{made.mask.word}, " if made.mask.word else ""
    print(f"wrote {made.folder}: {made.family}, {made.parameters / 1e6:.2f}M parameters, {seen}, {shifted}")
    print(f"mask token: {word}id {mask.number}, {ORIGINS[mask.origin]}")
    objective = "" if args.block_length is None else f" --objective block_diffusion --block-length {args.block_length}"
    print(f"next: dlm train pretrain --model {made.folder}{objective} --data YOUR.txt")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; a user's mistake is one line and exit code 2."""
    return guarded("convert", run, argv)


if __name__ == "__main__":
    sys.exit(main())
