"""Tests of every operation, and of every registered chain, against transformers' own ``convert``."""

import random
from math import prod

import pytest
import torch
from hypothesis import given, settings

from automodel_conv.planning.compiler import compile_targets
from automodel_conv.planning.copies import SourceTable
from automodel_conv.upstream.rules import RuleSet
from tests.planning import oracles
from tests.planning.operation_cases import CASES, SEEDS, each_operation, lowered
from tests.planning.oracles import flat
from tests.planning.registered_rules import (
    config_values,
    example_names,
    model_with,
    parameter_shapes,
    registered_chains,
    source_shape,
)


def tensor_of(tensor):
    return torch.tensor(flat(tensor), dtype=torch.int64).reshape(tensor.shape)


def plain(tensors):
    return {key: (tuple(t.shape), t.reshape(-1).tolist()) for key, t in tensors.items()}


def squeezes_all_dims(core):
    chunks = {"a": torch.zeros(2, 1)}
    return core.SplitModulelist(0).convert(chunks, ["a"], ["a.*"])["a.0"].dim() == 0


@each_operation
@settings(max_examples=25)
@given(seed=SEEDS)
def test_operation_equals_upstream(name, seed):
    core = pytest.importorskip("transformers.core_model_loading")
    if not hasattr(core, name):
        pytest.skip(f"this transformers has no {name}")
    case = CASES[name](random.Random(seed))
    try:
        operation = getattr(core, name)(**case.arguments)
    except TypeError:
        return  # this transformers lacks the option
    shapes = dict(zip(case.targets, case.shapes, strict=False))
    model = model_with(shapes, **case.config)
    inputs = {p: [tensor_of(t) for t in tensors] for p, tensors in case.inputs.items()}
    try:
        result = operation.convert(
            inputs,
            source_patterns=case.sources,
            target_patterns=case.targets,
            full_layer_name=case.targets[0],
            model=model,
            config=model.config,
        )
    except (ValueError, TypeError, AttributeError) as error:
        older = (name == "Chunk" and "Failed to convert" in str(error)) or (
            name == "PermuteForRope" and case.options["permute_layer_names"] is None
        )
        if not older:
            raise
        return  # an older transformers cannot do this
    result = {key: value[0] if isinstance(value, list) else value for key, value in result.items()}
    converter = core.WeightConverter(case.sources, case.targets, operations=[operation])
    ours = lowered(RuleSet([converter], model).operations(0), case)
    if name == "SplitModulelist" and squeezes_all_dims(core):
        ours = {k: (tuple(n for n in shape if n != 1), e) for k, (shape, e) in ours.items()}
        result = {k: t.squeeze() for k, t in result.items()}
    assert ours == plain(result)


def plan_values(rule, tensors, model, shapes, reverse=False):
    names = list(tensors)
    table = SourceTable(names, ["I64"] * len(names), [tuple(t.shape) for t in tensors.values()])
    rules = RuleSet([rule], model, reverse=reverse)
    plan, problems = compile_targets(table, rules, None, parameters=shapes)
    problems.raise_unless_fit("test")
    elements = {name: t.reshape(-1).tolist() for name, t in tensors.items()}
    result = oracles.execute(plan, elements)
    return {t.name: (t.shape, result[t.name]) for t in plan.targets}


@pytest.mark.parametrize("rule", registered_chains())
@pytest.mark.parametrize("transposed", [False, True], ids=["as wanted", "transposed"])
def test_registered_chain_equals_upstream_both_ways(rule, transposed):
    names, shape = example_names(rule, 4), source_shape(rule)
    kinds = [type(op).__name__ for op in rule.operations]
    if "Inkling2LoopDequantizeExperts" in kinds:
        names = names[:1]  # the others are scales
    tensors, start = {}, 0
    for name in names:
        tensors[name] = torch.arange(start, start + prod(shape)).reshape(shape)
        start += prod(shape)
    mapped, _ = oracles.upstream_mapping(names, [rule], None)
    assert len(mapped) == 1, mapped.keys()
    first = next(iter(mapped))
    targets = [first.replace(rule.target_patterns[0], pattern) for pattern in rule.target_patterns]
    shapes = parameter_shapes(rule, targets, shape, transposed)
    config = config_values(rule, names, shape)
    model = model_with(shapes, **config)
    expected = oracles.upstream_values([rule], tensors, model)
    assert plan_values(rule, tensors, model, shapes) == plain(expected)

    try:
        back = rule.reverse_transform()
    except NotImplementedError:
        return  # this transformers cannot revert this either
    grouped = {name: tensor.contiguous() for name, tensor in expected.items()}
    restored = oracles.upstream_values([back], grouped, model_with({n: t.shape for n, t in tensors.items()}, **config))
    ours = plan_values(rule, grouped, model, {n: tuple(t.shape) for n, t in tensors.items()}, reverse=True)
    assert ours == plain(restored)


def test_registry_has_chains():
    pytest.importorskip("transformers")
    assert len(registered_chains()) >= 8
