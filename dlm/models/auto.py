"""transformers' auto classes and PEFT know dlm's families once dlm is imported, in either order, at no cost before use.

Registering a family needs its classes, and these need torch. So it waits for the first `AutoConfig.from_pretrained`,
with which AutoModel, AutoTokenizer and pipeline begin too: that is when `models.families` is imported, which registers
with `AutoConfig.register` and the like. What is not imported yet is waited for by an import hook.
"""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_when_used"]

FAMILIES = "dlm.models.families"  # registers with transformers when it is imported
METHODS = ("from_pretrained", "for_model")  # of AutoConfig: what looks a family up
ADAPTED = ["q_proj", "v_proj"]  # the layers that get adapters where target_modules is unset, as PEFT has it for LLaMA
# `model_type`s that PEFT does not know by itself.
MODEL_TYPES = (
    "llada", "illada", "Dream", "llada2_moe", "sdar", "sdar_moe", "Fast_dLLM_Qwen", "rnd1", "a2d-llama", "a2d-qwen2",
    "a2d-qwen3", "a2d-smollm3",
)  # fmt: skip


def register_when_used() -> None:
    """Has AutoConfig register dlm's families before it looks one up; called when dlm is imported."""
    for name, ready in WAITED_FOR.items():
        if name in sys.modules:
            ready(sys.modules[name])
    if not any(type(finder).__qualname__ == AfterImport.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())


class AfterImport(MetaPathFinder):
    """Finds nothing itself: calls what waits for a module (`WAITED_FOR`) when that module has run."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in WAITED_FOR:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        run = spec.loader.exec_module

        def run_and_tell(module: ModuleType) -> None:
            run(module)
            if module.__name__ == name:
                WAITED_FOR[name](module)

        spec.loader.exec_module = run_and_tell
        return spec


def _watch_configurations(module: ModuleType) -> None:
    """Puts the import of the families before each method of AutoConfig that looks one up."""
    auto = getattr(module, "AutoConfig", None)
    for name in METHODS:
        method = vars(auto).get(name) if auto is not None else None
        if isinstance(method, classmethod) and not hasattr(method.__func__, "registers_dlm"):
            setattr(auto, name, classmethod(_registering(method.__func__)))


def _watch_models(module: ModuleType) -> None:
    """The same before a model is looked up by one of dlm's configurations, which may have come alone, pickled."""
    mapping = getattr(module, "_LazyAutoMapping", None)
    contains = vars(mapping).get("__contains__") if mapping is not None else None
    if contains is None or hasattr(contains, "registers_dlm"):
        return

    @functools.wraps(contains)
    def registered(self, key):
        if getattr(key, "__module__", "").startswith("dlm."):
            import_module(FAMILIES)
        return contains(self, key)

    registered.registers_dlm = True
    mapping.__contains__ = registered


def _name_adapted(module: ModuleType) -> None:
    """Tells PEFT which layers get LoRA where nobody says."""
    layers = getattr(module, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {})
    for model_type in MODEL_TYPES:
        layers.setdefault(model_type, list(ADAPTED))


WAITED_FOR = {
    "transformers.models.auto.configuration_auto": _watch_configurations,
    "transformers.models.auto.auto_factory": _watch_models,
    "peft.utils.constants": _name_adapted,
}


def _registering(method):
    @functools.wraps(method)
    def registered(cls, *args, **kwargs):
        import_module(FAMILIES)
        return method(cls, *args, **kwargs)

    registered.registers_dlm = True
    return registered
