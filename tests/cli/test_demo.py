"""Tests of ``demo``: it compares both loads and reports a single bit that differs."""

import pytest
import torch

from automodel_conv.cli import demo
from automodel_conv.cli.app import show_demo
from automodel_conv.upstream.registry import transformers_available
from tests.cli.support import GATE_UP, run

needs_transformers = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")


@needs_transformers
def test_demo_compares_both_loads_and_removes_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "RUNS", 1)
    assert show_demo(demo.TINY, str(tmp_path))
    shown = capsys.readouterr().out
    assert str(tmp_path) in shown
    assert "yes" in shown
    assert list(tmp_path.iterdir()) == []


@needs_transformers
def test_demo_fails_and_names_a_tensor_that_differs_in_one_bit(tmp_path, monkeypatch, capsys):
    def lying(method, directory, warm_up):
        load = demo._measure(method, directory, warm_up)
        if method == "automodel_conv":
            load.digests[GATE_UP] = "0"
        return load

    monkeypatch.setattr(demo, "_in_new_process", lying)
    monkeypatch.setattr(demo, "BIG", demo.TINY)
    result = run("demo", "--directory", tmp_path)
    assert result.exit_code == 1
    assert f"different: {GATE_UP}" in result.stderr
    assert "yes" not in result.stdout


@needs_transformers
def test_digests_depend_on_every_bit_and_the_dtype():
    tensor = torch.ones(4)
    other = tensor.clone()
    other[3] += 2**-20
    same, bit, dtype = (demo.digests({"x": t})["x"] for t in (tensor.clone(), other, tensor.view(torch.int32)))
    assert demo.digests({"x": tensor})["x"] == same
    assert len({same, bit, dtype}) == 3
