"""Tests of ``verify_checkpoint``: equal checkpoints in any files pass; otherwise the first difference is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.errors import CheckpointError, VerificationError
from automodel_conv.execution import writing
from automodel_conv.files import system
from tests.comparing import tensors_of
from tests.doors.converting.support import plain

try:
    from tests.model_zoo import build_model
except ModuleNotFoundError:
    build_model = None

needs_transformers = pytest.mark.skipif(build_model is None, reason="transformers is not installed")


def flip(directory, name, element, byte=0):
    """Flip a bit of one element of a tensor on the disk."""
    checkpoint = amc.open_checkpoint(directory)
    row = checkpoint.position[name]
    path = Path(checkpoint.files[checkpoint.file_ids[row]])
    data = bytearray(path.read_bytes())
    size = checkpoint.nbytes[row] // max(1, torch.Size(checkpoint.shapes[row]).numel())
    data[checkpoint.offsets[row] + element * size + byte] ^= 4
    path.write_bytes(data)


def test_equal_checkpoints_verify_in_any_files(saved, tmp_path):
    for n, size in enumerate((10, 100, 3000, "5GB")):
        amc.convert_checkpoint(saved, tmp_path / str(n), rules=[], max_shard_size=size)
        assert amc.verify_checkpoint(saved, tmp_path / str(n)) == sum(t.nbytes for t in plain().values())
        assert amc.verify_checkpoint(tmp_path / str(n), saved, threads=1, scratch_bytes=1 << 16) > 0


def test_files_whose_data_is_not_aligned_verify(saved, tmp_path):
    """Check files with headers of any length, in which elements start at odd bytes."""
    amc.convert_checkpoint(saved, tmp_path / "out", rules=[], dtype=torch.float32)
    [file] = (tmp_path / "out").glob("*.safetensors")
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes((length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :])
    assert amc.verify_checkpoint(saved, tmp_path / "out", rules=[], dtype=torch.float32) > 0
    flip(tmp_path / "out", "z.weight", 31)
    with pytest.raises(VerificationError, match=r"z\.weight(.|\n)*\[1, 1\] of F32 \[40, 30\]"):
        amc.verify_checkpoint(saved, tmp_path / "out", rules=[], dtype=torch.float32)


@pytest.mark.parametrize("division", [100, "5GB"])
@pytest.mark.parametrize(
    ("name", "element", "byte", "text"),
    [
        ("z.weight", 0, 0, r"\[0, 0\] of BF16 \[40, 30\]"),
        ("z.weight", 0, 1, r"\[0, 0\] of BF16 \[40, 30\]"),
        ("z.weight", 1199, 1, r"\[39, 29\] of BF16 \[40, 30\]"),
        ("z.weight", 64, 0, r"\[2, 4\] of BF16 \[40, 30\]"),
        ("a.scale", 0, 3, r"\[0\] of F32 \[\]"),
        ("codes", 50, 0, r"\[16, 2\] of U8 \[17, 3\]"),
        ("fp8", 7, 0, r"\[1, 2\] of F8_E4M3 \[9, 5\]"),
    ],
)
def test_the_first_element_that_differs_is_named(saved, tmp_path, division, name, element, byte, text):
    amc.convert_checkpoint(saved, tmp_path / "out", rules=[], max_shard_size=division)
    flip(tmp_path / "out", name, element, byte)
    for scratch_bytes in (1 << 16, None):
        with pytest.raises(VerificationError, match=rf"{re.escape(name)} does not match its source(.|\n)*{text}"):
            amc.verify_checkpoint(saved, tmp_path / "out", scratch_bytes=scratch_bytes)


@needs_transformers
@pytest.mark.parametrize("layout", ["transformers", "gpt_oss"])
def test_difference_in_grouped_experts_is_named_by_its_index(published, tmp_path, layout):
    amc.convert_checkpoint(published, tmp_path / "out", layout=layout)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    _, rows, columns = tensors_of(tmp_path / "out")[name].shape
    flip(tmp_path / "out", name, (5 * rows + 7) * columns + 11)
    with pytest.raises(VerificationError, match=rf"{re.escape(name)}(.|\n)*\[5, 7, 11\] of BF16"):
        amc.verify_checkpoint(published, tmp_path / "out", layout=layout)
    flip(tmp_path / "out", name, 3)
    with pytest.raises(VerificationError, match=r"\[0, 0, 3\] of BF16"):
        amc.verify_checkpoint(published, tmp_path / "out", layout=layout)


@needs_transformers
def test_difference_in_the_source_is_detected(published, tmp_path):
    shutil.copytree(published, tmp_path / "source")
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "out", layout="nemo")
    flip(tmp_path / "source", "model.layers.2.block_sparse_moe.experts.4.w3.weight", 0)
    text = r"layers\.2\.mlp\.experts\.gate_and_up_projs(.|\n)*\[4, 0, 44\]"
    with pytest.raises(VerificationError, match=text):
        amc.verify_checkpoint(tmp_path / "source", tmp_path / "out", layout="nemo")


def test_all_tensors_that_differ_in_name_dtype_or_shape_are_listed(saved, tmp_path):
    tensors = plain()
    tensors["codes"] = tensors["codes"].to(torch.int8)
    tensors["z.weight"] = tensors["z.weight"].t().contiguous()
    tensors["new"] = tensors.pop("a.scale")
    amc.save_checkpoint(tensors, tmp_path / "other", rules=[])
    with pytest.raises(VerificationError, match="4 tensors differ") as error:
        amc.verify_checkpoint(saved, tmp_path / "other", rules=[])
    for line in (
        "a.scale: missing",
        "new: not in the source",
        "codes: I8 [17, 3] instead of U8 [17, 3]",
        "z.weight: BF16 [30, 40] instead of BF16 [40, 30]",
    ):
        assert line in str(error.value)
    assert "pass the options of the conversion: rules, layout=, dtype=, dequantize=, drop=" in str(error.value)


@needs_transformers
@pytest.mark.parametrize(
    ("converted", "given", "hint"),
    [
        ({"layout": "nemo"}, {"layout": "vllm"}, "experts in the layout 'nemo' suggest layout="),
        ({"layout": "nemo"}, {"rules": []}, "experts in the layout 'nemo' suggest layout="),
        ({"layout": "per_expert"}, {"layout": "nemo"}, "experts in the layout 'per_expert' suggest layout="),
        ({"layout": "gpt_oss"}, {"layout": "transformers"}, "experts in the layout 'gpt_oss' suggest layout="),
        ({"dtype": torch.float16}, {}, "F16 instead of BF16 suggests dtype="),
        ({"rules": [], "drop": "lm_head.*"}, {"rules": []}, "missing tensors suggest drop="),
    ],
)
def test_difference_suggests_the_options_of_the_conversion(published, tmp_path, converted, given, hint):
    amc.convert_checkpoint(published, tmp_path / "out", **converted)
    assert amc.verify_checkpoint(published, tmp_path / "out", **converted) > 0
    with pytest.raises(VerificationError) as error:
        amc.verify_checkpoint(published, tmp_path / "out", **given)
    [do] = [line for line in str(error.value).splitlines() if line.startswith("  do:")]
    assert do.endswith(f"drop=; {hint}")


@needs_transformers
def test_checkpoints_with_the_same_names_are_compared_without_rules(published, tmp_path):
    shutil.copytree(published, tmp_path / "copy")
    assert amc.verify_checkpoint(published, tmp_path / "copy") == sum(t.nbytes for t in tensors_of(published).values())
    amc.convert_checkpoint(published, tmp_path / "grouped")
    assert amc.verify_checkpoint(published, tmp_path / "grouped") > 0
    with pytest.raises(VerificationError, match="differ in name"):
        amc.verify_checkpoint(published, tmp_path / "grouped", rules=[])


@needs_transformers
def test_partial_checkpoint_is_compared_without_rules(published, tmp_path):
    source, converted = tmp_path / "source", tmp_path / "out"
    shutil.copytree(published, source)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors_of(published) | {"mtp.norm": torch.ones(3)}, source / "model.safetensors")
    amc.convert_checkpoint(source, converted, rules=[], drop=["mtp.*"])
    assert amc.verify_checkpoint(source, converted, drop=["mtp.*"]) == sum(
        t.nbytes for t in tensors_of(published).values()
    )
    with pytest.raises(VerificationError):
        amc.verify_checkpoint(source, converted)


def test_conversion_that_writes_a_wrong_byte_is_an_error(saved, tmp_path, monkeypatch):
    real = writing.write_exactly

    def write_exactly(fd, views, offset, path):
        views = [bytearray(view) for view in views]
        if offset and ".safetensors" in path:
            views[-1][-1] ^= 1
        real(fd, [memoryview(view) for view in views], offset, path)

    monkeypatch.setattr(system, "copy_range", lambda *arguments: 0)
    monkeypatch.setattr(writing, "write_exactly", write_exactly)
    with pytest.raises(VerificationError, match="does not match its source"):
        amc.convert_checkpoint(saved, tmp_path / "out", rules=[])
    assert not list((tmp_path / "out").glob("*.safetensors*"))
    with pytest.raises(CheckpointError):
        amc.open_checkpoint(tmp_path / "out")
    amc.convert_checkpoint(saved, tmp_path / "unverified", rules=[], verify=False)
    with pytest.raises(VerificationError):
        amc.verify_checkpoint(saved, tmp_path / "unverified")
