"""A real model's checkpoint converted on the device, loaded to it and taken apart there: in all four layouts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import automodel_conv as amc
from automodel_conv.kernels.launch import why_not
from automodel_conv.planning.registry import transformers_available
from automodel_conv.testing import assert_bytes_equal
from benchmarks import shapes
from tests.gpu.place import FULL_SIZES, PLACE, Place, on_host

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not transformers_available(), reason="builds a model of transformers")

LAYOUTS = ("transformers", "nemo", "gpt_oss", "vllm")
# Far less than the checkpoint holds, so that loads take many windows.
SCRATCH_BYTES = 1 << 20 if FULL_SIZES else 1 << 14
LARGE = shapes.SMALL.config | {"num_experts": 24, "hidden_size": 512, "moe_intermediate_size": 328}
SHAPE = (
    shapes.Shape("large", "as SMALL", "qwen3_moe", LARGE, keys=2 * (24 * 3 + 9) + 3, files=3)
    if FULL_SIZES
    else shapes.SMALL
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    shapes.write_checkpoint(SHAPE, str(directory))
    return directory


@pytest.fixture(scope="module")
def per_expert(checkpoint):
    """What the files hold, on the CPU."""
    found = {}
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def on_device(per_expert, device):
    return {name: tensor.to(device) for name, tensor in per_expert.items()}


def model():
    return shapes.meta_model(SHAPE)


def grouped(per_expert, layout):
    """Experts by stack, cat and transpose, under the names of a layout; the rest as it is."""
    gate_up, down = {
        "transformers": ("gate_up_proj", "down_proj"),
        "nemo": ("gate_and_up_projs", "down_projs"),
        "gpt_oss": ("gate_up_proj", "down_proj"),
        "vllm": ("w13_weight", "w2_weight"),
    }[layout]
    made = {name: tensor for name, tensor in per_expert.items() if ".experts." not in name}
    for path in sorted({name.partition(".experts.")[0] for name in per_expert if ".experts." in name}):
        gate, up, downs = (
            torch.stack([per_expert[f"{path}.experts.{e}.{part}.weight"] for e in range(SHAPE.config["num_experts"])])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        both = torch.cat([gate, up], 1)
        if layout == "nemo":
            both, downs = both.transpose(1, 2), downs.transpose(1, 2)
        if layout == "gpt_oss":
            both, downs = torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2), downs.transpose(1, 2)
        made[f"{path}.experts.{gate_up}"] = both.contiguous()
        made[f"{path}.experts.{down}"] = downs.contiguous()
    return made


def assert_same(made, wanted, device):
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert made[name].device == device, name
        assert_bytes_equal(made[name], tensor)


def on(device):
    """The arguments that send a load to a device through little memory."""
    arguments = {"device": str(device), "threads": 2, "scratch_bytes": SCRATCH_BYTES}
    return arguments | ({"device_scratch_bytes": SCRATCH_BYTES} if PLACE is not Place.INTERPRETER else {})


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
