"""Tests of loads next to other streams, on other devices and after errors: no memory is left behind."""

import os
from pathlib import Path

import pytest
import torch

import automodel_conv as amc
from automodel_conv.errors import ReadError
from automodel_conv.files import system
from automodel_conv.testing import POISON
from automodel_conv.upstream.registry import transformers_available
from tests.gpu.models import LAYOUTS, assert_same, grouped, model, on, tensors_of
from tests.gpu.place import allocated_bytes, needs_gpu_memory

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def warmed(checkpoint, device):
    """Load once, which creates the objects that exist once per device."""
    amc.load_state_dict(checkpoint, model(), layout="nemo", **on(device))


@needs_gpu_memory
@pytest.mark.usefixtures("warmed")
def test_load_leaves_only_its_tensors(checkpoint, device):
    before = allocated_bytes(device)
    loaded = amc.load_state_dict(checkpoint, model(), layout="nemo", **on(device))
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in loaded.values()}
    # A caching allocator rounds up, and does not split off a rest of less than 1 MiB.
    rounding_bytes = sum(512 if nbytes <= 1 << 20 else 1 << 20 for nbytes in kept.values())
    assert 0 <= allocated_bytes(device) - before - sum(kept.values()) <= rounding_bytes
    del loaded
    assert allocated_bytes(device) == before


def load_of_a_file_that_is_cut(checkpoint, device, layout):
    """Return the error text of a load during which another process cuts every file in half."""
    read, files = system.preadv, sorted(Path(checkpoint).glob("*.safetensors"))
    half = {file: file.stat().st_size // 2 for file in files}

    def cutting(fd, views, offset):
        if offset > 8:  # neither an index nor a header
            for file, nbytes in half.items():
                os.truncate(file, nbytes)
        return read(fd, views, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "preadv", cutting)
        try:
            amc.load_state_dict(checkpoint, model(), layout=layout, **on(device))
        except ReadError as error:
            return str(error)
    raise AssertionError("the load did not notice")


@needs_gpu_memory
@pytest.mark.usefixtures("warmed")
@pytest.mark.parametrize("layout", ["transformers", "gpt_oss"])
def test_error_in_the_middle_of_a_load_gives_all_memory_back(layout, device, tmp_path):
    from benchmarks import shapes
    from tests.gpu.models import SHAPE

    shapes.write_checkpoint(SHAPE, str(tmp_path))
    before = allocated_bytes(device)
    text = load_of_a_file_that_is_cut(tmp_path, device, layout)
    assert ".safetensors" in text
    assert "filled:" in text
    assert allocated_bytes(device) == before


@needs_gpu_memory
def test_device_can_be_loaded_to_after_an_error(checkpoint, per_expert, device, tmp_path):
    from benchmarks import shapes
    from tests.gpu.models import SHAPE

    shapes.write_checkpoint(SHAPE, str(tmp_path))
    load_of_a_file_that_is_cut(tmp_path, device, "nemo")
    loaded = amc.load_state_dict(checkpoint, model(), layout="nemo", **on(device))
    assert_same(loaded, grouped(per_expert, "nemo"), device)


@pytest.fixture
def side(device):
    """Set a current stream that is not the default one."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.synchronize(device)


def poison(tensors):
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8).fill_(POISON)


def written_late(tensors, device, stream):
    """Return copies of pinned or device tensors that the stream has not written yet: they hold poison until then."""
    late = {name: torch.empty_like(tensor, device=device) for name, tensor in tensors.items()}
    poison(late)
    stream.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    for name, tensor in tensors.items():
        late[name].copy_(tensor, non_blocking=True)
    assert not stream.query(), "the stream was done too early to test anything"
    return late


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_the_current_stream_still_writes_are_converted_and_saved(
    layout, per_expert, device, side, tmp_path
):
    pinned = {name: tensor.pin_memory() for name, tensor in per_expert.items()}
    wanted, like, rules = grouped(per_expert, layout), model(), amc.get_checkpoint_conversion_mapping("qwen3_moe")

    def convert(tensors):
        return amc.convert_state_dict(tensors, like, layout=layout, backend="triton")

    def save(tensors, directory):
        amc.save_checkpoint(tensors, directory, rules=rules, layout=layout)

    # Compilation takes longer than the stream is busy.
    save(convert({name: tensor.to(device) for name, tensor in pinned.items()}), tmp_path / "first")
    converted = convert(written_late(pinned, device, side))
    side.synchronize()
    assert_same(converted, wanted, device)
    save(written_late(converted, device, side), tmp_path / "second")
    assert_same(tensors_of(tmp_path / "second"), per_expert, torch.device("cpu"))


@pytest.mark.gpu
def test_load_waits_for_writes_of_the_current_stream(checkpoint, per_expert, device, side):
    loaded = model().to_empty(device=device)
    amc.load_model(loaded, checkpoint, **on(device))  # pins memory, which takes longer than the stream is busy
    torch.cuda._sleep(2_000_000_000)  # about a second
    poison(loaded.state_dict())
    assert not side.query(), "the stream was done too early to test anything"
    amc.load_model(loaded, checkpoint, **on(device))
    side.synchronize()
    assert_same(loaded.state_dict(), grouped(per_expert, "transformers"), device)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("layout", LAYOUTS)
def test_device_that_is_not_current_is_used_for_converting_loading_and_saving(layout, checkpoint, per_expert, tmp_path):
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    loaded = amc.load_state_dict(checkpoint, model(), layout=layout, **on(other))
    assert_same(loaded, grouped(per_expert, layout), other)
    there = {name: tensor.to(other) for name, tensor in per_expert.items()}
    assert_same(amc.convert_state_dict(there, model(), layout=layout, backend="triton"), loaded, other)
    amc.save_checkpoint(loaded, tmp_path, rules=amc.get_checkpoint_conversion_mapping("qwen3_moe"), layout=layout)
    assert_same(tensors_of(tmp_path), per_expert, torch.device("cpu"))


@pytest.mark.gpu
@two_gpus
def test_model_on_two_devices_is_filled_and_saved(checkpoint, per_expert, tmp_path):
    loaded = model()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    loaded.model.layers[0].to_empty(device=first)
    loaded.model.layers[1].to_empty(device=second)
    amc.load_model(loaded, checkpoint, device=str(first))
    wanted = grouped(per_expert, "transformers")
    for name, tensor in loaded.state_dict().items():
        on_second = ".layers.1." in name
        assert_same({name: tensor}, {name: wanted[name]}, second if on_second else first)
    amc.save_checkpoint(loaded, tmp_path)
    assert_same(tensors_of(tmp_path), per_expert, torch.device("cpu"))


@pytest.mark.gpu
def test_device_map_under_the_hook_gives_the_model_of_transformers(checkpoint, device):
    pytest.importorskip("accelerate", reason="device_map needs it")
    from transformers import AutoModelForCausalLM

    settings = {"dtype": torch.bfloat16, "device_map": "cuda"}
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, **settings).state_dict()
    with amc.accelerate_transformers() as acceleration:
        hooked = AutoModelForCausalLM.from_pretrained(checkpoint, **settings).state_dict()
    [load] = acceleration.loads
    assert load.left == {}
    assert_same(hooked, {name: tensor.cpu() for name, tensor in stock.items()}, device)
