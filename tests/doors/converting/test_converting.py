"""Tests of ``convert_checkpoint`` and its arguments: dtypes, files next to the weights, threads and scratch."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.errors import CheckpointError, ConversionError, NameProblems, UnsupportedError, WriteError
from automodel_conv.files import system
from automodel_conv.files.destination import Destination
from automodel_conv.publishing import conversion_files
from tests.comparing import assert_same, tensors_of
from tests.doors.converting.support import plain

try:
    from transformers.core_model_loading import MergeModulelist

    from tests.model_zoo import build_model
except ModuleNotFoundError:
    build_model = None

needs_transformers = pytest.mark.skipif(build_model is None, reason="transformers is not installed")


@needs_transformers
def test_only_files_next_to_the_weights_are_copied(published, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(published, source)
    others = {"tokenizer.json": b"{}", "modeling_own.py": b"# code", "README.md": b"\xff\x00"}
    others |= {
        "original/params.json": b"{}",
        "additional_chat_templates/tool_use.jinja": b"{{ x }}",
        "a/b/c/d": b"",
    }
    others |= {"lock": b"1", "journal.jsonl": b"2", "beside": b"3"}  # names of files of unfinished work
    no = ("model.gguf", "pytorch_model.bin", ".hidden", "stray.safetensors", "original/consolidated.pth", ".git/x")
    for name, content in (others | dict.fromkeys(no, b"no")).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    converted = source / "out"
    report = amc.convert_checkpoint(source, converted, layout="nemo")
    files = {p.relative_to(converted).as_posix(): p.read_bytes() for p in converted.rglob("*") if p.is_file()}
    configs = {name: (published / name).read_bytes() for name in ("config.json", "generation_config.json")}
    assert {name: data for name, data in files.items() if name not in report.files} == others | configs
    assert report.files_copied == tuple(sorted(others | configs))


@needs_transformers
def test_no_files_are_copied_with_a_single_source_file(published, tmp_path):
    file = next(published.glob("*.safetensors"))
    report = amc.convert_checkpoint(file, tmp_path / "out", rules=[])
    assert report.files_copied == ()
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(report.files)


def test_without_rules_only_files_change(saved, tmp_path):
    report = amc.convert_checkpoint(saved, tmp_path / "out", rules=[])
    assert report.files == ("model.safetensors",)
    assert_same(tensors_of(tmp_path / "out"), plain())
    amc.convert_checkpoint(tmp_path / "out", tmp_path / "back", rules=[], max_shard_size=50)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 3
    assert_same(tensors_of(tmp_path / "back"), plain())


def test_without_rules_a_dtype_casts_only_floats(saved, tmp_path):
    amc.convert_checkpoint(saved, tmp_path / "out", rules=[], dtype=torch.float64)
    floating = {"z.weight", "a.scale", "empty"}
    expected = {n: t.double() if n in floating else t for n, t in plain().items()}
    assert_same(tensors_of(tmp_path / "out"), expected)
    amc.verify_checkpoint(saved, tmp_path / "out", rules=[], dtype=torch.float64)


@pytest.mark.parametrize("source", ["directory", "index", "file"])
def test_source_may_be_anything_that_opens(tmp_path, source):
    amc.save_checkpoint(plain(), tmp_path / "saved", rules=[], max_shard_size=1500 if source == "index" else "5GB")
    path = tmp_path / "saved"
    path = {
        "directory": path,
        "index": path / "model.safetensors.index.json",
        "file": path / "model.safetensors",
    }[source]
    amc.convert_checkpoint(str(path) if source == "directory" else path, tmp_path / "out", rules=[])
    assert_same(tensors_of(tmp_path / "out"), plain())


def test_bytes_are_the_same_if_the_kernel_cannot_copy(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "copy_range", lambda *arguments: 0)
    amc.convert_checkpoint(saved, tmp_path / "out", rules=[])
    assert_same(tensors_of(tmp_path / "out"), plain())


def last_lines(bars):
    """Return the last line of each bar: its phase, its share, and its bytes."""
    found = re.findall(r"(\w+): +(\d+%)\|[^|]*\| ([\w.]+/[\w.]+)", bars)
    return {phase: (share, nbytes) for phase, share, nbytes in found}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("checksums", [True, False])
def test_each_phase_has_a_bar_with_its_own_bytes(saved, tmp_path, capsys, verify, checksums):
    report = amc.convert_checkpoint(
        saved, tmp_path / "out", rules=[], verify=verify, checksums=checksums, progress=True, max_shard_size="2KB"
    )
    assert len(report.files) > 1
    phases = ["writing", *(["verifying"] if verify else []), *(["checksums"] if checksums else [])]
    bars = last_lines(capsys.readouterr().err)
    assert list(bars) == phases
    assert len({*bars.values()}) == 1
    assert bars["writing"][0] == "100%"
    assert list(report.phases) == ["plan", "write", "verify", "finish"]
    assert sum(report.phases.values()) == pytest.approx(report.seconds)
    assert (report.phases["verify"] > 0) == verify
    assert report.gb_per_s == pytest.approx(report.bytes_written / 1e9 / report.phases["write"])


def test_bars_count_only_what_an_interrupted_conversion_left(saved, tmp_path, capsys, monkeypatch):
    finish, calls = Destination.finish, []

    def interrupted(self, shard, **values):
        finish(self, shard, **values)
        calls.append(shard.name)
        if len(calls) == 1:
            raise KeyboardInterrupt

    options = {"rules": [], "max_shard_size": "2KB", "progress": True}
    with monkeypatch.context() as patch:
        patch.setattr(Destination, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            amc.convert_checkpoint(saved, tmp_path / "out", **options)
    first = last_lines(capsys.readouterr().err)
    report = amc.convert_checkpoint(saved, tmp_path / "out", **options)
    second = last_lines(capsys.readouterr().err)
    assert report.files_resumed == 1
    assert first["writing"][0] != "100%"
    assert {share for share, _ in second.values()} == {"100%"}
    assert second["writing"] == second["verifying"] != first["writing"]


def test_complete_conversion_is_compared_and_nothing_else(saved, tmp_path, capsys):
    amc.convert_checkpoint(saved, tmp_path / "out", rules=[])
    report = amc.convert_checkpoint(saved, tmp_path / "out", rules=[], progress=True)
    assert list(last_lines(capsys.readouterr().err)) == ["verifying"]
    assert report.phases["write"] == report.phases["finish"] == 0.0
    assert sum(report.phases.values()) == pytest.approx(report.seconds)


def refused(source, destination, error, text, **options):
    with pytest.raises(error, match=text):
        amc.convert_checkpoint(source, destination, **options)
    assert not destination.exists() or not list(destination.iterdir())


@needs_transformers
def test_targets_that_need_transformers_code_are_refused(published, tmp_path, monkeypatch):
    stock = MergeModulelist.convert
    monkeypatch.setattr(MergeModulelist, "convert", lambda self, *args, **kwargs: stock(self, *args, **kwargs))
    text = r"only transformers' own code can convert 6 tensors(.|\n)*experts\.(.|\n)*load the model and save it"
    refused(published, tmp_path / "out", UnsupportedError, text)


@needs_transformers
def test_a_source_that_does_not_fit_its_model_is_refused(published, tmp_path):
    tensors = tensors_of(published)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(published / "config.json", tmp_path)
    refused(tmp_path, tmp_path / "out", NameProblems, r"layers\.1\.(.|\n)*experts\.3\.w1")


def test_a_source_without_a_config_is_refused_without_rules(saved, tmp_path):
    if build_model is None:
        pytest.skip("transformers is not installed")
    refused(saved, tmp_path / "out", UnsupportedError, r"no config\.json")


@pytest.mark.parametrize("options", [{"layout": "grouped"}, {"source_layout": "grouped"}])
def test_an_unknown_layout_is_refused(saved, tmp_path, options):
    refused(saved, tmp_path / "out", UnsupportedError, "unknown layout 'grouped'", rules=[], **options)


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": "2"}, {"scratch_bytes": 1000}, {"scratch_bytes": "64MB"}]
)
def test_impossible_options_are_refused(saved, tmp_path, options):
    refused(saved, tmp_path / "out", ConversionError, "scratch_bytes >=", rules=[], **options)


def test_other_wrong_arguments_are_refused(saved, tmp_path):
    refused(saved, tmp_path / "out", UnsupportedError, "not a size", rules=[], max_shard_size="5 apples")
    refused(saved, tmp_path / "out", UnsupportedError, "not a floating dtype", rules=[], dtype=torch.int8)
    refused(tmp_path / "nowhere", tmp_path / "out", CheckpointError, "nowhere", rules=[])


def test_disk_with_too_little_space_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "free_bytes", lambda directory: 100)
    with pytest.raises(WriteError, match=r"too little room(.|\n)*for 1 file(.|\n)*100 bytes free, .* too few\n  do: "):
        amc.convert_checkpoint(saved, tmp_path / "out", rules=[])
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_default_scratch_and_files_are_as_documented(saved, tmp_path):
    report = amc.convert_checkpoint(saved, tmp_path / "out", rules=[])
    assert report.peak_extra_bytes <= conversion_files.DEFAULT_SCRATCH_BYTES == 256 << 20
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
