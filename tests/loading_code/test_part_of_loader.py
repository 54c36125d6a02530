"""Tests of loading code that runs for some targets only: all other tensors have no data, and cost nothing."""

from __future__ import annotations

import pytest
import torch

from automodel_conv.loading_code.part_of_loader import PartOfFunctions, PartOfLoader
from automodel_conv.planning.loader_writes import key_of
from tests.loading_code.loads import bits


@pytest.fixture
def without():
    return torch.empty(3, device="meta")


def run(code, *needed):
    """Run code under the modes; return its result, and whether data lacks."""
    mode = PartOfLoader({key_of(tensor) for tensor in needed})
    with mode, PartOfFunctions(mode):
        return code(), mode.lacks_data


def test_operations_on_data_run():
    target = torch.zeros(3)
    _, lacks = run(lambda: target.add_(torch.ones(3) * 2), target)
    assert target.tolist() == [2, 2, 2]
    assert not lacks


def test_operations_without_data_have_no_data(without):
    made, lacks = run(lambda: torch.cat([without * 2, without]).to("cpu"))
    assert made.is_meta
    assert made.shape == (6,)
    assert not lacks


def test_writes_without_data_to_other_tensors_are_left_out(without):
    target = torch.zeros(3)
    _, lacks = run(lambda: target.copy_(without))
    assert target.tolist() == [0, 0, 0]
    assert not lacks


@pytest.mark.parametrize(
    "write",
    [
        lambda target, without: target.copy_(without),
        lambda target, without: target[1:].copy_(without[1:]),
        lambda target, without: target.add_(without),
        lambda target, without: torch.add(without, 1, out=target),
        lambda target, without: torch._foreach_copy_([target], [without]),
        lambda target, without: setattr(target, "data", without),
    ],
)
def test_writes_without_data_to_needed_targets_are_told(write, without):
    target = torch.zeros(3)
    _, lacks = run(lambda: write(target, without), target)
    assert lacks
    assert not target.is_meta


def test_data_of_a_tensor_without_data_is_not_kept(without):
    run(lambda: setattr(without, "data", torch.ones(2)))
    assert without.is_meta
    assert without.shape == (2,)


def test_tensors_that_the_code_makes_have_data(without):
    made, _ = run(lambda: [torch.zeros(2), torch.zeros_like(without), without.new_ones(2), torch.full((2,), 3.0)])
    assert [one.sum().item() for one in made] == [0, 0, 2, 6]


def test_tensors_made_for_other_devices_have_data():
    made, _ = run(lambda: torch.ones(2, device="meta"))
    assert made.tolist() == [1, 1]


def test_mixed_operations_give_some_data(without):
    made, lacks = run(lambda: torch.stack([torch.ones(3), without])[0])
    assert bits(made) == bits(torch.ones(3))
    assert not lacks


def test_shapes_change_without_data(without):
    made, _ = run(lambda: without.unsqueeze_(0))
    assert made is without
    assert made.shape == (1, 3)


def test_inference_mode_changes_nothing(without):
    def code():
        with torch.inference_mode():
            return without.cpu().reshape(1, 3), torch.ones(2, 2).t().reshape(-1)

    (made, with_data), _ = run(code)
    assert made.is_meta
    assert with_data.tolist() == [1, 1, 1, 1]


def test_addresses_differ(without):
    other = torch.empty(3, device="meta")
    addresses, _ = run(lambda: [without.data_ptr(), other.data_ptr(), without[1:].data_ptr()])
    assert len({0, *addresses}) == 4
    assert addresses[2] - addresses[0] == 4


@pytest.mark.parametrize("is_read", [False, True])
def test_changes_of_data_through_a_tensor_without_data_are_told_if_it_is_read(is_read, without):
    def code():
        without.data = source[1:]
        without.data.mul_(2)
        return source.clone() if is_read else None

    source = torch.ones(4)
    _, lacks = run(code)
    assert lacks == is_read


def test_lack_of_data_is_told_after_other_writes(without):
    needed, other = torch.zeros(3), torch.zeros(3)
    _, lacks = run(lambda: [needed.copy_(without), other.copy_(without)], needed)
    assert lacks


def test_tensors_without_data_are_on_the_cpu_to_the_code(without):
    (device, is_meta), _ = run(lambda: (without.device, without.is_meta))
    assert device == torch.device("cpu")
    assert not is_meta
