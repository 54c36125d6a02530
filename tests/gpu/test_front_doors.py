"""A real model's checkpoint converted on the device, loaded to it and taken apart there: in all four layouts."""

import pytest
import torch

import automodel_conv as amc
from automodel_conv.kernels.launch import why_not
from automodel_conv.upstream.registry import transformers_available
from tests.gpu.models import LAYOUTS, assert_same, grouped, model, on
from tests.gpu.place import PLACE, Place, on_host

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not transformers_available(), reason="builds a model of transformers")


def test_kernels_run_here(device):
    # Where they cannot, torch would silently take their place in loads.
    assert why_not(device) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_converted_and_taken_apart_again(layout, per_expert, on_device, device):
    made = amc.convert_state_dict(on_device, model(), layout=layout, backend="triton")
    assert_same(made, grouped(per_expert, layout), device)
    back = amc.revert_state_dict(made, model(), layout=layout, backend="triton")
    assert_same(back, per_expert, device)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_state_dict_is_that_of_the_cpu(layout, dtype, checkpoint, per_expert, device):
    loaded = amc.load_state_dict(checkpoint, model(), layout=layout, dtype=dtype, **on(device))
    wanted = {name: tensor.to(dtype or tensor.dtype) for name, tensor in grouped(per_expert, layout).items()}
    assert_same(loaded, wanted, device)
    with on_host():
        of_cpu = amc.load_state_dict(checkpoint, model(), layout=layout, dtype=dtype)
    assert_same(of_cpu, wanted, torch.device("cpu"))
    assert loaded.report.bytes_read == sum(tensor.nbytes for tensor in per_expert.values())
    if PLACE is not Place.INTERPRETER and (layout in ("nemo", "gpt_oss") or dtype):
        assert loaded.report.copied_by_kernels > 0


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_a_loaded_model_is_that_of_the_cpu(dtype, checkpoint, per_expert, device):
    made = model()
    amc.load_model(made, checkpoint, dtype=dtype, **on(device))
    wanted = {name: tensor.to(dtype or tensor.dtype) for name, tensor in grouped(per_expert, "transformers").items()}
    assert_same(made.state_dict(), wanted, device)
    assert all(buffer.device == device for buffer in made.buffers())


def test_a_model_that_has_memory_already_is_filled_in_place(checkpoint, per_expert, device):
    made = model().to_empty(device=device)
    places = {name: tensor.data_ptr() for name, tensor in made.state_dict().items()}
    amc.load_model(made, checkpoint, **on(device))
    assert_same(made.state_dict(), grouped(per_expert, "transformers"), device)
    assert {name: tensor.data_ptr() for name, tensor in made.state_dict().items()} == places
