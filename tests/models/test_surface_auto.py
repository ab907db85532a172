"""Importing dlm teaches transformers' auto classes and PEFT its families: in either order, lazily, in new processes."""

import json
import pickle
import subprocess
import sys

import pytest

import dlm
from dlm.models.auto import MODEL_TYPES
from dlm.models.families import FAMILIES
from tests.helpers.commandline import ENVIRONMENT
from tests.helpers.toys import tiny_model

ASK = """
model_type = AutoConfig.from_pretrained(folder).model_type
kinds = [AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM]
print(model_type, *(type(kind.from_pretrained(folder)).__name__ for kind in kinds))
"""
NAMES = "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM"


def python(code):
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_dlm_imports_neither_torch_nor_transformers():
    loaded = python("import dlm, sys; print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))")
    assert loaded.split() == []


@pytest.mark.parametrize("order", [["import dlm", NAMES], [NAMES, "import dlm"]], ids=["dlm first", "dlm last"])
def test_auto_classes_open_a_folder(tmp_path, order):
    tiny_model(1).save_pretrained(tmp_path)
    out = python("\n".join([*order, f"folder = {str(tmp_path)!r}", ASK]))
    assert out.split() == ["llada"] + ["LLaDAModelLM"] * 3


def test_a_folder_that_names_code_runs_ours(tmp_path):
    """LLaDA's config.json has an auto_map: nothing is asked, and no code of the folder runs."""
    tiny_model(1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.LLaDAConfig", "AutoModelForCausalLM": "evil.LLaDAModelLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a checkpoint ran')")
    code = ["import dlm", NAMES, f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"]
    assert python("\n".join(code)).split() == ["LLaDAModelLM"]


def test_a_pickled_configuration_brings_dlm_along(tmp_path):
    """In a new process that imported transformers alone."""
    file = tmp_path / "config.pickle"
    file.write_bytes(pickle.dumps(tiny_model(1).config))
    code = f"{NAMES}\nimport pickle\nconfig = pickle.load(open({str(file)!r}, 'rb'))\n"
    assert python(code + "print(type(AutoModel.from_config(config)).__name__)").split() == ["LLaDAModelLM"]


def test_others_models_are_not_touched():
    from transformers import AutoConfig

    assert type(AutoConfig.for_model("bert")).__module__.startswith("transformers.")
    assert type(AutoConfig.for_model("qwen2")).__module__.startswith("transformers.")
    assert AutoConfig.for_model("llada").__class__ is dlm.LLaDAConfig


def test_peft_is_told_of_every_family():
    ours = {family.name for family in FAMILIES.values() if not family.autoregressive}
    assert set(MODEL_TYPES) == ours
