"""Tests that the real and the simulated device have everything that executors require of a device."""

import inspect

import pytest

from automodel_conv.execution import cuda, protocols
from automodel_conv.execution.cuda import CudaDevice
from tests.execution import simulated

PROTOCOLS = {"Device": protocols.Device, "Stream": protocols.Stream, "Event": protocols.Event}


def required(protocol):
    return {n: f for n, f in vars(protocol).items() if inspect.isfunction(f) and not n.startswith("_")}


def fits(implementation, wanted):
    """Return whether a function accepts the arguments of the protocol's function, by the same names."""
    names = [p.name for p in inspect.signature(wanted).parameters.values()]
    return [p.name for p in inspect.signature(implementation).parameters.values()][: len(names)] == names


def test_protocols_ask_for_something():
    assert {name: sorted(required(protocol)) for name, protocol in PROTOCOLS.items()} == {
        "Device": ["pinned", "scratch", "stream"],
        "Stream": ["copy_all", "record", "run", "scratch", "wait"],
        "Event": ["synchronize"],
    }


@pytest.mark.parametrize("implementation", [simulated.SimulatedDevice, CudaDevice], ids=["simulated", "CUDA"])
@pytest.mark.parametrize("name", required(protocols.Device))
def test_devices_have_every_method_with_its_arguments(implementation, name):
    assert fits(getattr(implementation, name), required(protocols.Device)[name])


@pytest.mark.parametrize("name", required(protocols.Stream))
def test_simulated_streams_have_every_method_with_its_arguments(name):
    assert fits(getattr(simulated.Stream, name), required(protocols.Stream)[name])


def test_cuda_streams_have_every_method_with_its_arguments():
    streams = [c for c in vars(cuda).values() if inspect.isclass(c) and hasattr(c, "copy_all")]
    assert streams
    for implementation in (c for c in streams if c is not protocols.Stream):
        assert all(fits(getattr(implementation, name), wanted) for name, wanted in required(protocols.Stream).items())
