"""Tests of the results of ``convert``, ``adapter merge`` and a dry run."""

from dataclasses import fields

from automodel_conv.cli.results.conversions import Converted
from automodel_conv.files import system
from automodel_conv.publishing.convert_report import ConvertReport
from tests.cli.answers import answer
from tests.cli.support import run


def convert(*arguments):
    return answer(run("convert", *arguments, "--no-model", "--json").stdout)["result"]


def test_result_has_the_fields_of_the_report():
    names = {field.name for field in fields(ConvertReport)}
    assert {*Converted.__struct_fields__} == names | {"gb_per_s", "verified"}


def test_result_names_the_files_and_what_was_done(plain, tmp_path):
    result = convert(plain, tmp_path / "new", "--max-shard-size", "10B")
    assert (result["kind"], result["verified"], result["was_complete"]) == ("conversion", True, False)
    assert result["files"] == sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert result["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "new").glob("*.safetensors"))
    again = convert(plain, tmp_path / "new", "--max-shard-size", "10B", "--no-verify")
    assert (again["verified"], again["was_complete"], again["bytes_written"]) == (False, True, 0)


def test_dry_run_has_the_numbers_of_the_conversion(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "free_bytes", lambda directory: 10**6)
    forecast = convert(plain, tmp_path / "new", "--max-shard-size", "10B", "--drop", "b", "--dry-run")
    assert not (tmp_path / "new").exists()
    result = convert(plain, tmp_path / "new", "--max-shard-size", "10B", "--drop", "b")
    assert forecast["kind"] == "dry_run"
    assert forecast["files"] == len(result["files"])
    assert forecast["needed_bytes"] == result["bytes_written"]
    assert forecast["left_out"] == result["left_out"] == ["b"]
    assert (forecast["bytes_read"], forecast["bytes_written"], forecast["free_bytes"]) == (24, 24, 10**6)
    assert forecast["rules"] == [{"rule": None, "execution": "read", "targets": 1, "sources": 1, "nbytes": 24}]


def test_dry_run_that_could_not_be_done_is_an_error(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "free_bytes", lambda directory: 3)
    result = run("convert", plain, tmp_path / "new", "--no-model", "--dry-run", "--json")
    assert result.exit_code == 1
    assert answer(result.stdout)["error"]["type"] == "WriteError"
