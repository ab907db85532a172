"""dlm: train, sample, evaluate and benchmark masked text diffusion language models of the LLaDA kind.

Names are imported when first used, so that `dlm --help` does not wait for torch. Importing dlm also makes
transformers' auto classes know its families (`models.auto`), without importing either.
"""

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "Canvas": "sampling.canvas",
    "DenoiseState": "sampling.denoise",
    "GenerationOutput": "sampling.generate",
    "KVCache": "models.kv_cache",
    "LLaDAConfig": "models.families",
    "LLaDAModelLM": "models.families",
    "Pretrained": "checkpoints.pretrained",
    "SamplingConfig": "sampling.config",
    "choose": "checkpoints.generation",
    "denoise": "checkpoints.generation",
    "generate": "checkpoints.generation",
    "infill": "checkpoints.generation",
    "likelihood": "objectives.likelihood",
    "load": "checkpoints.pretrained",
    "load_pretrained": "checkpoints.pretrained",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'dlm' has no attribute {name!r}")
    module = import_module(f".{_WHERE[name]}", __name__)
    return module if name == "likelihood" else getattr(module, name)


def __dir__():
    return sorted(__all__)


import_module(".models.auto", __name__).register_when_used()
