"""Tests of saves from the device: files are byte for byte those of a save from the host, also right after a load."""

from pathlib import Path

import pytest
import torch

import automodel_conv as amc
from automodel_conv.upstream.registry import transformers_available
from tests.gpu.models import LAYOUTS, SCRATCH_BYTES, assert_same, grouped, model, on, tensors_of
from tests.gpu.place import on_host

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")

# Slabs that are much smaller than a tensor, from several threads.
LITTLE = {"threads": 2, "scratch_bytes": max(SCRATCH_BYTES // 2, 1 << 17)}


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def rules():
    return amc.get_checkpoint_conversion_mapping("qwen3_moe")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dict_on_the_device_gives_the_same_files_as_on_the_host(layout, per_expert, device, tmp_path):
    host = grouped(per_expert, layout)
    options = {"rules": rules(), "layout": layout, "max_shard_size": sum(t.nbytes for t in host.values()) // 3}
    with on_host():
        amc.save_checkpoint(host, tmp_path / "host", **options)
    amc.save_checkpoint({name: t.to(device) for name, t in host.items()}, tmp_path / "device", **options, **LITTLE)
    assert contents(tmp_path / "device") == contents(tmp_path / "host")
    assert_same(tensors_of(tmp_path / "device"), per_expert, torch.device("cpu"))


def test_views_on_the_device_are_saved_as_they_are(device, tmp_path):
    memory = torch.randint(-(2**15), 2**15, (6, 40, 56), dtype=torch.int16).view(torch.bfloat16).to(device)
    tensors = {"turned": memory[:3].transpose(1, 2), "every other": memory[3:, ::2], "cast": memory[:, :, 8:]}
    for dtype in (None, torch.float32):
        saved = tmp_path / str(dtype)
        amc.save_checkpoint(tensors, saved, rules=[], dtype=dtype, **LITTLE)
        wanted = {name: tensor.cpu().contiguous().to(dtype or tensor.dtype) for name, tensor in tensors.items()}
        saved_tensors = tensors_of(saved)
        for side in (saved_tensors, wanted):
            for name, tensor in side.items():  # a NaN may become any NaN
                side[name] = tensor.masked_fill(tensor.isnan(), 0)
        assert_same(saved_tensors, wanted, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_model_is_saved_right_after_it_was_loaded(dtype, checkpoint, per_expert, device, tmp_path):
    loaded = model()
    amc.load_model(loaded, checkpoint, dtype=dtype, **on(device))
    amc.save_checkpoint(loaded, tmp_path / "back", **LITTLE)
    wanted = {name: tensor.to(dtype or tensor.dtype) for name, tensor in per_expert.items()}
    assert_same(tensors_of(tmp_path / "back"), wanted, torch.device("cpu"))


def test_save_casts_on_the_device(checkpoint, per_expert, device, tmp_path):
    loaded = model()
    amc.load_model(loaded, checkpoint, **on(device))
    amc.save_checkpoint(loaded, tmp_path, dtype=torch.float32, **LITTLE)
    assert_same(tensors_of(tmp_path), {n: t.float() for n, t in per_expert.items()}, torch.device("cpu"))
