"""What a constraint costs: the host's time a pass for a JSON schema over a large vocabulary, beside a GPU's pass.

    dlm bench constraint                                  (126,464 tokens, a schema with ten fields)
    dlm bench constraint --vocabulary 32000 --schema schema.json --tokens 4

Proposals are random; times are of the process (user and system), so that other work on the machine counts little. What
a device does with the sets (a byte a place and token, gathered and then read) is not in them. The pass that they are
compared with is the cost model's, of --config on --machine: no GPU is needed.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside benchmarks/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.cli.parser import Parser, check_least

FIELDS = {
    "name": {"type": "string"}, "age": {"type": "integer"}, "email": {"type": "string"}, "active": {"type": "boolean"},
    "score": {"type": "number"}, "city": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}},
    "role": {"enum": ["admin", "editor", "reader"]}, "visits": {"type": "integer"}, "note": {"type": "string"},
}  # fmt: skip
SCHEMA = {"type": "object", "properties": FIELDS, "required": list(FIELDS)}


class Vocabulary:
    """A byte-level vocabulary of a size: the shipped model's tokens, and joined pairs and triples of them."""

    backend_tokenizer = SimpleNamespace(decoder="ByteLevel")

    def __init__(self, tokenizer, size: int):
        rng, special = random.Random(0), set(tokenizer.all_special_ids)
        words = [word for word, number in tokenizer.get_vocab().items() if number not in special]
        pieces, taken = list(words), set(words)
        words = words[: size - 2]
        while len(words) < size - 2:
            word = "".join(rng.choices(pieces, k=rng.choice((2, 2, 3))))
            if len(word) <= 16 and word not in taken:
                taken.add(word)
                words.append(word)
        self.words = [*words, "<mask>", "<end>"]
        self.mask_token_id, self.end = size - 2, size - 1
        self.all_special_ids = [self.mask_token_id, self.end]
        self.added_tokens_decoder: dict = {}

    def __len__(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def parser() -> Parser:
    made = Parser("bench constraint", "[options]", __doc__)
    add = made.add_argument
    add("--vocabulary", type=int, default=126_464, metavar="N", help="tokens (default: 126464)")
    add("--schema", metavar="FILE", help="JSON schema (default: one with ten fields)")
    add("--gen-length", type=int, default=256, metavar="N", help="tokens of the region (default: 256)")
    add("--block-length", type=int, default=32, metavar="N", help="(default: 32)")
    add("--tokens", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="a pass (default: 1 2 4)")
    add("--passes", type=int, default=64, metavar="N", help="that are timed (default: 64)")
    add("--config", default="llada-8b", metavar="NAME", help="of the pass compared with (default: llada-8b)")
    add("--machine", default="h100", metavar="NAME", help="h100, h200 or b200 (default: h100)")
    add("--json", metavar="FILE", help="write the numbers there")
    made.writes(json="json")
    return made


def main(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    check_least(args, 1, "gen_length", "block_length", "passes")
    check_least(args, 5000, "vocabulary")
    from dlm.benchmarking.cost import MACHINES, pass_seconds
    from dlm.models.shapes import shape_config
    from dlm.utils.names import check_name

    check_name("machine", args.machine, MACHINES)
    schema = Path(args.schema).read_text(encoding="utf-8") if args.schema else json.dumps(SCHEMA)
    config, machine = shape_config(args.config), MACHINES[args.machine]
    slots = args.gen_length + 32
    window = 1000 * pass_seconds(config, machine, "bfloat16", 1, args.block_length, slots, args.block_length)
    whole = 1000 * pass_seconds(config, machine, "bfloat16", 1, slots, slots, args.block_length)
    first, again, rows = measure(args, schema)
    print(f"automaton: {first['seconds']:.2f} s once ({first['states']} states, {first['classes']} classes of tokens), "
          f"{1e6 * again:.0f} µs for every later request")  # fmt: skip
    print(f"a pass of {args.config} on one {args.machine}, by the cost model: {window:.1f} ms for a block of "
          f"{args.block_length} with a cache, {whole:.1f} ms for {slots} slots without")  # fmt: skip
    for row in rows:
        row |= {"share_of_block_pass": row["ms"] / window, "share_of_whole_pass": row["ms"] / whole}
        print(
            f"{row['tokens']} tokens a pass, request {row['request']}: {row['ms']:.2f} ms of the host a pass "
            f"(median {row['median']:.2f}), "
            f"{100 * row['ms'] / window:.0f}% of the block's pass, {100 * row['ms'] / whole:.0f}% of the whole one"
        )
    if args.json:
        from dlm.utils.files import write_json
        from dlm.utils.hardware import commit, hardware, versions

        facts = {"commit": commit(), "hardware": hardware(), "versions": versions(), "options": vars(args)}
        results = {"compile": first, "again_seconds": again, "block_pass_ms": window, "whole_pass_ms": whole}
        write_json(Path(args.json), results | {"rows": rows} | facts, indent=1)
    return 0


def measure(args, schema: str) -> tuple[dict, float, list[dict]]:
    """(the automaton and the seconds that it took, seconds of asking for it again, rows by tokens and request)."""
    from dlm.checkpoints.files import SHIPPED
    from dlm.sampling.automaton import compile_pattern
    from dlm.sampling.patterns import schema_pattern
    from dlm.tokenizer import load_tokenizer

    words = Vocabulary(load_tokenizer(SHIPPED), args.vocabulary)
    start = time.process_time()
    automaton = compile_pattern(words, schema_pattern(schema), (words.end,))
    first = {"seconds": time.process_time() - start, "states": automaton.states, "classes": automaton.delta.shape[1]}
    start = time.process_time()
    compile_pattern(words, schema_pattern(schema), (words.end,))
    again = time.process_time() - start
    rows = []
    for tokens in args.tokens:
        automaton.memo.clear()
        for request in (1, 2):  # another text of the same schema, which finds steps that the first has taken
            spent = timed_passes(args, automaton, words, tokens, seed=request)
            mean, middle = sum(spent) / len(spent), sorted(spent)[len(spent) // 2]
            row = {"tokens": tokens, "request": request, "passes": len(spent), "ms": 1000 * mean}
            rows.append(row | {"median": 1000 * middle})
    return first, again, rows


def timed_passes(args, automaton, words: Vocabulary, tokens: int, seed: int) -> list[float]:
    """Seconds of the constraint's own work in each pass, of one row that is written block by block."""
    import numpy as np
    import torch

    from dlm.sampling.constraints import Constraint, Written, commit_in_order, open_sets

    rng = np.random.default_rng(seed)
    constraint = Constraint(automaton, tuple(range(args.gen_length)))
    written = [Written([constraint], [words.mask_token_id] * args.gen_length, words.mask_token_id, "greedy")]
    some = np.zeros(automaton.delta.shape[1], np.int64)  # a token of each class
    some[automaton.classes] = np.arange(len(automaton.classes))
    masked, spent = list(range(args.gen_length)), []

    def again(row: int, place: int, here) -> tuple[int, float]:
        return int(here.argmax()), 0.5  # a GPU's proposal: not the host's time

    while masked and len(spent) < args.passes:
        block = [slot for slot in masked if slot // args.block_length == masked[0] // args.block_length]
        slots = torch.tensor([block])
        start = time.process_time()
        open_sets(written, slots, torch.ones_like(slots, dtype=torch.bool))
        first = time.process_time() - start
        kinds = [rng.choice(np.flatnonzero(classes)) for _, _, classes in written[0].classes(block)]
        token, sure = torch.from_numpy(some[kinds])[None], torch.from_numpy(rng.random((1, len(block))))
        chosen = torch.zeros_like(slots, dtype=torch.bool).scatter(1, sure.topk(min(tokens, len(block))).indices, True)
        start = time.process_time()
        _, _, chosen = commit_in_order(written, slots, token, sure, chosen, again, keep_count=True)
        spent.append(first + time.process_time() - start)
        done = set(slots[chosen].tolist())
        masked = [slot for slot in masked if slot not in done]
    return spent


if __name__ == "__main__":
    from dlm.cli.main import main as command

    sys.exit(command(["bench", "constraint", *sys.argv[1:]]))
