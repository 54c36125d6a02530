"""Tests of planning a merge: the places of deltas in what a plan writes, and none lost on the way."""

from dataclasses import replace

import pytest
import torch

from automodel_conv.errors import CoverageError, NameProblems, UnsupportedError
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.lora.merging import open_adapters, plan_merge
from automodel_conv.planning.quantization import arranged_plan
from automodel_conv.planning.regions import box
from tests.lora.support import (
    EXPERTS,
    HIDDEN,
    INNER,
    PREFIX,
    dyadic,
    in_memory,
    lora,
    per_expert,
    product_of,
    product_of_delta,
    toy_base,
    values_of,
    write_adapter,
)

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ADAPTER = per_expert((0, 2)) | lora("q_proj", 6, HIDDEN)


def added(merge, adapter, plan):
    """Return what a merge adds to each target, in float64."""
    products = {i: product_of_delta(delta, adapter) for i, delta in enumerate(merge.factors.deltas)}
    return {name: values_of(blocks, products, plan.target(name).shape) for name, blocks in merge.blocks.items()}


def expected_stacks(kind):
    """Return the products of ``ADAPTER`` as stacks of the model."""

    def matrix(expert, name):
        outputs, inputs = (HIDDEN, INNER) if name == "down_proj" else (INNER, HIDDEN)
        if expert == 1:
            return torch.zeros(outputs, inputs, dtype=torch.float64)
        return product_of(ADAPTER, f"mlp.experts.{expert}.{name}")

    gate, up, down = (
        torch.stack([matrix(e, name) for e in range(EXPERTS)]) for name in ("gate_proj", "up_proj", "down_proj")
    )
    if kind == "interleaved":
        gate_up = torch.stack([gate, up], 2).flatten(1, 2)
    else:
        gate_up = torch.cat([gate, up], 1)
    return {GATE_UP: gate_up, DOWN: down} if kind == "linear" else {GATE_UP: gate_up.mT, DOWN: down.mT}


@pytest.mark.parametrize("kind", ["linear", "transposed", "interleaved"])
def test_products_are_added_where_the_plan_writes_their_weights(kind):
    base, adapter = toy_base(kind), in_memory(ADAPTER)
    plan = base.loading.plan
    found = added(plan_merge(plan, [adapter], base), adapter, plan)
    expected = expected_stacks(kind) | {"q_proj.weight": product_of(ADAPTER, "q_proj")}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["linear", "transposed", "interleaved"])
def test_part_of_a_plan_has_the_parts_of_the_products(kind):
    base, adapter = toy_base(kind), in_memory(ADAPTER)
    plan = base.loading.plan
    shapes = {name: plan.target(name).shape for name in (GATE_UP, DOWN)}
    regions = {
        GATE_UP: box(shapes[GATE_UP], (1, 3, 2), (2, 4, 5)),
        DOWN: box(shapes[DOWN], (1, 0, 0), (1, *shapes[DOWN][1:])),
    }
    part = plan.shard(regions)
    merge = plan_merge(plan, [adapter], base, part)
    assert DOWN not in merge.blocks  # expert 1 has no adapter
    found = added(merge, adapter, part)
    assert torch.equal(found[GATE_UP], expected_stacks(kind)[GATE_UP][1:3, 3:7, 2:7])


def test_blocks_that_replace_come_first():
    tensors = lora("q_proj", 6, HIDDEN) | {f"{PREFIX}norm.weight": dyadic(3)}
    base = toy_base()
    whole = in_memory({f"{PREFIX}q_proj.weight": dyadic(6, HIDDEN)})
    merge = plan_merge(base.loading.plan, [in_memory(tensors), whole], base)
    deltas = merge.factors.deltas
    assert [deltas[block.delta].b is None for block in merge.blocks["q_proj.weight"]] == [True, False]
    assert [deltas[block.delta].adapter for block in merge.blocks["q_proj.weight"]] == [1, 0]
    assert [tuple(tensor.shape) for tensor in merge.factors.of(merge.blocks["q_proj.weight"][1].delta)] == [
        (1, 2, HIDDEN),
        (1, 6, 2),
    ]


def test_plan_that_does_not_write_a_changed_tensor_loses_nothing_silently():
    base = toy_base()
    plan = arranged_plan(base.table)
    kept = [target for target in plan.targets if target.name != "mlp.experts.2.up_proj.weight"]
    with pytest.raises(CoverageError, match=r"(?s)1 modules of the adapter.*toy.*mlp.experts.2.up_proj") as caught:
        plan_merge(replace(plan, targets=tuple(kept)), [in_memory(ADAPTER)], base)
    assert "experts.0" not in str(caught.value)


def test_tensors_that_replace_the_same_elements_are_named():
    base = toy_base()
    first, second = (in_memory({f"{PREFIX}norm.weight": dyadic(3, seed=seed)}) for seed in (1, 2))
    with pytest.raises(UnsupportedError, match=r"(?s)replaces tensors twice.*toy.*norm.weight: norm.weight"):
        plan_merge(base.loading.plan, [first, second], base)
    stack = dyadic(EXPERTS, 2 * INNER, HIDDEN)
    matrix = {f"{PREFIX}mlp.experts.1.up_proj.weight": dyadic(INNER, HIDDEN)}
    with pytest.raises(UnsupportedError, match=rf"experts.1.up_proj.weight: mlp.experts.1.up_proj.weight, {GATE_UP}"):
        plan_merge(base.loading.plan, [in_memory(matrix | {f"{PREFIX}{GATE_UP}": stack})], base)
    parts = {f"{PREFIX}mlp.experts.{e}.up_proj.weight": dyadic(INNER, HIDDEN) for e in range(EXPERTS)}
    assert plan_merge(base.loading.plan, [in_memory(parts)], base).blocks.keys() == {GATE_UP}


def test_adapter_that_does_not_fit_is_refused():
    with pytest.raises(NameProblems):
        plan_merge(toy_base().loading.plan, [in_memory(lora("nowhere", 2, 2))], toy_base())


def test_adapters_are_a_path_or_pairs(tmp_path):
    first, second = write_adapter(tmp_path / "1", ADAPTER), write_adapter(tmp_path / "2", ADAPTER)
    for argument in (first, str(first)):
        [adapter] = open_adapters(argument, SourceSettings())
        assert (adapter.path, adapter.weight) == (str(first), 1.0)
    opened = open_adapters([(first, 1), (str(second), -0.5)], SourceSettings())
    assert [(adapter.path, adapter.weight) for adapter in opened] == [(str(first), 1.0), (str(second), -0.5)]
    assert [adapter.weight for adapter in open_adapters(((first, 0),), SourceSettings())] == [0.0]


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ([], r"\[\]|a list"),
        (None, "NoneType"),
        (3, "an? int"),
        (["path"], "a str"),
        ([("path",)], r"\('path',\)"),
        ([("path", "1")], r"\('path', '1'\)"),
        ([("path", True)], "True"),
        ([("path", 1.0, 2)], r"\('path', 1.0, 2\)"),
        ([(3, 1.0)], r"\(3, 1.0\)"),
        ({"path": 1.0}, "a dict"),
    ],
    ids=str,
)
def test_other_arguments_are_refused(argument, found):
    with pytest.raises(UnsupportedError, match=f"(?s)not an adapter.*pairs of a path and a weight.*{found}"):
        open_adapters(argument, SourceSettings())
