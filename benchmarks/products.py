"""What `--compile` gains on a CPU in float32: products of few rows, passes over few slots, a text.

    dlm bench products                                   (the model that ships, one thread)
    dlm bench products --config 25m --threads 2

Variants take turns in one process: oneDNN's products and torch's small operations (`plain`), compiled small operations
and attention (`small`), all layers in one compiled call (`compiled`). The weights of timed products lie outside the
processor's caches. Times are medians, a ratio the median of the turns' own.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

if __package__ in (None, ""):  # run by path from a clone: find dlm/ beside benchmarks/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.cli.parser import Parser, check_least
from dlm.cli.workload import clock_of

ROWS = [1, 2, 4, 8, 16, 32, 96, 288]
BEYOND = 2**26  # bytes of copies of a weight, more than a processor's caches hold


def parser() -> Parser:
    made = Parser("bench products", "[options]", __doc__)
    add = made.add_argument
    add("--config", metavar="NAME", help="a shape with random weights instead of the model that ships")
    add("--rows", type=int, nargs="+", default=ROWS, metavar="M", help=f"of products and passes (default: {ROWS})")
    add("--canvas", type=int, default=288, metavar="T", help="slots whose keys are stored (default: 288)")
    add("--gen-length", type=int, default=64, metavar="N", help="tokens of a text (default: 64)")
    add("--repeats", type=int, default=60, metavar="N", help="turns; a tenth of them for texts (default: 60)")
    add("--threads", type=int, default=1, metavar="N", help="(default: 1)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's own time, on a machine in use")
    return made


def main(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    check_least(args, 1, "threads", "gen_length", "repeats")
    if not 1 <= min(args.rows) <= max(args.rows) <= args.canvas:
        raise ValueError(f"--rows are {args.rows}: each must lie between 1 and --canvas, {args.canvas}")
    import torch

    import dlm
    from dlm.kernels.linear import Blocked
    from dlm.kernels.native import Panels
    from dlm.kernels.packed import Packed
    from dlm.models.shapes import random_model

    torch.set_num_threads(args.threads)
    model = random_model(args.config, seed=0) if args.config else dlm.load_pretrained(dtype="float32").model.eval()
    plain = Packed(model)
    model.compiled = True
    compiled = Packed(model)

    def blocked(native, weights, biases):
        return Blocked.of(weights, biases)

    with patch.object(Panels, "of", blocked), patch.object(Panels, "gate_up", blocked):
        small = Packed(model)
    predictors = {"plain": plain, "small": small, "compiled": compiled}
    with torch.no_grad():
        products(args, compiled)
        passes(args, predictors)
        texts(args, predictors)
    return 0


def turns(works: dict[str, Callable[[int], object]], args: Namespace, part: int = 1) -> dict[str, list[float]]:
    """Seconds of each work, called with the number of its turn, --repeats / part of them; every second turn the other
    way round."""
    clock = clock_of(args)
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-1, -(-args.repeats // part)):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            begin = clock()
            works[name](turn)
            if turn >= 0:  # the first warms up
                spent[name].append(clock() - begin)
    return spent


def ratio(spent: dict[str, list[float]], first: str, second: str) -> float:
    """The median over turns."""
    return statistics.median(a / b for a, b in zip(spent[first], spent[second], strict=True))


def products(args, compiled) -> None:
    import torch

    from dlm.kernels.linear import Blocked
    from dlm.kernels.native import Panels

    layer, generator = compiled.layers[0], torch.Generator().manual_seed(0)
    linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
    shapes = [(each.weight.shape[1], each.outputs * (1 + each.both)) for each in linears]
    print("| product | rows | oneDNN, us | panels, us | ratio | GB/s | GFLOP/s | same bits |\n|" + "---|" * 8)
    for inputs, outputs in [*shapes, (compiled.head.weight.shape[1], compiled.head.outputs)]:
        size = 4 * inputs * outputs
        weights = [torch.randn(outputs, inputs, generator=generator) for _ in range(max(2, BEYOND // size))]
        blocked = [Blocked.of([weight], [None]) for weight in weights]
        panels = [Panels.of(compiled.small, [weight], [None]) for weight in weights]
        for rows in args.rows:
            x = torch.randn(1, rows, inputs, generator=generator)
            works = {"blocked": partial(_one_of, blocked, x), "panels": partial(_one_of, panels, x)}
            spent = turns(works, args)
            times = [statistics.median(some) for some in spent.values()]
            cells = [f"{inputs} -> {outputs}", rows, *(f"{1e6 * some:.0f}" for some in times)]
            cells.append(f"{ratio(spent, 'blocked', 'panels'):.2f}")
            cells += [" and ".join(f"{each / some:.3g}" for some in times) for each in (size / 1e9, size / 2e9 * rows)]
            print("|", *(f"{cell} |" for cell in cells), torch.equal(blocked[0](x), panels[0](x)), "|", flush=True)


def _one_of(layers: Sequence, x, turn: int):
    return layers[turn % len(layers)](x)


def passes(args, predictors) -> None:
    import torch

    from dlm.kernels.by_rows import RowSizes
    from dlm.models.kv_cache import KVCache

    slots, generator = args.canvas, torch.Generator().manual_seed(0)
    caches = {name: KVCache(1, slots) for name in predictors}
    words = len(predictors["plain"].embedding)
    whole = torch.randint(0, words, (1, slots), generator=generator)
    for name, predictor in predictors.items():
        predictor(whole, torch.arange(slots)[None], cache=caches[name])
    _heading("slots of a pass", "ms")
    for queries in args.rows:
        at, asked = torch.arange(slots - queries, slots)[None], torch.arange(min(queries, 32))[None]
        more = {"logits_to_keep": asked, "sizes": RowSizes((queries,), (slots,), (asked.shape[1],))}
        works = {}
        for name, predictor in predictors.items():
            works[name] = _always(partial(predictor, whole[:, :queries], at, cache=caches[name], **more))
        print(f"| {queries} | {_row(turns(works, args), 1e3)} |", flush=True)


def texts(args, predictors) -> None:
    import torch

    import dlm

    prompt = [[17, 300, 41, 9, 77, 120, 8, 55]]
    _heading("text", "s", "same tokens")
    methods = ["none", "dual", *([] if args.config else ["block_causal"])]
    for method in methods:
        config = dlm.SamplingConfig(
            gen_length=args.gen_length, block_length=8, steps=args.gen_length, method=method, temperature=0.8, seed=1
        )
        works = {name: _always(partial(dlm.generate, each, prompt, config)) for name, each in predictors.items()}
        written = [dlm.generate(each, prompt, config).sequences for each in predictors.values()]
        same = all(torch.equal(written[0], other) for other in written)
        print(f"| {method} | {_row(turns(works, args, 10), 1)} | {same} |", flush=True)


def _always(work: Callable[[], object]) -> Callable[[int], object]:
    return lambda turn: work()


def _heading(what: str, unit: str, *more: str) -> None:
    words = [what, *(f"{name}, {unit}" for name in ("plain", "small", "compiled"))]
    words += ["plain / compiled", "small / compiled", *more]
    print(f"\n| {' | '.join(words)} |\n|{'---|' * len(words)}")


def _row(spent, factor: float) -> str:
    medians = " | ".join(f"{factor * statistics.median(times):.3g}" for times in spent.values())
    return f"{medians} | {ratio(spent, 'plain', 'compiled'):.2f} | {ratio(spent, 'small', 'compiled'):.2f}"


if __name__ == "__main__":
    from dlm.cli.main import main as command

    sys.exit(command(["bench", "products", *sys.argv[1:]]))
