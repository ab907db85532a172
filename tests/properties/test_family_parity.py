"""The authors' samplers of every family, case by case: ids, and forward calls that are not more."""

from pathlib import Path

import pytest

import dlm
from tests.properties import family_parity

FOLDER = Path(__file__).parents[1] / "fixtures" / "families"
NAMES = sorted(folder.name for folder in FOLDER.iterdir())
CASES = [
    pytest.param(name, case, id=f"{name}-{case.name}") for name in NAMES for case in family_parity.cases(FOLDER / name)
]


@pytest.fixture(scope="module")
def models():
    found = {name: dlm.load(FOLDER / name)[0] for name in NAMES}
    fields = ("block_length", "shift_logits", "mask_token_id")
    return {name: (model, {field: getattr(model.config, field) for field in fields}) for name, model in found.items()}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_ids_and_forward_calls(models, name, case):
    model, original = models[name]
    family_parity.configured(model, original)
    assert family_parity.differs(model, case) is None


def test_all_cases_of_all_samplers_are_mapped():
    assert len(CASES) == 153


def test_the_command_says_what_differs(tmp_path, capsys):
    """One id of one case changed: the line names the case and the place, and the exit status is 1."""
    import json
    import shutil

    shutil.copytree(FOLDER / "a2d_llama", tmp_path / "a2d_llama")
    file = tmp_path / "a2d_llama" / "expected.json"
    recorded = json.loads(file.read_text())
    recorded["cases"][1]["sequences"][1][3] += 1
    file.write_text(json.dumps(recorded))
    assert family_parity.main([str(tmp_path / "a2d_llama")]) == 1
    said = capsys.readouterr().out
    assert "7 of 8 cases equal" in said and "row 1: ids differ from place 3 on" in said
