"""Tests of writing the files of a conversion: its memory, and the description by which a later call continues it."""

import json

import pytest
import torch

from automodel_conv.adapters import merge_adapter
from automodel_conv.errors import ConversionError, DestinationError
from automodel_conv.execution.adding import CHUNK_BYTES
from automodel_conv.execution.factors import KEPT_BYTES
from automodel_conv.files import system
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.files.uploads.output_folders import LocalFolder
from automodel_conv.publishing.conversion_files import Writing, convert
from tests.comparing import assert_same, tensors_of
from tests.execution.support import write_checkpoint
from tests.lora.support import lora, product_of, write_adapter

OPTIONS = {
    "rules": [],
    "layout": None,
    "source_layout": None,
    "dtype": None,
    "dequantize": False,
    "drop": [],
    "max_shard_size": "5GB",
}
TENSORS = {
    f"{name}.weight": torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")
}
LORA = lora("a", 5, 4)


@pytest.fixture
def base(tmp_path):
    write_checkpoint(tmp_path / "base", {"model.safetensors": TENSORS})
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", LORA)


def writing(**options):
    values = {
        "resume": True,
        "verify": True,
        "checksums": False,
        "threads": 1,
        "scratch_bytes": None,
        "progress": False,
    }
    return Writing(**values | options)


def test_without_adapters_bytes_stay(tmp_path, base):
    report = convert(base, LocalFolder(str(tmp_path / "out")), SourceSettings(), OPTIONS, writing())
    assert_same(tensors_of(tmp_path / "out"), TENSORS)
    assert (report.adapted, report.files) == ((), ("model.safetensors",))


def test_adapters_change_their_tensors(tmp_path, base, adapter):
    report = merge_adapter(base, adapter, tmp_path / "out")
    changed = (TENSORS["a.weight"].double() + product_of(LORA, "a")).float()
    assert_same(tensors_of(tmp_path / "out"), TENSORS | {"a.weight": changed})
    assert report.adapted == ("a.weight",)


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_memory_of_a_merge_is_within_the_limit(tmp_path, base, adapter, threads):
    limit = 256 << 20
    report = merge_adapter(base, adapter, tmp_path / "out", threads=threads, scratch_bytes=limit)
    assert KEPT_BYTES + threads * CHUNK_BYTES < report.peak_extra_bytes <= limit


def interrupted(call, monkeypatch):
    """Interrupt a conversion after its files were written, before they are published."""
    sync, calls = system.sync, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > 3:
            raise OSError(5, "Input/output error")
        return sync(*arguments)

    monkeypatch.setattr(system, "sync", fail)
    with pytest.raises(ConversionError):
        call()
    monkeypatch.undo()


def test_description_of_the_work_names_the_adapters(tmp_path, base, adapter, monkeypatch):
    interrupted(lambda: merge_adapter(base, [(adapter, 0.5)], tmp_path / "out"), monkeypatch)
    journal = (tmp_path / "out" / STAGING_NAME / "journal.jsonl").read_text().splitlines()
    work = json.loads(journal[0])["work"]
    assert work["options"]["adapters"] == repr([(str(adapter), 0.5)])
    assert {"../adapter/adapter_config.json", "../adapter/adapter_model.safetensors"} < work["source files"].keys()
    assert json.loads(journal[1]) == {"finished": "model.safetensors", "verified": True}


@pytest.mark.parametrize("weights", [(0.5, 0.25), (-0.5, 1.0)])
def test_other_weights_do_not_continue_the_work(tmp_path, base, adapter, monkeypatch, weights):
    first, second = weights
    interrupted(lambda: merge_adapter(base, [(adapter, first)], tmp_path / "out"), monkeypatch)
    with pytest.raises(DestinationError, match=rf"(?s)begun with: adapters=.*{first}.*this call:.*{second}"):
        merge_adapter(base, [(adapter, second)], tmp_path / "out")
    report = merge_adapter(base, [(adapter, first)], tmp_path / "out")
    assert report.files_resumed == 1
    changed = (TENSORS["a.weight"].double() + first * product_of(LORA, "a")).float()
    assert_same(tensors_of(tmp_path / "out"), TENSORS | {"a.weight": changed})


def test_conversion_does_not_continue_a_merge(tmp_path, base, adapter, monkeypatch):
    interrupted(lambda: merge_adapter(base, adapter, tmp_path / "out"), monkeypatch)
    with pytest.raises(DestinationError, match=r"differs from this one"):
        convert(base, LocalFolder(str(tmp_path / "out")), SourceSettings(), OPTIONS, writing())
    report = convert(base, LocalFolder(str(tmp_path / "out")), SourceSettings(), OPTIONS, writing(resume=False))
    assert report.files_resumed == 0
    assert_same(tensors_of(tmp_path / "out"), TENSORS)
