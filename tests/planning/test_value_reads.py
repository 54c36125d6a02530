"""Tests of reads of values: tensors without data raise where values are asked for, and hide that they have none."""

from __future__ import annotations

import numpy
import pytest
import torch

from automodel_conv.planning.loader_trace import LoaderTrace
from automodel_conv.planning.loader_writes import Constant, NeedsValues, Write, key_of, view_of
from automodel_conv.planning.traced_copies import Composer
from automodel_conv.planning.value_reads import ValueReads


@pytest.fixture
def source():
    return torch.empty(3, 4, device="meta")


def run(code, *, targets=(), seen=(), **options):
    """Run code under a trace; return the trace and the result of the code."""
    trace = LoaderTrace(targets, **options)
    for tensor in seen:
        trace.keep(tensor)
    with torch.no_grad(), trace, ValueReads(trace):
        return trace, code()


def behind(trace, views):
    """Return the storages that views come from."""
    composer = Composer(trace.nbytes, {})
    for write in trace.writes:
        composer.write(write)
    return composer.storages_behind(view.storage for view in views)


READS = [
    lambda tensor: tensor.sum().item(),
    lambda tensor: bool(tensor[0, 0]),
    lambda tensor: tensor.tolist(),
    lambda tensor: tensor.numpy(),
    lambda tensor: numpy.asarray(tensor),
    lambda tensor: torch.from_dlpack(tensor),
    lambda tensor: tensor.nonzero(),
    lambda tensor: tensor[tensor > 0],
    lambda tensor: torch.equal(tensor, tensor),
    lambda tensor: torch.allclose(tensor, tensor),
    lambda tensor: tensor.isnan().any() and 1,
    lambda tensor: tensor.unique(),
    lambda tensor: tensor.masked_select(tensor > 0),
    lambda tensor: setattr(torch.zeros(3, 4), "data", tensor),
    lambda tensor: torch.zeros(3, 4).set_(tensor),
]


@pytest.mark.parametrize("read", READS)
def test_reading_values_needs_them(read, source):
    trace = LoaderTrace()
    trace.keep(source)
    with trace, ValueReads(trace), pytest.raises(NeedsValues) as needs:
        read(source)
    assert key_of(source) in behind(trace, needs.value.inputs)
    assert needs.value.reason


def test_need_for_values_passes_handlers_of_errors(source):
    def code():
        try:
            return source.sum().item()
        except Exception:
            return 0

    with pytest.raises(NeedsValues):
        run(code, seen=[source])


def test_storages_that_values_come_from_are_found(source):
    def code():
        made = torch.cat([source * 2, other])
        unrelated.copy_(other[0])
        return made.clone()

    other, unrelated = torch.empty(3, 4, device="meta"), torch.zeros(4)
    trace, made = run(code, targets=[unrelated], seen=[source, other])
    storages = behind(trace, [view_of(made)])
    assert {key_of(source), key_of(other)} < storages
    assert key_of(unrelated) not in storages


def test_data_without_values_takes_the_place_of_that_with(source):
    def code():
        source.data = torch.ones(2)
        return source

    trace, made = run(code)
    assert made.shape == (2,)
    assert trace.writes == [Write(view_of(made), Constant(1))]


def test_addresses_of_tensors_with_data_are_their_own():
    made = torch.zeros(2)
    _, address = run(made.data_ptr)
    assert address == made.data_ptr()


def test_sources_are_found_on_the_cpu_and_targets_where_they_are(source):
    target = torch.empty(2, device="meta")
    _, found = run(lambda: [(t.device.type, t.is_meta, t.is_cpu) for t in (source, target)], targets=[target])
    assert found == [("cpu", False, True), ("meta", True, False)]
