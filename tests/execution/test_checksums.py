"""Tests of checksums of tensors as stored in files, against zlib; public functions: tests/doors/test_checksums.py."""

import json
import zlib

import pytest
import torch

from automodel_conv.errors import VerificationError
from automodel_conv.execution import checksums
from automodel_conv.execution.checksums import checksums_of, checksums_text, verify_checksums
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.shards import CHECKSUMS_NAME
from tests.execution.support import write_checkpoint

FILES = {
    "a.safetensors": {"a": torch.arange(100, dtype=torch.uint8), "none": torch.ones(0, 2)},
    "b.safetensors": {"b": torch.arange(7.0), "c": torch.tensor(3, dtype=torch.int16)},
}
SUMS = {
    name: f"{zlib.crc32(bytes(tensor.reshape(-1).view(torch.uint8).tolist())):08x}"
    for tensors in FILES.values()
    for name, tensor in tensors.items()
}


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path, FILES)


def state(checkpoint, sums, algorithm="crc32"):
    path = f"{checkpoint.directory}/{CHECKSUMS_NAME}"
    with open(path, "w") as file:
        json.dump({"algorithm": algorithm, "tensors": sums}, file)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window_bytes", [1, 10, 100, 1 << 20])
def test_sums_equal_those_of_zlib_with_any_windows(checkpoint, monkeypatch, threads, window_bytes):
    monkeypatch.setattr(checksums, "_WINDOW_BYTES", window_bytes)
    assert checksums_of(checkpoint, threads) == SUMS
    assert list(checksums_of(checkpoint, threads)) == checkpoint.names
    assert SUMS["none"] == "00000000"


def test_file_is_json_that_verifies(checkpoint, tmp_path):
    text = checksums_text(checksums_of(checkpoint, 1))
    assert json.loads(text) == {"algorithm": "crc32", "tensors": SUMS}
    (tmp_path / CHECKSUMS_NAME).write_bytes(text)
    assert verify_checksums(checkpoint, 2) == sum(checkpoint.nbytes) == 130


def test_tensor_with_another_byte_is_named_with_its_file(checkpoint, tmp_path):
    state(checkpoint, SUMS)
    data = bytearray((tmp_path / "b.safetensors").read_bytes())
    data[checkpoint.offsets[checkpoint.position["b"]]] ^= 1
    (tmp_path / "b.safetensors").write_bytes(data)
    with pytest.raises(VerificationError, match=f"(?s)1 tensors.*b in .*b.safetensors: .* instead of {SUMS['b']}"):
        verify_checksums(open_checkpoint(tmp_path), 1)


def test_sums_that_are_missing_and_sums_of_nothing_are_named(checkpoint):
    state(checkpoint, {name: value for name, value in SUMS.items() if name != "c"} | {"gone": "00000000"})
    with pytest.raises(VerificationError, match=r"(?s)c: no checksum.*gone: not in the checkpoint"):
        verify_checksums(checkpoint, 1)


def test_missing_file_and_other_algorithm_are_reported(checkpoint):
    with pytest.raises(VerificationError, match=CHECKSUMS_NAME):
        verify_checksums(checkpoint, 1)
    for sums, algorithm in ((SUMS, "md5"), ([], "crc32")):
        state(checkpoint, sums, algorithm)
        with pytest.raises(VerificationError, match="checksum file has an unknown format"):
            verify_checksums(checkpoint, 1)
