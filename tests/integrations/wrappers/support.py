"""Every way to wrap a model, and a model with its checkpoint written by transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from automodel_conv.testing import POISON
from tests.model_zoo import build_model, save_upstream


def in_place_of(path, wrap):
    """Return a function that wraps one module of the model in place."""

    def wrapped(model):
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, wrap(model.get_submodule(path)))
        return model

    return wrapped


def regions(model):
    return pytest.importorskip("accelerate.utils").compile_regions(model)


def compiled_in_place(model):
    model.model.layers[0].compile()
    return model


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def sharded_and_compiled(model):
    model = sharded(model)
    return torch.compile(in_place_of("model.layers.1", torch.compile)(model))


WHOLE = {
    "compiled": torch.compile,
    "compiled over a compiled layer": lambda m: torch.compile(in_place_of("model.layers.0", torch.compile)(m)),
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "DDP of compiled": lambda model: DistributedDataParallel(torch.compile(model)),
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model)),
}

PARTS = {
    "a compiled layer": in_place_of("model.layers.0", torch.compile),
    "compiled experts": in_place_of("model.layers.1.mlp.experts", torch.compile),
    "compiled embeddings": in_place_of("model.embed_tokens", torch.compile),
    "a compiled base model": in_place_of("model", torch.compile),
    "compiled in place": compiled_in_place,
    "a compiled layer in DDP": lambda m: DistributedDataParallel(in_place_of("model.layers.0", torch.compile)(m)),
    "a checkpointed layer": in_place_of("model.layers.0", checkpoint_wrapper),
    "a compiled checkpointed layer": in_place_of("model.layers.0", lambda m: torch.compile(checkpoint_wrapper(m))),
    "compiled regions": regions,
}

SHARDED = {"FSDP2": sharded, "FSDP2 and compiled": sharded_and_compiled}
WAYS = WHOLE | PARTS | SHARDED | {"averaged": AveragedModel}


class Published:
    """A model and its checkpoint written by transformers."""

    def __init__(self, name, directory):
        self.path = directory
        self.model = build_model(name)
        save_upstream(self.model, self.path, "5GB")
        self.tensors = load_file(self.path / "model.safetensors")

    def wrapped(self, way, *, poisoned=False):
        model = copy.deepcopy(self.model)
        if poisoned:
            for tensor in model.state_dict().values():
                tensor.reshape(-1).view(torch.uint8).fill_(POISON)
        return WAYS[way](model)
