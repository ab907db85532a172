"""Parity with the authors of every family: logits, ids and forward calls of folders of recorded cases.

`python -m tests.properties.family_parity FOLDER ...` prints a line a folder and exits 1 where a case differs. A folder
holds a checkpoint in its family's layout, `logits.safetensors` and `expected.json`; `settings` of each case are in the
words of its author and are mapped to ours here, by the function that they came from.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

import dlm
from dlm.models.attention import block_causal, full

TOLERANCE = 5e-4  # of logits


@dataclass(frozen=True)
class Case:
    """One recorded case in our words.

    prompts: ids of each row; lengths: tokens to generate after each. sampling: fields of `SamplingConfig`. model:
    fields of the checkpoint's configuration that the author's sampler sets. want: the author's ids of each row. cut:
    compare up to the first end-of-text, where the author cuts. runs_on: the author writes on after an end-of-text
    inside its block, so ids are compared without the stop and passes with it. nfe: his forward calls.
    uniforms: what his random numbers were, pass by pass.
    """

    name: str
    prompts: list[list[int]]
    lengths: list[int]
    sampling: dict[str, Any]
    want: list[list[int]]
    nfe: int
    model: dict[str, Any] = field(default_factory=dict)
    cut: bool = False
    runs_on: bool = False
    uniforms: list[list[float]] | None = None


# ---------------------------------------------------------------- the authors' words -> ours


def dream(case, settings) -> dict[str, Any]:
    """Dream's diffusion_generate: the region as one block, counts by time."""
    orders = {"maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy"}
    length = settings["max_new_tokens"]
    sampling = {"block_length": length, "steps": settings["steps"], "split": "time", "tempered_confidence": True}
    sampling["time_eps"] = settings.get("eps", 1e-3)
    if settings["alg"] == "origin":
        return sampling | {"commit": "origin", "tempered_confidence": False}
    sampling |= {name: settings[name] for name in ("top_p", "top_k") if settings.get(name)}
    return sampling | {"confidence": orders[settings["alg"]], "order_temperature": settings.get("alg_temp") or 0.0}


def dream_of_dllm(case, settings) -> dict[str, Any]:
    sampling = dream(case, {**settings, "eps": 1e-3}) | {"split": "rounded", "cfg_scale": settings["cfg_scale"]}
    return sampling


def dream_threshold(case, settings) -> dict[str, Any]:
    """Fast-dLLM without a cache: never more than the schedule has given so far."""
    length = settings["max_new_tokens"]
    steps = {"block_length": length, "steps": settings["steps"]}
    return steps | {"commit": "capped", "threshold": settings["threshold"]}


def dream_cached(case, settings) -> dict[str, Any]:
    """Fast-dLLM's block caches: the pass that fills the cache commits the block's first place."""
    method = "dual" if settings["dual_cache"] else "prefix"
    sampling = {"method": method, "block_length": settings["block_length"], "commit_first": True}
    if settings["alg"] == "confidence_threshold":
        return sampling | {"commit": "threshold", "threshold": settings["threshold"]}
    return sampling | {"steps": settings["steps"], "split": "time", "confidence": settings["alg"]}


def llada(case, settings) -> dict[str, Any]:
    kinds = {"low_confidence": None, "random": "random"}
    names = ("steps", "block_length", "cfg_scale", "temperature")
    return {name: settings[name] for name in names} | {"confidence": kinds[settings["remasking"]]}


def mdlm(case, settings) -> dict[str, Any]:
    length, block = settings["max_new_tokens"], settings["block_size"]
    passes = math.ceil(settings["steps"] / math.ceil(length / block))
    return {
        "block_length": block,
        "steps_per_block": passes,
        "split": "rounded",
        "cfg_scale": settings.get("cfg_scale", 0.0),
    }


def bd3lm(case, settings) -> dict[str, Any]:
    """Blocks that count from each prompt's end."""
    sampling = mdlm(case, settings) | {"method": "block_causal", "align": "prompt"}
    if settings.get("steps_per_block"):
        sampling["steps_per_block"] = settings["steps_per_block"]
    return sampling


def llada2(case, settings) -> dict[str, Any]:
    if "steps_per_block" in settings:  # dllm's
        steps = settings["steps_per_block"]
        length = settings["max_new_tokens"]
    else:
        length = settings["gen_length"]
        steps = settings["steps"]
    steps = min(steps, length // settings["minimal_topk"])
    return {
        "method": "block_causal",
        "commit": "dynamic",
        "threshold": settings["threshold"],
        "steps_per_block": steps,
        "whole_blocks": True,
    }


def llada21(case, settings) -> dict[str, Any]:
    passes = math.ceil(settings["block_length"] / settings["num_to_transfer"])
    return {
        "method": "block_causal",
        "commit": "dynamic",
        "threshold": settings["threshold"],
        "steps_per_block": passes,
        "whole_blocks": True,
        "revise": "edit",
        "edit_threshold": settings["editing_threshold"],
        "max_post_passes": settings["max_post_steps"],
    }


def sdar(case, settings) -> dict[str, Any]:
    rules = {"low_confidence_static": "quota", "low_confidence_dynamic": "dynamic", "sequential": "sequential"}
    sampling = {
        "method": "block_causal",
        "commit": rules[settings["remasking_strategy"]],
        "threshold": settings["confidence_threshold"],
        "steps_per_block": settings["denoising_steps"],
        "whole_blocks": True,
    }
    if settings["top_k"] == 1:  # the confidence is of what is sampled from, which is one token
        return sampling | {"top_k": 1, "tempered_confidence": True}
    return sampling


def fast_dllm(case, settings) -> dict[str, Any]:
    return {
        "method": "block_causal",
        "commit": "dynamic",
        "threshold": settings["threshold"],
        "sub_block_length": settings["small_block_size"],
        "sub_block_cache": settings["use_block_cache"],
        "commit_first": True,
    }


def rnd1(case, settings) -> dict[str, Any]:
    """RND1's diffusion_sample: the region as one block, the places of least entropy first."""
    length = settings["max_new_tokens"]
    return {"block_length": length, "steps": settings["num_steps"], "split": "floored", "confidence": "entropy"}


# The end of a source's function (and file) -> its mapping.
MAPPINGS: dict[str, Callable] = {
    "DreamGenerationMixin.diffusion_generate": dream,
    "DreamSampler.sample": dream_of_dllm,
    "DreamGenerationMixin.diffusion_generate (alg confidence_threshold)": dream_threshold,
    "DreamGenerationMixin.diffusion_generate (block cache)": dream_cached,
    "generate": llada,
    "MDLMSampler.sample": mdlm,
    "BD3LMSampler.sample": bd3lm,
    "LLaDA2MoeModelLM.generate": llada2,
    "LLaDA2Sampler.sample": llada2,
    "LLaDA2MoeModelLM.generate (LLaDA2.1)": llada21,
    "block_diffusion_generate": sdar,
    "diffusion_sample": rnd1,
    "Fast_dLLM_QwenForCausalLM.generate": fast_dllm,
    "Fast_dLLM_QwenForCausalLM.batch_sample": fast_dllm,
}
BLOCK_NAMES = ("block_length", "block_size")
END_NAMES = ("eos_id", "stop_token", "eos_token_id")
CUTS = (llada2, llada21, fast_dllm)  # whose answers end with the first end-of-text


def cases(folder: Path) -> Iterator[Case]:
    """The recorded cases of a folder in our words."""
    recorded = json.loads((folder / "expected.json").read_text())
    for number, case in enumerate(recorded["cases"]):
        settings, function = case["settings"], case["source"]["function"]
        mapping = MAPPINGS[function]
        prompts = case.get("prompts") or [
            [token for token, real in zip(row, mask, strict=True) if real]
            for row, mask in zip(
                case["prompt"], case.get("attention_mask") or [[1] * len(row) for row in case["prompt"]], strict=True
            )
        ]
        sampling = {name: value for name, value in mapping(case, settings).items() if value is not None}
        block = next((settings[name] for name in BLOCK_NAMES if name in settings), None)
        length = settings.get("gen_length") or settings.get("max_new_tokens")
        lengths = [length] * len(prompts)
        model = {"mask_token_id": recorded.get("mask_token_id", settings.get("mask_id"))}
        if mapping in (llada2, llada21, sdar, fast_dllm):
            model["block_length"] = block
        if settings.get("right_shift_logits"):
            model["shift_logits"] = True
        if mapping is fast_dllm:
            blocks = {len(row): len(row) // block + length // block for row in prompts}
            most = max(blocks.values()) if function.endswith("batch_sample") else None
            lengths = [(most or blocks[len(row)]) * block + 1 - len(row) for row in prompts]
        end = next((settings[name] for name in END_NAMES if name in settings), None)
        stops = settings.get("stopping_criteria_idx")
        end = stops[0] if stops else end
        if (mapping in (*CUTS, bd3lm) or stops) and function != "LLaDA2Sampler.sample":
            sampling |= {"stop_at_eos": True, "eos_token_id": end}
        want = case.get("sequences")
        if want is None:  # a canvas: the answer up to where it was left masked
            rows = [row[len(prompt) :] for row, prompt in zip(case["canvas"], prompts, strict=True)]
            want = [row[: row.index(settings["mask_id"])] if settings["mask_id"] in row else row for row in rows]
        yield Case(
            f"{number} {function}",
            prompts,
            lengths,
            sampling,
            want,
            case["nfe"],
            model,
            cut=mapping in CUTS,
            runs_on=mapping is bd3lm or bool(stops),
            uniforms=case.get("uniforms_per_step"),
        )


# ---------------------------------------------------------------- running them


def configured(model, fields: dict[str, Any]):
    """The model with these fields of its configuration set."""
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


def run(model, case: Case, **changes):
    """(ids of each row, forward calls of each row) of our sampler."""
    mask = case.model["mask_token_id"]
    rows = [prompt + [mask] * length for prompt, length in zip(case.prompts, case.lengths, strict=True)]
    canvas = dlm.Canvas.from_templates(rows, mask)
    config = dlm.SamplingConfig(**{**case.sampling, **changes})
    if case.uniforms is None:
        out = dlm.generate(model, canvas, config)
    else:
        with mock.patch("dlm.sampling.propose._uniform", recorded_numbers(case.uniforms)):
            out = dlm.generate(model, canvas, config)
    sizes = zip(case.prompts, case.lengths, out.canvas.tokens, strict=True)
    return [tokens[len(prompt) : len(prompt) + length].tolist() for prompt, length, tokens in sizes], out.nfe.tolist()


def recorded_numbers(uniforms: list[list[float]]):
    """What `_uniform` gives when the author's numbers are dealt out: those of a pass, row by row."""
    passes = iter(uniforms)

    def deal(counts, generators, logits):
        numbers = iter(next(passes))
        noise = torch.ones(logits.shape[:-1], dtype=torch.float64)
        for row, count in zip(noise, counts, strict=True):
            row[:count] = torch.tensor([next(numbers) for _ in range(count)], dtype=torch.float64)
        return noise

    return deal


def differs(model, case: Case) -> str | None:
    """What is not as the author has it; None where nothing is."""
    configured(model, case.model)
    ids, nfe = run(model, case)
    if case.runs_on:
        ids, _ = run(model, case, stop_at_eos=False)
    for row, (got, want) in enumerate(zip(ids, case.want, strict=True)):
        if case.cut or case.runs_on:
            end, got = case.sampling.get("eos_token_id"), got[: len(want)]
            if not case.runs_on and want and want[-1] != end and len(want) < case.lengths[row]:
                return f"row {row}: the author's answer ends after {len(want)} tokens without an end-of-text"
        if got != want:
            pairs = enumerate(zip(got, want, strict=False))
            at = next((i for i, (one, other) in pairs if one != other), min(len(got), len(want)))
            return f"row {row}: ids differ from place {at} on ({got[at : at + 3]} for {want[at : at + 3]})"
    if max(nfe) > case.nfe:
        return f"{max(nfe)} forward calls, and the author's {case.nfe}"
    return None


def logits_error(model, folder: Path) -> float:
    """The largest difference of the recorded logits; a block length is read from what the folder says of them."""
    data = load_file(folder / "logits.safetensors")
    said = re.search(r"blocks of (\d+)", json.loads((folder / "expected.json").read_text()).get("logits", ""))
    errors = []
    for key in (key for key in data if key.startswith("logits")):
        named = re.search(r"block(\d+)", key) or said
        visible = full if "full" in key or named is None else block_causal(int(named[1]))
        valid = data["padding_mask"].bool() if "padding" in key else None
        with torch.inference_mode():
            got = getattr(model, "predict", model)(data["input_ids"], visible=visible, valid=valid)
        got = got.logits if hasattr(got, "logits") else got
        error = (got - data[key]).abs()
        errors.append(float((error if valid is None else error[valid]).max()))
    return max(errors)


def check(folder: Path, verbose: bool = False) -> tuple[bool, str]:
    """Whether a folder is as the authors have it, and a line that says so."""
    error = logits_error(dlm.load(folder)[0], folder)
    tally, good, problems = Counter(), Counter(), []
    model, _ = dlm.load(folder)
    original = {name: getattr(model.config, name) for name in ("block_length", "shift_logits", "mask_token_id")}
    for case in cases(folder):
        configured(model, original)
        kind = case.name.split(" ", 1)[1]
        tally[kind] += 1
        try:
            problem = differs(model, case)
        except (ValueError, AssertionError, TypeError) as refusal:
            problem = f"{type(refusal).__name__}: {refusal}"
        good[kind] += problem is None
        if problem:
            problems.append(f"    case {case.name}: {problem}")
    each = ", ".join(f"{kind} {good[kind]}/{count}" for kind, count in tally.items())
    fine = error <= TOLERANCE and not problems
    line = f"{folder.name}: logits {error:.1e}; {sum(good.values())} of {sum(tally.values())} cases equal ({each})"
    return fine, "\n".join([line, *problems])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.properties.family_parity", description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path, help="checkpoint, logits.safetensors and expected.json")
    args = parser.parse_args(arguments)
    fine = True
    for folder in args.folder:
        good, text = check(folder)
        print(text, flush=True)
        fine &= good
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
