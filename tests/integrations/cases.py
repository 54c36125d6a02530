"""A small model, a checkpoint and rules, loaded by transformers' converting function without and under the hook."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.modeling_utils import LoadStateDictConfig

from automodel_conv.testing import assert_bytes_equal


class Small(PreTrainedModel):
    """A model with these parameters and no computation."""

    config_class = PreTrainedConfig

    def __init__(self, config, shapes, base_model_prefix="model"):
        super().__init__(config)
        self.base_model_prefix = base_model_prefix
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module: Any = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.ModuleDict())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(torch.full(shape, -1.0)))
        self.post_init()


class Case(NamedTuple):
    """A model, a checkpoint for it and the rules between them."""

    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, torch.Tensor]
    rules: list[Any]
    config: PreTrainedConfig | None = None
    base_model_prefix: str = "model"


def convert(case: Case, file: Path):
    """Load the case's file by the function that ``transformers.modeling_utils`` calls now."""
    model = Small(copy.deepcopy(case.config) or PreTrainedConfig(), case.shapes, case.base_model_prefix)
    config = LoadStateDictConfig(weight_mapping=copy.deepcopy(case.rules))
    function = modeling_utils.convert_and_load_state_dict_in_model
    plan = {"tp_plan": {}} if "tp_plan" in inspect.signature(function).parameters else {}
    with modeling_utils.safe_open(file, framework="pt", device="cpu") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}
        info, _ = function(model=model, state_dict=slices, load_config=config, disk_offload_index=None, **plan)
    return model, info, config.weight_mapping


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(actual[name].contiguous(), tensor.contiguous())
