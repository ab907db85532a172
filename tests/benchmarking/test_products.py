"""dlm bench products: its three tables, with equal bits and tokens; refusals."""

import shutil

import pytest
import torch

from benchmarks import products
from dlm.cli.main import main
from dlm.kernels.linear import has_kernels

pytestmark = pytest.mark.skipif(
    not has_kernels(torch.float32) or shutil.which("cc") is None, reason="needs a C compiler and oneDNN"
)


def test_products_passes_and_texts_take_turns(monkeypatch, capsys):
    monkeypatch.setattr(products, "BEYOND", 1)
    threads = torch.get_num_threads()
    options = ["--config", "small", "--rows", "1", "3", "--canvas", "9", "--repeats", "2", "--gen-length", "8"]
    assert main(["bench", "products", *options]) == 0
    torch.set_num_threads(threads)
    of_products, of_passes, of_texts = (table.splitlines()[2:] for table in capsys.readouterr().out.split("\n\n"))
    assert len(of_products) == 5 * 2 and len(of_passes) == 2 and len(of_texts) == 2
    assert all(line.endswith("| True |") for line in of_texts)


def test_rows_beyond_the_canvas_are_refused(capsys):
    assert main(["bench", "products", "--rows", "9", "--canvas", "8"]) == 2
    assert "each must lie between 1 and --canvas, 8" in capsys.readouterr().err
