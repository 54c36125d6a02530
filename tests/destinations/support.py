"""Modules and tensors for loads with a device map."""

from __future__ import annotations

import torch
from torch import nn

from automodel_conv.testing import assert_bytes_equal
from tests.execution.elsewhere import FIRST, HOST, SECOND

TENSORS = {
    "embed.weight": torch.arange(1200.0).reshape(30, 40),
    "layers.1.weight": torch.arange(7.0),
    "layers.10.weight": torch.arange(9.0),
    "head.weight": torch.arange(1200.0).reshape(30, 40) + 0.5,
}

MAP = {"embed": 0, "layers.1": 1, "layers.10": "cpu", "": "cuda:1"}
WHERE = {"embed.weight": FIRST, "layers.1.weight": SECOND, "layers.10.weight": HOST, "head.weight": SECOND}


class Weight(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class Model(nn.Module):
    """Parameters with the names of ``TENSORS``."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.head = Weight(30, 40), Weight(30, 40)
        self.layers = nn.ModuleDict({"1": Weight(7), "10": Weight(9)})
        if tied:
            self.head.weight = self.embed.weight


def meta(model):
    return model.to("meta")


def tied():
    with torch.device("meta"):
        return Model(tied=True)


def assert_loaded(state, where, wanted=TENSORS):
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert tensor.device == where[name], name
        assert_bytes_equal(tensor.as_subclass(torch.Tensor), wanted[name])
