"""dlm: train, sample, evaluate and benchmark masked text diffusion language models of the LLaDA kind.

Names are imported when first used, so that `dlm --help` does not wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "Canvas": "canvas",
    "DenoiseState": "sampler",
    "GenerationOutput": "sampler",
    "KVCache": "cache",
    "LLaDAConfig": "models",
    "LLaDAModelLM": "models",
    "SamplingConfig": "sampling",
    "denoise": "sampler",
    "generate": "sampler",
    "load": "models",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'dlm' has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
