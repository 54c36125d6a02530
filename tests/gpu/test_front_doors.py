"""Tests of a real model's checkpoint that is loaded, converted and reverted on the device, in all four layouts."""

import pytest
import torch

import automodel_conv as amc
from automodel_conv.kernels.launch import why_not
from automodel_conv.upstream.registry import transformers_available
from tests.gpu.models import LAYOUTS, assert_same, grouped, model, on
from tests.gpu.place import PLACE, Place, on_host

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")


def test_kernels_run_here(device):
    # If kernels cannot run, torch would silently replace them in loads.
    assert why_not(device) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_converted_and_reverted(layout, per_expert, on_device, device):
    converted = amc.convert_state_dict(on_device, model(), layout=layout, backend="triton")
    assert_same(converted, grouped(per_expert, layout), device)
    back = amc.revert_state_dict(converted, model(), layout=layout, backend="triton")
    assert_same(back, per_expert, device)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loaded_state_dict_equals_that_of_the_cpu(layout, dtype, checkpoint, per_expert, device):
    loaded = amc.load_state_dict(checkpoint, model(), layout=layout, dtype=dtype, **on(device))
    wanted = {name: tensor.to(dtype or tensor.dtype) for name, tensor in grouped(per_expert, layout).items()}
    assert_same(loaded, wanted, device)
    with on_host():
        of_cpu = amc.load_state_dict(checkpoint, model(), layout=layout, dtype=dtype)
    assert_same(of_cpu, wanted, torch.device("cpu"))
    needed = sum(tensor.nbytes for tensor in per_expert.values())
    if layout in ("nemo", "gpt_oss"):  # windows are read with the gaps between their tensors
        assert needed <= loaded.report.bytes_read < 2 * needed
    else:
        assert loaded.report.bytes_read == needed
    if PLACE is not Place.INTERPRETER and (layout in ("nemo", "gpt_oss") or dtype):
        assert loaded.report.copied_by_kernels > 0


def test_blocks_and_padding_are_written_and_dropped(checkpoint, per_expert, on_device, device):
    layout = "vllm_trtllm_padded"
    wanted = grouped(per_expert, layout)
    loaded = amc.load_state_dict(checkpoint, model(), layout=layout, **on(device))
    assert_same(loaded, wanted, device)
    for name, tensor in amc.convert_state_dict(on_device, model(), layout=layout, backend="triton").items():
        loaded[name].fill_(3).copy_(tensor)
    assert_same(loaded, wanted, device)
    assert_same(amc.revert_state_dict(loaded, model(), layout=layout, backend="triton"), per_expert, device)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_loaded_model_equals_that_of_the_cpu(dtype, checkpoint, per_expert, device):
    loaded = model()
    amc.load_model(loaded, checkpoint, dtype=dtype, **on(device))
    wanted = {name: tensor.to(dtype or tensor.dtype) for name, tensor in grouped(per_expert, "transformers").items()}
    assert_same(loaded.state_dict(), wanted, device)
    assert all(buffer.device == device for buffer in loaded.buffers())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_loading_code_equal_those_of_the_cpu(layout, checkpoint, per_expert, device):
    loaded = amc.load_with(lambda tensors: grouped(tensors, layout), checkpoint, calls="dict", **on(device))
    assert loaded.report.computed == {}
    assert_same(loaded, grouped(per_expert, layout), device)


def test_model_with_memory_is_filled_in_place(checkpoint, per_expert, device):
    loaded = model().to_empty(device=device)
    places = {name: tensor.data_ptr() for name, tensor in loaded.state_dict().items()}
    amc.load_model(loaded, checkpoint, **on(device))
    assert_same(loaded.state_dict(), grouped(per_expert, "transformers"), device)
    assert {name: tensor.data_ptr() for name, tensor in loaded.state_dict().items()} == places
