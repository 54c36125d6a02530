"""Tests of writes of loading code: views of storages, and keys of storages."""

from __future__ import annotations

import torch

from automodel_conv.planning.loader_writes import View, key_of, view_of


def test_view_is_that_of_the_storage():
    source = torch.empty(3, 4, device="meta")
    part = source.t()[1:, ::2]
    assert view_of(part) == View(key_of(source), torch.float32, 1, (3, 2), (1, 8))


def test_tensors_of_one_storage_have_one_key():
    tensor = torch.zeros(4)
    assert key_of(tensor) == key_of(tensor[1:]) != key_of(torch.zeros(4))
