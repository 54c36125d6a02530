"""Tests of buffers that a module computes: moved, or left in place, as the device map requires."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from tests.destinations.support import assert_loaded
from tests.execution.elsewhere import FIRST, SECOND


class Buffered(nn.Module):
    """A parameter, a buffer that the checkpoint has, and one that no checkpoint has."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(7))
        self.register_buffer("steps", torch.zeros(3))
        self.register_buffer("table", table, persistent=False)


BUFFERED = {"weight": torch.arange(7.0), "steps": torch.arange(3.0)}


@pytest.fixture
def buffered(tmp_path):
    """Return three modules on the meta device with buffers on the CPU that share a table, and their checkpoint."""
    table = torch.arange(5.0)
    model = nn.ModuleDict({name: Buffered(table) for name in "abc"})
    for module in model.values():
        module.weight = nn.Parameter(module.weight.to("meta"))
    tensors = {f"{m}.{name}": tensor.clone() for m in "abc" for name, tensor in BUFFERED.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    return model, tmp_path / "m.safetensors"


def test_buffers_that_have_memory_are_moved(buffered, devices):
    model, file = buffered
    amc.load_model(model, file, device_map={"a": 0, "": 1})
    for module, home in zip(model.values(), (FIRST, SECOND, SECOND), strict=True):
        wanted = BUFFERED | {"table": torch.arange(5.0)}
        state = dict(module.named_parameters()) | dict(module.named_buffers())
        assert_loaded(state, dict.fromkeys(wanted, home), wanted)
    assert model["b"].table is model["c"].table
    assert model["a"].table is not model["b"].table


def test_buffer_missing_in_the_checkpoint_is_moved_unchanged(buffered, devices):
    model, file = buffered
    save_file({f"{m}.weight": BUFFERED["weight"].clone() for m in "abc"}, file)
    report = amc.load_model(model, file, device_map={"": 1}, strict=False)
    assert report.missing_keys == ("a.steps", "b.steps", "c.steps")
    assert_loaded(dict(model["a"].named_buffers(recurse=False)), {"steps": SECOND, "table": SECOND}, {
        "steps": torch.zeros(3), "table": torch.arange(5.0),
    })  # fmt: skip


def test_load_that_fails_moves_no_buffer(buffered, devices):
    model, file = buffered
    devices[FIRST].fail_at = 1
    before = dict(model.named_buffers(remove_duplicate=False))
    with pytest.raises(RuntimeError, match="an illegal access"):
        amc.load_model(model, file, device_map={"": 0})
    after = dict(model.named_buffers(remove_duplicate=False))
    assert all(after[name] is buffer for name, buffer in before.items())


def test_buffers_stay_where_they_are_without_a_map(buffered):
    model, file = buffered
    before = dict(model.named_buffers(remove_duplicate=False))
    amc.load_model(model, file)
    assert all(buffer is before[name] for name, buffer in model.named_buffers(remove_duplicate=False))


def test_buffer_that_has_memory_and_no_entry_is_named(buffered, devices, reads):
    model, file = buffered
    device_map = {f"{m}.{name}": 1 for m in "abc" for name in BUFFERED}
    with pytest.raises(amc.ConversionError, match=r"has no device for 3 of 9[\s\S]*a\.table"):
        amc.load_model(model, file, device_map=device_map)
    assert reads == []
