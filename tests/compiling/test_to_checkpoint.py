"""Tests of plans from the tensors of a model back to the names of a checkpoint."""

import pytest
import torch

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.errors import NameProblems, UnsupportedError
from tests.compiling.support import table, tensors_of, write
from tests.planning.oracles import addressed, execute

RULES = [
    WeightRenaming("block", "layer"),
    WeightConverter(
        ["experts.*.w1.weight", "experts.*.w3.weight"],
        "experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter("experts.*.w2.weight", "experts.down_proj", operations=[MergeModulelist(dim=0)]),
]
SIZES = [(2, 3, 4), (2, 2, 4), (2, 4, 4), (1, 1, 1)]  # experts, intermediate, hidden


def grouped(experts, intermediate, hidden):
    return {
        "layer.norm": (hidden,),
        "layer.experts.gate_up_proj": (experts, 2 * intermediate, hidden),
        "layer.experts.down_proj": (experts, hidden, intermediate),
    }


def single(experts, intermediate, hidden):
    names = {f"block.experts.{e}.{w}.weight": (intermediate, hidden) for w in ("w1", "w3") for e in range(experts)}
    down = {f"block.experts.{e}.w2.weight": (hidden, intermediate) for e in range(experts)}
    return {"block.norm": (hidden,), **names, **down}


def element_of(name, element, sizes):
    """Return the element of the grouped tensors that equals an element of a single expert."""
    _, intermediate, hidden = sizes
    if name == "block.norm":
        return "layer.norm", element
    expert, weight = int(name.split(".")[2]), name.split(".")[3]
    if weight == "w2":
        return "layer.experts.down_proj", expert * hidden * intermediate + element
    row = 2 * expert + (weight == "w3")
    return "layer.experts.gate_up_proj", row * intermediate * hidden + element


def assert_single_experts(plan, sizes):
    expected = single(*sizes)
    assert {target.name: target.shape for target in plan.targets} == expected
    results = execute(plan, addressed(plan.sources))
    for name, shape in expected.items():
        numel = shape[0] * (shape[1] if len(shape) > 1 else 1)
        assert results[name] == [element_of(name, element, sizes) for element in range(numel)]


@pytest.mark.parametrize("sizes", SIZES)
def test_reversed_rules_split_experts(sizes):
    assert_single_experts(saving_plan(table(grouped(*sizes)), rules=RULES, checked=True), sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_reference_restores_its_names_and_shapes(tmp_path, sizes):
    reference = write(tmp_path, tensors_of(single(*sizes)))
    plan = saving_plan(table(grouped(*sizes)), rules=RULES, reference=reference)
    assert_single_experts(plan, sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_another_layout_of_the_tensors_is_split_as_well(sizes):
    experts, intermediate, hidden = sizes
    given = {"layer.experts.w13_weight": (experts, 2 * intermediate, hidden)}
    plan = saving_plan(table(given), rules=RULES, layout="vllm")
    results = execute(plan, addressed(plan.sources))
    assert list(results) == [f"block.experts.{e}.{w}.weight" for w in ("w1", "w3") for e in range(experts)]
    last = results[f"block.experts.{experts - 1}.w3.weight"][-1]
    assert last == ("layer.experts.w13_weight", experts * 2 * intermediate * hidden - 1)


def test_tensors_keep_their_order_and_dtypes_without_a_model():
    sources = table({"b": (2,), "a": (3,)}, "BF16")
    plan = saving_plan(sources, rules=[])
    assert [(target.name, target.dtype) for target in plan.targets] == [("b", "BF16"), ("a", "BF16")]


def test_dtypes_are_those_of_the_tensors_not_of_the_reference(tmp_path):
    reference = write(tmp_path, tensors_of(single(2, 3, 4)))
    plan = saving_plan(table(grouped(2, 3, 4), "BF16"), rules=RULES, reference=reference)
    assert {target.dtype for target in plan.targets} == {"BF16"}


def test_tensors_that_the_reference_lacks_are_named(tmp_path):
    reference = write(tmp_path, tensors_of({"block.norm": (4,)}))
    with pytest.raises(NameProblems, match=r"layer\.experts\.down_proj"):
        saving_plan(table(grouped(2, 3, 4)), rules=RULES, reference=reference)


def test_experts_that_rules_would_split_wrongly_are_refused():
    transposed = {"layer.experts.gate_up_proj": (2, 4, 6), "layer.experts.down_proj": (2, 3, 4)}
    with pytest.raises(UnsupportedError, match=r"(?s)layer\.experts\.gate_up_proj.*\blayout="):
        saving_plan(table(transposed), rules=RULES)


def test_layout_that_no_tensor_has_is_refused():
    with pytest.raises(UnsupportedError, match=r"no tensor is in the layout 'nemo'"):
        saving_plan(table({"layer.experts.w2_weight": (2, 4, 3)}), rules=RULES, layout="nemo")


def test_reference_of_codes_gives_only_names(tmp_path):
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors_of(single(2, 3, 4)).items()}
    plan = saving_plan(table(grouped(2, 3, 4), "BF16"), rules=RULES, reference=write(tmp_path, tensors))
    assert {target.dtype for target in plan.targets} == {"BF16"}
    assert_single_experts(plan, (2, 3, 4))


def test_names_of_wrappers_are_removed_if_the_call_gives_a_layout_or_rules():
    names = {"_orig_mod.experts.w2_weight": (2, 4, 3)}
    plan = saving_plan(table(names), rules=[], layout="vllm")
    assert [target.name for target in plan.targets] == ["experts.down_proj"]
    plan = saving_plan(table({"_orig_mod.a": (2,)}), rules=[])
    assert [target.name for target in plan.targets] == ["_orig_mod.a"]
