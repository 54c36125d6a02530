"""Devices are filled one after the other; an error names what is complete on all of them."""

import pytest
import torch

from automodel_conv.errors import ConversionError, ReadError
from automodel_conv.execution import filling
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.filling import Limits, fill
from tests.execution.support import moe


@pytest.mark.parametrize("kind", [ReadError, ConversionError, KeyboardInterrupt])
def test_an_error_on_the_second_device_names_what_the_first_one_holds(tmp_path, monkeypatch, kind):
    _, checkpoint, plan = moe(tmp_path)
    buffers = allocate(plan.targets)
    last = plan.targets[-1].name
    buffers[last] = buffers[last].to("meta")
    stock = filling._fill_device

    def failing(part, checkpoint, buffers, device, *how):
        if device.type == "meta":
            raise kind("no such device")
        return stock(part, checkpoint, buffers, device, *how)

    monkeypatch.setattr(filling, "_fill_device", failing)
    with pytest.raises(kind) as raised:
        fill(plan, checkpoint, buffers, Limits(threads=1))
    text = "".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    filled = text.partition("filled:")[2].split()
    assert "no such device" in str(raised.value)
    assert [name for name in filled if name in buffers] == [t.name for t in plan.targets[:-1]]


def test_an_error_before_anything_is_read_names_nothing(tmp_path):
    _, checkpoint, plan = moe(tmp_path)
    buffers = allocate(plan.targets)
    with pytest.raises(ConversionError) as raised:
        fill(plan, checkpoint, {name: tensor.to(torch.float64) for name, tensor in buffers.items()}, Limits(threads=1))
    assert "filled:" not in str(raised.value)
