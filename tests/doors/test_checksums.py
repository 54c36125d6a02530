"""Tests of checksums: written on request, and any bit that changes later is detected and named."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import automodel_conv as amc
from automodel_conv.execution.checksums import CHECKSUMS_NAME, checksums_of
from automodel_conv.files import system
from automodel_conv.testing import address_valued, assert_bytes_equal

OPTIONS = {"rules": [], "max_shard_size": 4000}


@pytest.fixture
def tensors():
    shapes = {"a": (40, 50), "b": (7,), "c": (), "d": (0, 3), "e": (33, 1, 9)}
    return {name: address_valued(shape, torch.bfloat16, 17 * n) for n, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def saved(tmp_path, tensors):
    amc.save_checkpoint(tensors, tmp_path / "saved", checksums=True, **OPTIONS)
    return tmp_path / "saved"


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_checksums_are_those_of_each_tensors_bytes(saved, tensors):
    text = json.loads((saved / CHECKSUMS_NAME).read_text())
    expected = {
        name: f"{zlib.crc32(bytes(tensor.reshape(-1).view(torch.uint8).tolist())):08x}"
        for name, tensor in tensors.items()
    }
    assert text == {"algorithm": "crc32", "tensors": expected}


def test_large_tensors_are_summed_in_windows(tmp_path, monkeypatch, tensors):
    amc.save_checkpoint(tensors, tmp_path, **OPTIONS)
    whole = checksums_of(amc.open_checkpoint(tmp_path), 2)
    monkeypatch.setattr("automodel_conv.execution.checksums._WINDOW_BYTES", 7)
    assert checksums_of(amc.open_checkpoint(tmp_path), 1) == whole


def test_files_are_opened_one_at_a_time(tmp_path, monkeypatch, tensors):
    amc.save_checkpoint(tensors, tmp_path, rules=[], max_shard_size=100)
    checkpoint = amc.open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 2
    files, most, opened = [], [], system.open_readonly

    def watched(path):
        files.append(opened(path))
        most.append(sum(not file.closed for file in files))
        return files[-1]

    monkeypatch.setattr(system, "open_readonly", watched)
    checksums_of(checkpoint, 2)
    assert max(most) == 1


def test_unchanged_checkpoint_loads(saved, tensors):
    loaded = amc.load_state_dict(saved, rules=[], verify=True)
    for name, tensor in tensors.items():
        assert_bytes_equal(loaded[name], tensor)


@pytest.mark.parametrize("name", ["a", "b", "c", "e"])
def test_flipped_bit_is_detected_before_anything_is_loaded(saved, name):
    checkpoint = amc.open_checkpoint(saved)
    row = checkpoint.position[name]
    flip(Path(checkpoint.files[checkpoint.file_ids[row]]), checkpoint.offsets[row] + checkpoint.nbytes[row] - 1)
    with pytest.raises(amc.VerificationError, match=f"1 tensors(.|\n)*{name} in "):
        amc.load_state_dict(saved, rules=[], verify=True)
    model = nn.Module()
    for n in "abde":
        model.register_parameter(n, nn.Parameter(torch.zeros(checkpoint.shapes[checkpoint.position[n]])))
    model.register_buffer("c", torch.zeros(()))
    with pytest.raises(amc.VerificationError):
        amc.load_model(model, saved, rules=[], verify=True)
    assert all(not tensor.any() for tensor in model.state_dict().values())
    amc.load_state_dict(saved, rules=[])  # verify=True was not passed


def test_missing_or_mismatched_checksums_are_named(saved, tmp_path, tensors):
    file = saved / CHECKSUMS_NAME
    record = json.loads(file.read_text())
    sums = record["tensors"]
    for broken, text in [
        ({**record, "tensors": {n: s for n, s in sums.items() if n != "b"}}, "b: no checksum"),
        ({**record, "tensors": {**sums, "z": "00000000"}}, "z: not in the checkpoint"),
        ({**record, "algorithm": "md5"}, "checksum file has an unknown format"),
        ({**record, "tensors": []}, "checksum file has an unknown format"),
    ]:
        file.write_text(json.dumps(broken))
        with pytest.raises(amc.VerificationError, match=text):
            amc.load_state_dict(saved, rules=[], verify=True)
    file.write_text("{")
    with pytest.raises(amc.CheckpointError, match="malformed"):
        amc.load_state_dict(saved, rules=[], verify=True)
    file.unlink()
    with pytest.raises(amc.VerificationError, match="no checksums"):
        amc.load_state_dict(saved, rules=[], verify=True)


def test_conversion_writes_its_own_checksums(saved, tmp_path):
    amc.convert_checkpoint(saved, tmp_path / "without", rules=[], dtype=torch.float32)
    assert not (tmp_path / "without" / CHECKSUMS_NAME).exists()
    amc.convert_checkpoint(saved, tmp_path / "with", rules=[], dtype=torch.float32, checksums=True)
    loaded = amc.load_state_dict(tmp_path / "with", rules=[], verify=True)
    with safe_open(next((tmp_path / "with").glob("*.safetensors")), "pt") as file:
        assert set(file.keys()) == set(loaded)


def test_bit_flipped_anywhere_is_detected_or_changes_no_tensor(saved, tensors):
    """Flip bits in headers and the index too; some of those bytes do not describe tensors: metadata, total sizes."""
    checkpoint = amc.open_checkpoint(saved)
    data_starts = {
        file: min(o for o, f in zip(checkpoint.offsets, checkpoint.file_ids, strict=True) if f == n)
        for n, file in enumerate(checkpoint.files)
    }
    harmless = 0
    for file in [*checkpoint.files, str(saved / "model.safetensors.index.json")]:
        whole = Path(file).read_bytes()
        for at in range(0, len(whole), 7):
            flip(Path(file), at)
            try:
                loaded = amc.load_state_dict(saved, rules=[], verify=True, threads=1)
            except amc.ConversionError:
                pass
            else:
                assert at < data_starts.get(file, len(whole)), f"byte {at} of {file} is data"
                assert loaded.keys() == tensors.keys()
                for name, tensor in tensors.items():
                    assert_bytes_equal(loaded[name], tensor)
                harmless += 1
            Path(file).write_bytes(whole)
    assert harmless > 0
