"""Dream and LLaDA2 at 25M: their authors' code in a clone of dllm against dlm, the same weights and tokens.

    git clone https://github.com/ZHZisZZ/dllm && python -m benchmarks.families --dllm dllm --family dream

Runs alternate; the best of each counts, in seconds and in CPU seconds (which other programs disturb less).
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
import types
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a clone: find dlm/ beside benchmarks/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.cli.scripts import guarded
from dlm.utils.files import write_json
from dlm.utils.settings import OptionParser

VOCABULARY, MASK, END, PROMPT = 8192, 8191, 8190, 32
COMMON = {
    "hidden_size": 384, "num_attention_heads": 6, "vocab_size": VOCABULARY, "mask_token_id": MASK, "eos_token_id": END,
    "pad_token_id": END, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_scaling": None,
}  # fmt: skip
SHAPES = {
    "dream": {**COMMON, "model_type": "Dream", "intermediate_size": 1536, "num_hidden_layers": 8,
              "num_key_value_heads": 6, "rope_theta": 1e6},
    "llada2": {**COMMON, "model_type": "llada2_moe", "intermediate_size": 1024, "moe_intermediate_size": 160,
               "num_hidden_layers": 6, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 16,
               "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "num_shared_experts": 1,
               "first_k_dense_replace": 1, "rope_theta": 6e5, "partial_rotary_factor": 0.5, "use_bias": False,
               "use_qkv_bias": False, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
}  # fmt: skip


def run(argv: list[str]) -> int:
    """Parse the options, make the weights, check that both write the same tokens, and time them."""
    parser = OptionParser("dlm bench families", __doc__)
    parser.add_argument("--dllm", required=True, metavar="PATH", help="a clone of dllm")
    parser.add_argument("--family", choices=SHAPES, default="dream", help="whose code (default: dream)")
    parser.add_argument("--gen-length", type=int, default=32, metavar="N", help="tokens to write (default: 32)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    args = parser.parse(argv)
    import torch
    from safetensors.torch import save_file

    import dlm

    if args.family == "llada2" and args.gen_length % 32:
        raise ValueError(f"--gen-length is {args.gen_length}: LLaDA2's sampler writes blocks of 32; give a multiple")
    code = Path(args.dllm) / "dllm"
    if not code.is_dir():
        raise ValueError(f"{args.dllm} is no clone of dllm: it has no folder dllm")
    fields, state = SHAPES[args.family], weights(SHAPES[args.family])
    prompt = torch.randint(0, 8000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    theirs = {"dream": dream, "llada2": llada2}[args.family](code, fields, state, prompt, args.gen_length)
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", fields)
        save_file(state, Path(folder) / "model.safetensors", {"format": "pt"})
        model = dlm.load_pretrained(folder, device="cpu").predictor
    config = {
        "dream": {"steps": args.gen_length, "block_length": args.gen_length, "split": "time"},
        "llada2": {"method": "block_causal", "commit": "dynamic", "threshold": 0.95, "whole_blocks": True,
                   "steps_per_block": 32},
    }[args.family]  # fmt: skip
    settings = dlm.SamplingConfig(gen_length=args.gen_length, **config)

    def ours():
        return dlm.generate(model, prompt.tolist(), settings).sequences[0].tolist()

    same = theirs() == ours()
    timings = {"theirs": [], "ours": []}
    for _ in range(args.repeats):
        for name, once in (("theirs", theirs), ("ours", ours)):
            clock, busy = time.perf_counter(), time.process_time()
            once()
            timings[name].append((time.perf_counter() - clock, time.process_time() - busy))
    best = {name: [min(column) for column in zip(*runs, strict=True)] for name, runs in timings.items()}
    ratios = [one / other for one, other in zip(best["theirs"], best["ours"], strict=True)]
    size = sum(tensor.numel() for tensor in state.values())
    print(f"{args.family}: {size / 1e6:.1f}M parameters, the same tokens: {'yes' if same else 'NO'}")
    for name, (seconds, busy) in best.items():
        print(f"  {name:<6} {seconds:.3f} s, {busy:.3f} CPU s, {args.gen_length / busy:.1f} tokens a CPU second")
    print(f"  ratio  {ratios[0]:.2f} ({ratios[1]:.2f} in CPU seconds)")
    return 0 if same else 1


def weights(fields: dict) -> dict:
    """Random weights of these fields, by the authors' names."""
    import torch

    from dlm.models.families import expected_tensors, recognise

    family, generator, state = recognise(fields), torch.Generator().manual_seed(1), {}
    for name, shape in expected_tensors(family.model, family.config.from_dict(dict(fields))).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            state[name] = 0.01 * noise if "bias" in name else 1 + 0.1 * noise
        else:
            state[name] = noise if "embed" in name else noise / shape[-1] ** 0.5
    state["lm_head.weight"] *= 4
    return state


def module(code: Path, name: str):
    """A module of dllm without its packages' own imports, which ask for much more."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.utils import import_utils

    def default(config, device=None, seq_len=None, **more):  # which newer releases of transformers lack
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = int(head * getattr(config, "partial_rotary_factor", 1.0))
        return 1.0 / config.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float) / size), 1.0

    ROPE_INIT_FUNCTIONS.setdefault("default", default)
    import_utils.is_torch_fx_available = lambda: False
    parts = name.split(".")
    for end in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:end]))
        package.__path__ = [str(code.joinpath(*parts[1:end]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


def model_of(code: Path, place: str, config: str, model: tuple[str, str], fields: dict, state: dict):
    """The authors' model with these weights."""
    made = getattr(module(code, f"{place}.configuration_{config}"), model[1])(
        **{name: value for name, value in fields.items() if name != "model_type"}
    )
    made._attn_implementation = "sdpa"
    found = getattr(module(code, f"{place}.modeling_{config}"), model[0])(made).eval()
    found.load_state_dict(state)
    return found


def dream(code: Path, fields: dict, state: dict, prompt, length: int):
    """Dream's own sampler: one token a pass, the most probable first."""
    place = "dllm.pipelines.dream.models"
    model = model_of(code, place, "dream", ("DreamModel", "DreamConfig"), fields, state)
    config = module(code, f"{place}.generation_utils").DreamGenerationConfig(
        max_length=PROMPT + length, steps=length, alg="maskgit_plus", temperature=0.0, eps=1e-3, mask_token_id=MASK,
        pad_token_id=END, eos_token_id=END, bos_token_id=END, return_dict_in_generate=False,
    )  # fmt: skip

    def once():
        out = model._sample(
            prompt, attention_mask=None, generation_config=config,
            generation_tokens_hook_func=lambda step, x, logits: x,
            generation_logits_hook_func=lambda step, x, logits: logits,
        )  # fmt: skip
        return getattr(out, "sequences", out)[0, PROMPT:].tolist()

    return once


def llada2(code: Path, fields: dict, state: dict, prompt, length: int):
    """LLaDA2.0's own sampler; its attention mask is made in bf16, whatever the weights are."""
    import torch.nn.functional as F

    plain = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **more):
        mask = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        return plain(query, key, value, attn_mask=mask, **more)

    model = model_of(
        code, "dllm.pipelines.llada2.models", "llada2_moe", ("LLaDA2MoeModelLM", "LLaDA2MoeConfig"), fields, state
    )

    def once():
        F.scaled_dot_product_attention = attention
        try:
            out = model.generate(
                inputs=prompt, gen_length=length, block_length=32, steps=32, threshold=0.95, temperature=0.0,
                eos_early_stop=False, mask_id=MASK, eos_id=END,
            )  # fmt: skip
        finally:
            F.scaled_dot_product_attention = plain
        return out[0].tolist()[-length:]

    return once


def main(argv: list[str] | None = None) -> int:
    """Run the script; a user's mistake is one line and exit code 2."""
    return guarded("families", run, argv)


if __name__ == "__main__":
    sys.exit(main())
