"""Tests of the devices that callers name, on a machine without CUDA devices and on one with two."""

import pytest
import torch

from automodel_conv.destinations.devices import as_device, loadable
from automodel_conv.errors import UnsupportedError


@pytest.fixture(params=[0, 2], ids=["no GPU", "two GPUs"])
def count(request, monkeypatch):
    """Return the number of CUDA devices; the second one is current."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return request.param


@pytest.mark.parametrize(
    ("named", "device"),
    [
        ("cpu", torch.device("cpu")),
        (0, torch.device("cuda", 0)),
        (255, None),
        ("cuda", torch.device("cuda")),
        ("cuda:1", torch.device("cuda", 1)),
        (torch.device("meta"), torch.device("meta")),
    ],
    ids=str,
)
def test_number_is_a_cuda_device_and_a_name_is_torchs(named, device):
    if device is None:
        with pytest.raises(UnsupportedError):
            as_device(named)
    else:
        assert as_device(named) == device


@pytest.mark.parametrize("named", ["gpu", "", "cuda:x", "cuda:256", 256, -1, True, None, 1.0], ids=repr)
def test_invalid_device_is_refused_with_the_available_ones(named, count):
    with pytest.raises(UnsupportedError, match="not a device") as caught:
        as_device(named, "device_map")
    text = str(caught.value)
    assert repr(named) in text
    assert "device_map" in text
    assert ('"cuda:1"' in text) == (count == 2)
    assert ("no CUDA devices" in text) == (count == 0)


def test_cpu_has_no_number(count):
    assert loadable("cpu:0") == loadable(torch.device("cpu")) == torch.device("cpu")
    assert loadable("cpu").index is None


def test_cuda_device_has_the_number_that_it_has_now(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert loadable("cuda") == torch.device("cuda", 1)
    assert loadable(0) == loadable("cuda:0") == torch.device("cuda", 0)


@pytest.mark.parametrize("named", [2, "cuda:7", "xpu"])
def test_missing_devices_are_refused(named, count):
    with pytest.raises(UnsupportedError, match="cannot load to") as caught:
        loadable(named, "device")
    assert str(as_device(named)) in str(caught.value)
    assert "move the model" in str(caught.value)


def test_first_cuda_device_is_refused_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for named in ("cuda", 0):
        with pytest.raises(UnsupportedError, match="no CUDA devices"):
            loadable(named)


def test_meta_device_is_refused_with_advice_to_plan():
    with pytest.raises(UnsupportedError, match=r"(?s)meta device holds no data.*compile_plan"):
        loadable("meta")
