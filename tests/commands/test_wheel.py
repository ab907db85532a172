"""The wheel carries everything, puts nothing but `dlm` into site-packages, and works from any folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dlm.checkpoints.files import SHIPPED

ROOT = Path(__file__).parents[2]


def call(*command, **more):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    [file] = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel):
    """installed(command ...) -> its output, run from / with the wheel's files alone and no network."""
    site = wheel.parent / "site"
    call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def installed(*arguments):
        return call(sys.executable, *arguments, cwd="/", env=environment)

    installed.site = site
    return installed


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"{wheel.name.split('-py3')[0]}.dist-info/"
    assert {name.split("/")[0] for name in names} == {"dlm", info.rstrip("/")}
    assert "dlm/recipes/train/pretrain.py" in names and f"{info}licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    code = {f"dlm/{file.relative_to(ROOT / 'dlm')}" for file in (ROOT / "dlm").rglob("*.py")}
    assets = {f"dlm/{file.relative_to(ROOT / 'dlm')}" for file in SHIPPED.rglob("*") if file.is_file()}
    assert code | assets <= set(names)


def test_the_installed_package_is_the_one_that_runs(installed):
    assert installed("-c", "import dlm; print(dlm.__file__)").strip() == str(installed.site / "dlm" / "__init__.py")
    assert (installed.site / "bin" / "dlm").exists()


def test_recipes_run_from_the_wheel(installed):
    assert "pretrain" in installed(installed.site / "bin" / "dlm", "train")
    assert "usage" in installed(installed.site / "bin" / "dlm", "train", "pretrain", "--help").lower()
    assert "usage" in installed(installed.site / "bin" / "dlm", "bench", "training", "--help").lower()


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="there is no shipped model in this tree")
def test_it_generates_from_any_folder_without_network(installed):
    out = installed(installed.site / "bin" / "dlm", "generate", "Once upon a time", "--gen-length", "32", "--json")
    record = json.loads(out)
    assert len(record["token_ids"]) == 32 and record["text"].strip()
