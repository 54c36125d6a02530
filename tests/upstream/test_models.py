"""Tests of the names, dtypes and shapes that a model needs, on any module and on models of transformers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.layouts import ExpertLayout
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.models import (
    expert_layouts,
    matching,
    model_targets,
    state_table,
    tied_names,
)
from tests.compiling.support import Experts, Model, StatedExperts


def test_tensors_in_memory_are_listed_in_their_order():
    table = state_table({"b": torch.ones(2, 3), "a": torch.ones((), dtype=torch.int64), "c": torch.ones(0).bfloat16()})
    assert (table.names, table.dtypes, table.shapes) == (["b", "a", "c"], ["F32", "I64", "BF16"], [(2, 3), (), (0,)])


@pytest.mark.parametrize(
    ("thing", "text"), [("text", r"a is not a tensor(.|\n)*str"), (torch.ones(2, dtype=torch.cdouble), "complex128")]
)
def test_something_that_files_cannot_hold_is_named(thing, text):
    with pytest.raises(UnsupportedError, match=text):
        state_table({"a": thing})


def test_parameters_with_values_keep_their_dtype():
    module = nn.BatchNorm1d(2)
    assert model_targets(module) == {
        "weight": TargetSpec("F32", (2,)),
        "bias": TargetSpec("F32", (2,)),
        "running_mean": TargetSpec("F32", (2,)),
        "running_var": TargetSpec("F32", (2,)),
        "num_batches_tracked": TargetSpec("I64", ()),
    }


def test_parameters_without_values_are_new():
    targets = model_targets(nn.Linear(3, 2, device="meta", dtype=torch.bfloat16))
    assert targets == {"weight": TargetSpec("BF16", (2, 3), True), "bias": TargetSpec("BF16", (2,), True)}


def test_dtype_applies_to_floats_only():
    targets = model_targets(nn.BatchNorm1d(2), torch.float16)
    assert targets["weight"] == TargetSpec("F16", (2,), True)
    assert targets["num_batches_tracked"] == TargetSpec("I64", (), True)


def test_names_of_one_parameter_are_a_group():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    module["c"].weight = module["a"].weight
    assert tied_names(module) == [("a.weight", "c.weight")]
    assert tied_names(nn.Linear(2, 2)) == []


def test_names_that_transformers_would_tie_join_the_groups_of_shared_parameters():
    module = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abcd"})
    module["b"].weight = module["a"].weight
    module.all_tied_weights_keys = {"c.weight": "b.weight", "gone": "a.weight"}
    assert tied_names(module) == [("a.weight", "b.weight", "c.weight")]


def test_experts_that_state_no_layout_are_listed_without_one():
    models = nn.ModuleDict({"stated": Model(StatedExperts(2, 3, 4)), "silent": Model(Experts(2, 3, 4))})
    assert expert_layouts(models) == {
        "stated.experts": ExpertLayout(transposed=False, interleaved=False, gated=True),
        "silent.experts": None,
    }
    assert expert_layouts(nn.Linear(2, 2)) == {}


EXPERTS, INTERMEDIATE, HIDDEN = 2, 3, 4


@pytest.mark.parametrize(("model_type", "cls"), [("llama4", "Llama4TextExperts"), ("step3p7", "Step3p7Experts")])
def test_layout_is_known_of_classes_that_state_none_and_agrees_with_their_forward(model_type, cls):
    modeling = f"transformers.models.{model_type}.modeling_{model_type}"
    experts_class = getattr(pytest.importorskip(modeling, reason="needs a transformers with the type"), cls)
    config = SimpleNamespace(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, moe_intermediate_size=INTERMEDIATE)
    config.num_local_experts, config.hidden_act = EXPERTS, "silu"
    experts = type(f"FSDP{cls}", (experts_class,), {})(config).double()  # as torch's FSDP2 changes the class
    for weight in experts.parameters():
        nn.init.normal_(weight)
    layout = expert_layouts(nn.ModuleDict({"experts": experts}))["experts"]
    assert layout == ExpertLayout(transposed=cls == "Llama4TextExperts", interleaved=False, gated=True)

    def matrices(weight):
        return weight.transpose(1, 2) if layout.transposed else weight

    tokens = torch.randn(EXPERTS, HIDDEN, dtype=torch.float64)  # one for each expert
    gate, up = torch.einsum("eih,eh->ei", matrices(experts.gate_up_proj), tokens).chunk(2, dim=1)
    expected = torch.einsum("ehi,ei->eh", matrices(experts.down_proj), nn.functional.silu(gate) * up)
    routes = () if layout.transposed else (torch.arange(EXPERTS)[:, None], torch.ones(EXPERTS, 1).double())
    torch.testing.assert_close(experts(tokens, *routes), expected)


def test_patterns_of_dtypes_match_as_in_transformers():
    assert matching({})("a.weight") is None
    pytest.importorskip("transformers", reason="the patterns are those of transformers")
    planned = matching({"gate": torch.float32, r"layers.*.norm": torch.float64})
    assert planned("layers.3.norm.weight") == torch.float64
    assert planned("mlp.gate.weight") == torch.float32
    assert planned("mlp.up.weight") is None
