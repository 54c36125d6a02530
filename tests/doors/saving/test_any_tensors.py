"""Tests of saving state dicts and modules of any kind, within bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import automodel_conv as amc
from automodel_conv.testing import address_valued
from tests.comparing import assert_same, tensors_of
from tests.doors.saving.support import plain


def test_a_state_dict_with_empty_rules_keeps_its_names(tmp_path):
    amc.save_checkpoint(plain(), tmp_path, rules=[])
    assert_same(tensors_of(tmp_path), plain())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_dtype_casts_only_floats(tmp_path):
    amc.save_checkpoint(plain(), tmp_path, rules=[], dtype=torch.float64)
    floating = {"b.weight", "a.scale", "é"}
    assert_same(tensors_of(tmp_path), {n: t.double() if n in floating else t for n, t in plain().items()})


def test_tensors_of_any_strides_and_with_gradients_are_saved(tmp_path):
    wide = address_valued((6, 8), torch.float32)
    tensors = {
        "turned": wide.t(),
        "part": wide[1:4, 2:7],
        "every other": wide[:, ::2],
        "expanded": address_valued((1, 4), torch.float32, 99).expand(3, 4),
        "trained": nn.Parameter(wide.clone()),
    }
    amc.save_checkpoint(tensors, tmp_path, rules=[])
    assert_same(tensors_of(tmp_path), {name: tensor.detach().clone() for name, tensor in tensors.items()})


def test_tensors_that_share_memory_are_each_written(tmp_path):
    shared = address_valued((4, 4), torch.float32)
    amc.save_checkpoint({"a": shared, "b": shared, "c": shared[1:]}, tmp_path, rules=[])
    assert_same(tensors_of(tmp_path), {"a": shared, "b": shared.clone(), "c": shared[1:].clone()})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Parameter(torch.ones(3))
        self.embed = self.head
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("cache", torch.ones(2), persistent=False)


def test_a_plain_module_is_saved_with_its_ties_once_and_without_a_config(tmp_path):
    amc.save_checkpoint(Tied(), tmp_path)
    assert set(tensors_of(tmp_path)) == {
        "head",
        *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    assert not (tmp_path / "config.json").exists()


def test_sharded_files_have_an_index_that_names_each_tensor_once(tmp_path):
    tensors = {f"layers.{n}.weight": address_valued((10,), torch.float32, n * 10) for n in range(12)}
    report = amc.save_checkpoint(tensors, tmp_path, rules=[], max_shard_size=100)
    assert report.files == tuple(f"model-0000{n}-of-00006.safetensors" for n in range(1, 7))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for file in report.files:
        assert {n for n, f in index["weight_map"].items() if f == file} == load_file(tmp_path / file).keys()
    assert list(index["weight_map"]) == sorted(tensors)
    assert index["metadata"] == {"total_parameters": 120, "total_size": 480}
    assert_same(amc.load_state_dict(tmp_path, rules=[]), tensors)
    assert load_file(tmp_path / report.files[0]).keys() == {"layers.0.weight", "layers.1.weight"}


def test_progress_counts_all_bytes(tmp_path, capsys):
    amc.save_checkpoint(plain(), tmp_path, rules=[], progress=True)
    assert "writing: 100%" in capsys.readouterr().err


MEASURE = """
import sys
import torch
import automodel_conv as amc
from automodel_conv.cli.measuring import PeakMemory

path, dtype = sys.argv[1], sys.argv[2]
E, I, H = 16, 512, 1024
name = "layers.{}.experts.gate_and_up_projs"
tensors = {name.format(n): torch.ones(E, H, 2 * I, dtype=torch.bfloat16) for n in range(4)}
options = dict(rules=[], layout="nemo", dtype=getattr(torch, dtype), threads=2, scratch_bytes=16 << 20)
amc.save_checkpoint({"experts.gate_and_up_projs": torch.ones(2, 128, 256)}, path + "/warm", **options)
with PeakMemory() as peak:
    report = amc.save_checkpoint(tensors, path + "/out", **options)
print(peak.anonymous_bytes, report.peak_extra_bytes, report.bytes_written)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_stays_bounded_for_any_model_size(tmp_path, dtype):
    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc otherwise keeps freed memory
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak_bytes, bound_bytes, bytes_written = map(int, done.stdout.split())
    assert bytes_written > 96_000_000
    assert bound_bytes <= 16 << 20
    assert peak_bytes <= bound_bytes


def test_checksums_of_an_earlier_checkpoint_are_removed(tmp_path):
    (tmp_path / "model.safetensors.checksums.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"kept")
    amc.save_checkpoint({"a": torch.ones(2)}, tmp_path, rules=[])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "training_args.bin"]


def test_printed_report_has_files_bytes_and_names(tmp_path):
    report = amc.save_checkpoint({"a": torch.ones(2, 3)}, tmp_path, rules=[])
    lines = [line.split("  ")[0] for line in str(report).splitlines()]
    assert lines == [
        *("files", "written", "speed", "seconds", "seconds: plan, with imports", "seconds: write", "seconds: finish"),
        *("peak extra memory, at most", "carried as they are", "left out"),
    ]
    assert sum(report.phases.values()) == pytest.approx(report.seconds)
    assert report.gb_per_s == pytest.approx(report.bytes_written / 1e9 / report.phases["write"])
    assert repr(report).startswith("<SaveReport: files: 1, written: 4.1 kB, ")
