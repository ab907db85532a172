"""`dlm info`: what a checkpoint is, from its config and the headers of its weights, without loading them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dlm.checkpoints.inspect import describe
from dlm.cli import live
from dlm.cli.parser import Parser
from dlm.cli.session import print_json
from dlm.utils.settings import shown_default


def info(argv: Sequence[str]) -> int:
    """`dlm info`: print what a checkpoint is."""
    parser = Parser("info", "[PATH] [options]", "Say what a checkpoint is, and which methods suit it.")
    parser.add_argument("path", nargs="?", help="folder or hub id (default: the model that ships)")
    parser.add_argument("--model", metavar="PATH", help="the same as PATH")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse(argv)
    if args.model is not None and args.path is not None:
        raise ValueError(f"both {args.path} and --model {args.model} are given: name one checkpoint")
    args.path = args.path or args.model
    facts = describe(args.path, args.revision)
    if args.json:
        print_json(facts)
        return 0
    unknown = "not on this machine"
    grouped = "" if facts["heads"] == facts["kv_heads"] else f", {facts['kv_heads']} for keys"
    tokens = f", of which the tokenizer uses {facts['tokenizer']:,}" if facts["tokenizer"] else ", no tokenizer"
    masks, seen = facts["mask_id"] is not None, "full" if facts["methods"] else "causal"
    lines = {
        "checkpoint": facts["path"],
        "family": facts["family"],
        "objective": facts["objective"],
        "parameters": f"{facts['parameters']:,}" if facts["parameters"] else unknown,
        "on disk": f"{facts['bytes'] / 2**20:,.1f} MiB, {facts['dtype']}" if facts["bytes"] else unknown,
        "shape": f"{facts['layers']} layers, width {facts['width']}, {facts['heads']} heads{grouped}",
        "vocabulary": f"{facts['vocabulary']:,} tokens{tokens}",
        "mask": ", ".join([f"id {facts['mask_id']}", *filter(None, [facts["mask_token"]])]) if masks else "none",
        "max length": f"{facts['max_length']:,} tokens",
        "attention": _attention(facts, seen),
        "chat": "has a chat template" if facts["chat_template"] else "no chat template",
        "methods": ", ".join(facts["methods"]) or "none: it predicts the next token, and cannot fill in masks",
        "defaults": _options(facts["defaults"]) or "dlm's own",
    }
    if isinstance(facts["defaults"].get("chat"), dict):
        lines["in chats"] = _options(facts["defaults"]["chat"])
    for name, text in lines.items():
        print(live.printable(f"{name:<11} {text}", sys.stdout))
    return 0


def _options(options: dict) -> str:
    return ", ".join(f"{name} {shown_default(value)}" for name, value in options.items() if name != "chat")


def _attention(facts: dict, otherwise: str) -> str:
    """What a slot sees, in words; otherwise: of a model that is not block-causal."""
    if not facts["block_causal"]:
        return otherwise
    blocks = f"block-causal, blocks of {facts['block_length']}"
    return f"full, and {blocks}" if facts["full_attention"] else blocks
