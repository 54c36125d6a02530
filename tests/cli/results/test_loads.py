"""Tests of the results of ``load`` and ``verify``."""

from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.cli.results.loads import Claims, LoadResult, Mismatch, Pages, Place, load_result, pages_of
from automodel_conv.execution.page_policy import PageUse
from automodel_conv.execution.report import LoadReport
from tests.cli.answers import answer
from tests.cli.support import run

# A picture, not a number.
LEFT_OUT = {"timeline"}


@pytest.fixture
def report(plain):
    return amc.load_state_dict(plain, rules=[]).report


def test_result_has_the_fields_of_the_report_and_their_values(report):
    names = {field.name for field in fields(LoadReport)} - LEFT_OUT
    assert {*LoadResult.__struct_fields__} == names | {"tensors", "gb_per_s"}
    result = load_result(report, 2)
    assert result.tensors == 2
    assert result.bytes_read == report.bytes_read == 32
    assert {**result.seconds} == {**report.seconds}
    for name in names - {"pages", "mismatched_keys", "duplicated_keys", "unindexed"}:
        assert getattr(result, name) == getattr(report, name), name


def test_tuples_of_the_report_become_objects(report):
    changed = replace(
        report,
        mismatched_keys=(("a", (1, 2), (2, 1)),),
        duplicated_keys=(("b", ("c", "d")),),
        unindexed=(("e", "f.safetensors"),),
        pages=PageUse(1, 2, 3.0, None),
    )
    result = load_result(changed, 0)
    assert result.mismatched_keys == (Mismatch(name="a", checkpoint_shape=(1, 2), model_shape=(2, 1)),)
    assert result.duplicated_keys == (Claims(name="b", sources=("c", "d")),)
    assert result.unindexed == (Place(name="e", file="f.safetensors"),)
    assert result.pages == Pages(huge_bytes=1, small_bytes=2, huge_gb_per_s=3.0, small_gb_per_s=None)


def test_load_without_new_memory_has_no_pages(report):
    assert load_result(replace(report, pages=None), 0).pages is None


def test_pages_are_those_of_the_load():
    assert {*Pages.__struct_fields__} == {*PageUse._fields}
    assert pages_of(PageUse(5)) == Pages(5, 0, None, None)


def test_names_that_the_table_cuts_are_whole(plain, monkeypatch):
    names = tuple(f"layers.{n}.weight" for n in range(100))
    load = amc.load_state_dict

    def leaving_out(*arguments, **options):
        loaded = load(*arguments, **{**options, "rules": []})
        loaded.report = replace(loaded.report, left_out=names)
        return loaded

    monkeypatch.setattr("automodel_conv.load_state_dict", leaving_out)
    assert names[50] not in run("load", plain).stdout
    assert answer(run("load", plain, "--json").stdout)["result"]["left_out"] == [*names]


@pytest.mark.parametrize("tensors", [{}, {"a": torch.ones(0)}, {"a": torch.ones(())}], ids=["none", "empty", "scalar"])
def test_small_checkpoints_have_whole_results(tmp_path, monkeypatch, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    load = amc.load_state_dict
    monkeypatch.setattr("automodel_conv.load_state_dict", lambda *a, **options: load(*a, **{**options, "rules": []}))
    result = answer(run("load", tmp_path, "--json").stdout)["result"]
    assert (result["tensors"], result["bytes_read"]) == (len(tensors), sum(t.nbytes for t in tensors.values()))


def test_comparison_names_what_was_compared(plain, tmp_path):
    new = tmp_path / "new"
    assert run("convert", plain, new, "--no-model", "--max-shard-size", "10B", "--checksums").exit_code == 0
    compared = answer(run("verify", plain, new, "--json").stdout)["result"]
    assert compared == {"kind": "conversion", "tensors": 2, "files": 2, "nbytes": 32, "is_copy": True}
    assert answer(run("verify", new, "--json").stdout)["result"] == {"kind": "checksums", "tensors": 2, "nbytes": 32}
    assert run("convert", plain, tmp_path / "cast", "--no-model", "--dtype", "float16").exit_code == 0
    cast = answer(run("verify", plain, tmp_path / "cast", "--no-model", "--dtype", "float16", "--json").stdout)
    assert cast["result"]["is_copy"] is False
