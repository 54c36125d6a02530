"""Tests of answers of tensors without data."""

from __future__ import annotations

import torch

from automodel_conv.planning.hidden_data import CPU, DEVICES, Addresses


def test_addresses_of_tensors_without_data_do_not_overlap():
    addresses = Addresses()
    tensors = [torch.empty(size, dtype=torch.uint8, device="meta") for size in (0, 1, 4096, 5000, 1)]
    starts = [addresses.of(tensor) for tensor in tensors]
    assert starts[0] > 0
    for tensor, start, following in zip(tensors, starts, starts[1:], strict=False):
        assert start + tensor.numel() < following
    assert addresses.of(tensors[3][17:]) == starts[3] + 17
    assert addresses.of(tensors[3].view(torch.int16)[17:]) == starts[3] + 34


def test_answers_about_a_device_are_those_of_torch():
    tensor = torch.zeros(1)
    for question, answer in DEVICES.items():
        assert answer(CPU) == question(tensor)
        assert answer(torch.device("meta")) == question(tensor.to("meta"))
