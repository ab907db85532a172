"""Scripts of `dlm train | eval | bench`, run from wherever the package lies."""

import sys

from dlm.cli import scripts


def test_a_script_finds_what_stands_beside_it(tmp_path, monkeypatch):
    """Fault: in a wheel `dlm bench training` and `dlm train distill` ended in "No module named 'benchmarks'"."""
    folder = tmp_path / "recipes" / "toy_scripts"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "beside.py").write_text("CODE = 7\n")
    (folder / "script.py").write_text("from toy_scripts.beside import CODE\n\n\ndef main(argv):\n    return CODE\n")
    monkeypatch.setattr(scripts, "scripts", lambda command: {"script": folder / "script.py"})
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert scripts.run("bench", ["script"]) == 7
