"""A model of two weights, rules for it, and a load without and under the hook."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

pytest.importorskip("transformers", reason="hooks functions of transformers")

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import modeling_utils as upstream
from transformers.core_model_loading import Concatenate, WeightConverter

import automodel_conv as amc

STOCK = upstream.convert_and_load_state_dict_in_model


class ToyConfig(PreTrainedConfig):
    model_type = "toy_of_two"


class Toy(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"

    def __init__(self, config, nested=False):
        super().__init__(config)
        self.q = nn.Linear(2, 2, bias=False)
        self.k = nn.Linear(2, 2, bias=False)
        if nested:
            self.model = nn.Module()
            self.model.k = nn.Linear(2, 2, bias=False)
        self.post_init()


def load(directory, rules, nested=False, between=lambda: None, **tensors):
    """Return loaded values, the loading info, and the rules, which record whether they were used.

    ``between`` is called each time a tensor was opened.
    """
    file = directory / "toy.safetensors"
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, file)
    model = Toy(ToyConfig(), nested).to("meta")
    slices = {}
    for name in load_file(file):
        slices[name] = upstream.safe_open(file, framework="pt", device="cpu").get_slice(name)
        between()
    more = {"tp_plan": None} if "tp_plan" in inspect.signature(STOCK).parameters else {}
    info, *_ = upstream.convert_and_load_state_dict_in_model(
        model=model,
        state_dict=slices,
        load_config=upstream.LoadStateDictConfig(weight_mapping=rules, dtype=torch.float32),
        **more,
    )
    values = {name: None if p.is_meta else p.tolist() for name, p in model.named_parameters()}
    return values, (info.missing_keys, info.unexpected_keys), [rule.was_used() for rule in rules]


def same_under_the_hook(directory, rules, **options):
    stock = load(directory, copy.deepcopy(rules), **options)
    with amc.accelerate_transformers() as acceleration:
        hooked = load(directory, copy.deepcopy(rules), **options)
    assert hooked == stock
    return acceleration.loads[0]


PARTS = {"ka__weight": torch.full((1, 2), 2.0), "kb__weight": torch.full((1, 2), 3.0)}


def joined():
    return WeightConverter(["ka.weight", "kb.weight"], ["k.weight"], operations=[Concatenate(dim=0)])
