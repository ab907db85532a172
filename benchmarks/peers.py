"""Ours beside LLaDA's, Fast-dLLM's and dllm's samplers: the same weights and prompt, tokens compared, runs alternating.

    dlm bench peers --peer llada=PATH --peer fast-dllm=PATH --peer dllm=PATH --config 25m --cells none:32:64 dual:32:64

PATH is a clone on this disk; nothing of theirs is in this repository. Tried with LLaDA b7e6c35 (2026-06-25), Fast-dLLM
24cc59e (2025-06-27, the commit with llada/generate.py as one file) and dllm ca17675 (2026-04-14), on transformers 5.23
and torch 2.13. What they need there, and get here without a change of their files:

- `einops` is imported by both modelling files and used only in block types that LLaDA does not have: an empty module
  stands in for it where it is not installed.
- transformers 5 configurations have no `use_cache` of their own: it is set to false, as in LLaDA's config.json.
- dllm's model class builds its weights on "cuda", whatever is there: the inner model is built on the device asked for
  and handed in. `from_pretrained` needs a `post_init` that neither calls: the weights are put in by load_state_dict.
- `import dllm` pulls in trainers and evaluators with their dependencies: its packages are entered without their
  __init__, and the samplers alone are imported.
- LLaDA's clone has no modelling code (it is on the hub): its sampler runs on dllm's copy of it, else on Fast-dLLM's,
  else on our model, in this order of what was given.

Fast-dLLM's caches fail with an IndexError where a block has one step; dllm's do not. Such cells are shown as they end.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import dlm
from dlm.cli.parser import Parser
from dlm.cli.scripts import guarded
from dlm.cli.workload import open_workload, workload_options
from dlm.utils.files import write_json
from dlm.utils.names import check_name

if TYPE_CHECKING:
    import torch

Sampler = Callable[["torch.Tensor", int, int, int], "torch.Tensor"]  # prompt (1, P), length, block, steps -> (1, P + G)


# ---------------------------------------------------------------- their code, imported from where it lies


@contextmanager
def imports(path: Path, packages: Sequence[str] = ()):
    """`path` first in the import path, `packages` entered without their __init__; modules of theirs, which have names
    as general as `model` and `generate`, are forgotten afterwards."""
    before = dict(sys.modules)
    if importlib.util.find_spec("einops") is None:
        sys.modules["einops"] = ModuleType("einops")
        sys.modules["einops"].rearrange = None
    for name in packages:
        package = ModuleType(name)
        package.__path__ = [str(path.joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("model", "generate", "dllm", "einops"):
                del sys.modules[name]


def _built(modelling: ModuleType, name: str, configuration, ours) -> torch.nn.Module:
    """Their model class `name` with our weights."""
    fields = ours.config.to_dict()
    left_out = ("architectures", "block_length", "dtype", "torch_dtype", "model_type", "use_cache")
    config = configuration(**{key: value for key, value in fields.items() if key not in left_out})
    config.use_cache = False
    inner = modelling.create_model_config_from_pretrained_config(config)
    inner.init_device = str(ours.device)
    body = getattr(modelling, name.removesuffix("LM"))(inner, init_params=False)
    model = getattr(modelling, name)(config, model=body)
    model.load_state_dict(ours.state_dict())
    return model.to(ours.device, ours.dtype).eval()


def _fast_dllm(path: Path, ours) -> tuple[dict[str, Sampler], torch.nn.Module]:
    with imports(path / "llada"):
        configuration = importlib.import_module("model.configuration_llada").LLaDAConfig
        model = _built(importlib.import_module("model.modeling_llada"), "LLaDAModelLM", configuration, ours)
        theirs = importlib.import_module("generate")
    mask_id = ours.config.mask_token_id

    def sampler(function) -> Sampler:
        return lambda prompt, length, block, steps: function(
            model, prompt, steps=steps, gen_length=length, block_length=block, mask_id=mask_id
        )[0]

    return {
        "none": sampler(theirs.generate),
        "prefix": sampler(theirs.generate_with_prefix_cache),
        "dual": sampler(theirs.generate_with_dual_cache),
    }, model


def _dllm(path: Path, ours) -> tuple[dict[str, Sampler], torch.nn.Module]:
    inside = ("core", "pipelines", "pipelines.llada", "pipelines.llada.models", "pipelines.fastdllm")
    llada, cached = "dllm.pipelines.llada.models", "dllm.pipelines.fastdllm.llada"
    with imports(path, ("dllm", *(f"dllm.{name}" for name in inside))):
        configuration = importlib.import_module(f"{llada}.configuration_llada").LLaDAConfig
        model = _built(importlib.import_module(f"{llada}.modeling_llada"), "LLaDAModelLM", configuration, ours)
        configuration = importlib.import_module(f"{cached}.models.configuration_llada").FastdLLMLLaDAConfig
        modelling = importlib.import_module(f"{cached}.models.modeling_llada")
        with_cache = _built(modelling, "FastdLLMLLaDAModelLM", configuration, ours)
        plain, fast = (importlib.import_module(name) for name in ("dllm.core.samplers.mdlm", f"{cached}.sampler"))
    ids = SimpleNamespace(
        mask_token_id=ours.config.mask_token_id, bos_token_id=0, eos_token_id=ours.config.pad_token_id
    )  # what the samplers read of a tokenizer

    def sampler(instance, settings, **more) -> Sampler:
        return lambda prompt, length, block, steps: instance.sample(
            list(prompt), settings(max_new_tokens=length, block_size=block, steps=steps, **more)
        )

    instance, settings = fast.FastdLLMLLaDASampler(with_cache, ids), fast.FastdLLMLLaDASamplerConfig
    return {
        "none": sampler(plain.MDLMSampler(model, ids), plain.MDLMSamplerConfig),
        "prefix": sampler(instance, settings, use_cache="prefix"),
        "dual": sampler(instance, settings, use_cache="dual"),
    }, model


class OursForThem:
    """Our model with the signature that LLaDA's sampler calls."""

    def __init__(self, model):
        self.model, self.device = model, model.device

    def __call__(self, tokens, attention_mask=None):
        return SimpleNamespace(logits=self.model.predict(tokens))


def _llada(path: Path, ours, model=None) -> tuple[dict[str, Sampler], torch.nn.Module | None]:
    with imports(path):
        theirs = importlib.import_module("generate")
    model = model or OursForThem(ours)

    def sample(prompt, length, block, steps):
        settings = {"steps": steps, "gen_length": length, "block_length": block}
        return theirs.generate(model, prompt, **settings, mask_id=ours.config.mask_token_id)

    return {"none": sample}, None


# name: (the file that a clone must have, what loads it); LLaDA's last, for it may run on another's model
PEERS = {
    "dllm": ("dllm/core/samplers/mdlm.py", _dllm),
    "fast-dllm": ("llada/generate.py", _fast_dllm),
    "llada": ("generate.py", _llada),
}


def load_peers(given: Sequence[str], ours) -> dict[str, dict[str, Sampler]]:
    """{peer: {method: sampler}} of `NAME=PATH` words. Raises ValueError for a name or a folder that is not right."""
    paths = {}
    for word in given:
        name, _, path = word.partition("=")
        check_name("peer", name, PEERS)
        if not (Path(path) / PEERS[name][0]).is_file():
            raise ValueError(f"peer {word!r}: {path or 'no path'} has no {PEERS[name][0]}; give the root of a clone")
        paths[name] = Path(path).resolve()
    loaded, model = {}, None
    for name, (_, load) in PEERS.items():
        if name in paths:
            loaded[name], theirs = load(paths[name], ours, model) if name == "llada" else load(paths[name], ours)
            model = model or theirs
    return loaded


# ---------------------------------------------------------------- side by side


def compare(samplers: dict[str, Sampler], prompt, length: int, block: int, steps: int, repeats: int, clock) -> dict:
    """Latencies (seconds, one a repeat) and tokens of every sampler, in turns; errors by name where one failed."""
    times, tokens, errors = {}, {}, {}
    for turn in range(repeats):
        for name, sample in samplers.items():
            if name in errors:
                continue
            try:
                began = clock()
                ids = sample(prompt, length, block, steps)
                ids = ids[0, prompt.shape[1] :].tolist()  # waits for the device
                times.setdefault(name, []).append(clock() - began)
            except (IndexError, RuntimeError, AssertionError, ValueError) as error:
                if name == "ours":
                    raise
                errors[name] = f"{type(error).__name__}: {error}"
                continue
            if turn == 0:
                tokens[name] = ids
    return {"times": times, "tokens": tokens, "errors": errors}


def report(cell: tuple[str, int, int], found: dict) -> dict:
    """A row of results: for every peer its median latency, tokens equal to ours, and the median ratio of its time to
    ours in the same turn; `ratio` is that of the fastest peer."""
    times, tokens = found["times"], found["tokens"]
    row = {"method": cell[0], "block": cell[1], "steps": cell[2], "ours": statistics.median(times["ours"]), "peers": {}}
    for name, taken in times.items():
        if name == "ours":
            continue
        row["peers"][name] = {
            "seconds": statistics.median(taken),
            "ratio": statistics.median(a / b for a, b in zip(taken, times["ours"], strict=True)),
            "equal": sum(a == b for a, b in zip(tokens[name], tokens["ours"], strict=True)) / len(tokens["ours"]),
        }
    row["errors"] = found["errors"]
    row["ratio"] = min((peer["ratio"] for peer in row["peers"].values()), default=None)
    return row


def _line(row: dict) -> str:
    peers = "   ".join(
        f"{name} {peer['seconds']:.2f} s ({peer['ratio']:.2f}x, {peer['equal']:.0%} of tokens equal)"
        for name, peer in row["peers"].items()
    )
    failed = "".join(f"   {name} failed ({error[:60]})" for name, error in row["errors"].items())
    return f"{row['method']:<7}{row['block']:>4} x {row['steps']:<4} ours {row['ours']:.2f} s   {peers}{failed}"


def run(argv: Sequence[str]) -> int:
    """Compare the cells and print a line for each; the rows are on the disk before the next one begins."""
    parser = Parser("bench peers", "--peer NAME=PATH [options]", __doc__)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help=f"one of {', '.join(PEERS)}")
    workload_options(parser)
    parser.writes(json="json")
    args = parser.parse(argv)
    if not args.peer:
        raise ValueError("no peer was given: --peer llada=PATH, fast-dllm=PATH or dllm=PATH")
    if args.batch != 1:
        raise ValueError(f"--batch is {args.batch}: the peers' samplers are compared on one prompt")
    work = open_workload(args)
    peers = load_peers(args.peer, work.model)
    rows = []
    for method, block, steps in work.cells:

        def sample(prompt, length, block, steps, method=method):
            config = dlm.SamplingConfig(gen_length=length, block_length=block, steps=steps, method=method)
            return dlm.generate(work.model, prompt, config).canvas.tokens

        samplers = {name: methods[method] for name, methods in peers.items() if method in methods} | {"ours": sample}
        compare(samplers, work.prompts, block, block, min(2, block), 1, work.clock)  # warm
        timings = compare(samplers, work.prompts, args.gen_length, block, steps, args.repeats, work.clock)
        rows.append(report((method, block, steps), timings))
        print(_line(rows[-1]), flush=True)
        if args.json:
            write_json(Path(args.json), rows, indent=1)
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    if ratios:
        print(f"against the fastest peer: {min(ratios):.2f}x at least, {statistics.median(ratios):.2f}x in the middle")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; a user's mistake is one line and exit code 2."""
    return guarded("dlm bench peers", run, argv)


if __name__ == "__main__":
    sys.exit(main())
