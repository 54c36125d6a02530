"""Tests of lowering against traces: transformers' own ``convert``, traced, makes the copies that it is lowered to.

Operations are lowered as those of the pinned release. ``test_upstream_operations.py`` has what others do otherwise.
"""

from __future__ import annotations

import importlib
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings

from automodel_conv.errors import UnsupportedError
from automodel_conv.loading_code.dry_run import traced
from automodel_conv.planning.compiler import compile_targets
from automodel_conv.planning.copies import SourceTable, Target, zero_rows
from automodel_conv.planning.lowering import copies_of, lower
from automodel_conv.planning.operations import OPERATIONS, Context, NotLowerable
from automodel_conv.planning.values import leaf
from automodel_conv.upstream.models import state_table
from automodel_conv.upstream.quantizer_rules import own_rule
from automodel_conv.upstream.rules import RuleSet
from tests.planning import oracles
from tests.planning.element_maps import assert_same_target, assert_same_targets, origins
from tests.planning.operation_cases import CASES, SEEDS, each_operation
from tests.planning.registered_rules import (
    PADDING,
    config_values,
    example_names,
    model_with,
    parameter_shapes,
    registered_chains,
    source_shape,
)

pytest.importorskip("transformers", minversion="5.24", reason="traces its operations")
core = pytest.importorskip("transformers.core_model_loading")

DTYPE, F8 = torch.bfloat16, torch.float8_e4m3fn
SIZES = {
    "unequal": lambda shape: shape,
    "equal": lambda shape: (shape[0],) * len(shape),
    "one column": lambda shape: (*shape[:-1], 1),
    "one row": lambda shape: (1, *shape[1:]),
    "one element": lambda shape: (1,) * len(shape),
    "no column": lambda shape: (*shape[:-1], 0),
    "no row": lambda shape: (0, *shape[1:]),
}


def trace_of(convert, table):
    """Return the trace of a function from tensors by name to tensors by name, which must not read values."""

    def read(rows):
        assert not rows, "the operation reads values"
        return []

    return traced(convert, table, None, "dict", read)


def firsts(tensors):
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in tensors.items()}


@each_operation
@settings(max_examples=25)
@given(seed=SEEDS)
def test_operation_is_lowered_to_the_copies_that_its_code_makes(name, seed):
    case = CASES[name](random.Random(seed))
    operation = getattr(core, name)(**case.arguments)
    model = model_with(dict(zip(case.targets, case.shapes, strict=False)), DTYPE, **case.config)
    names = [f"{pattern} {i}" for pattern, tensors in case.inputs.items() for i in range(len(tensors))]
    shapes = [tensor.shape for tensors in case.inputs.values() for tensor in tensors]

    def convert(tensors):
        given = iter(tensors.values())
        converted = operation.convert(
            {pattern: [next(given) for _ in parts] for pattern, parts in case.inputs.items()},
            source_patterns=case.sources,
            target_patterns=case.targets,
            full_layer_name=case.targets[0],
            model=model,
            config=model.config,
        )
        return firsts(converted)

    trace = trace_of(convert, SourceTable(names, ["BF16"] * len(names), shapes))
    assert not trace.computed
    rows = iter(range(len(names)))
    leaves = {p: [leaf(next(rows), tensor.shape) for tensor in tensors] for p, tensors in case.inputs.items()}
    rule = core.WeightConverter(case.sources, case.targets, operations=[operation])
    context = Context(tuple(case.sources), tuple(case.targets), case.shapes)
    values = lower(RuleSet([rule], model).operations(0), leaves, context)
    assert list(trace.names) == list(values)
    for key, value in values.items():
        fills = zero_rows(value.shape, value.zero_rows)
        target = Target(key, "BF16", value.shape, 0, tuple(range(len(names))), copies_of(value), fills=fills)
        assert_same_target(trace.plan.target(key), target)


def planned(table, rule, model, parameters, reverse):
    """Return the plan of a rule; None if its operations do not fit the sources."""

    def compiled(transposed):
        rules = RuleSet([rule], model, reverse=reverse)
        return compile_targets(table, rules, None, parameters=parameters, transposed=transposed)

    try:
        plan, problems = compiled(None)
    except UnsupportedError:
        # No shape determines whether a square matrix is transposed. transformers transposes none.
        if not any(getattr(operation, "check_dims", False) for operation in rule.operations):
            raise
        plan, problems = compiled(False)
    return None if problems.failed else plan


def agreed(rule, table, model, parameters, reverse=False):
    """Check that a rule of transformers makes the copies that it is planned as; return the trace, None if it fails."""
    applied = rule.reverse_transform() if reverse else rule
    try:
        trace = trace_of(lambda tensors: oracles.upstream_values([applied], tensors, model), table)
    except (RuntimeError, ValueError, IndexError, TypeError):
        trace = None
    plan = planned(table, rule, model, parameters, reverse)
    assert (trace is None) == (plan is None)
    if trace is not None and plan is not None:
        assert not trace.computed
        assert_same_targets(trace.plan, plan)
    return trace


@pytest.mark.parametrize("rule", registered_chains())
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [4, 1])
def test_registered_chain_is_planned_as_its_code_copies_both_ways(rule, size, count):
    kinds = [type(op).__name__ for op in rule.operations]
    shape = SIZES[size](source_shape(rule))
    names = example_names(rule, count)
    if "Inkling2LoopDequantizeExperts" in kinds:
        names = names[:1]  # the others are scales
    mapped, _ = oracles.upstream_mapping(names, [rule], None)
    [first] = mapped
    targets = [first.replace(rule.target_patterns[0], pattern) for pattern in rule.target_patterns]
    if "Inkling2UnpadVocab" in kinds:
        shape = (max(shape[0], 1) + PADDING, *shape[1:])
    parameters = parameter_shapes(rule, targets, shape)
    config = config_values(rule, names, shape)
    table = SourceTable(names, ["BF16"] * len(names), [shape] * len(names))
    trace = agreed(rule, table, model_with(parameters, DTYPE, **config), parameters)
    assert trace is not None or size not in ("unequal", "equal") or count == 1
    if trace is None:
        return
    made = trace.plan.targets
    back = SourceTable([t.name for t in made], [t.dtype for t in made], [t.shape for t in made])
    stored = dict.fromkeys(names, shape)
    agreed(rule, back, model_with(stored, DTYPE, **config), stored, reverse=True)


def registered_operations():
    """Return the operations of all rules of the registry, and those that reverse them."""
    rules = [rule for entry in oracles.registry().values() for rule in entry]
    forward = [operation for rule in rules for operation in getattr(rule, "operations", None) or ()]
    return [*forward, *(operation.reverse_op for operation in forward if not isinstance(operation, core._IdentityOp))]


def test_every_registered_operation_is_one_that_is_lowered():
    names = {type(operation).__name__ for operation in registered_operations()}
    assert {"MergeModulelist", "SplitModulelist"} <= names <= OPERATIONS.keys()
    assert all(type(operation) is getattr(core, type(operation).__name__) for operation in registered_operations())


BLOCKS = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(2, 2), scale_fmt=None))
"""What operations of FP8 read from a quantizer."""


def bytes_of(*shape):
    return torch.arange(256, dtype=torch.uint8).repeat(8)[: torch.Size(shape).numel()].reshape(shape)


NVFP4 = {
    "w13.weight": bytes_of(2, 4, 32),
    "w13.scale": torch.arange(1.0, 33).reshape(2, 4, 4).to(F8),
    "w13.amax": torch.tensor([2.0, 3.0]),
    "w13.denominator": torch.tensor(6.0),
}
MXFP8 = {"w13.weight": torch.arange(512.0).reshape(2, 4, 64).to(F8), "w13.scale": bytes_of(2, 4, 2) + 120}
COMPUTES = {
    "FP8": (
        "finegrained_fp8",
        "Fp8Dequantize",
        {"a.weight": torch.ones(4, 4).to(F8), "a.weight_scale_inv": torch.ones(2, 2)},
    ),
    "FP4 in blocks": (
        "finegrained_fp8",
        "Fp8Dequantize",
        {"a.weight": bytes_of(4, 4).view(torch.int8), "a.weight_scale_inv": torch.arange(1.0, 5).reshape(4, 1)},
    ),
    "to FP8": ("finegrained_fp8", "Fp8Quantize", {"a.weight": torch.arange(16.0).reshape(4, 4)}),
    "MXFP4": (
        "mxfp4",
        "Mxfp4Dequantize",
        {"gate_up_proj_blocks": bytes_of(2, 4, 2, 16), "gate_up_proj_scales": bytes_of(2, 4, 2) + 120},
    ),
    "NVFP4 of Inkling": (None, "Inkling2LoopDequantizeExperts", NVFP4),
    "MXFP8 of Inkling": (None, "Inkling2LoopDequantizeExperts", MXFP8),
    "norm of GGUF": ("gguf.gguf_conversion_mapping", "SubtractOne", {"a.weight": torch.arange(4.0)}),
    "logarithm of GGUF": ("gguf.gguf_conversion_mapping", "LogNegate", {"a.weight": torch.arange(4.0) - 5}),
}
COPIES_OF_GGUF = {
    "Unsqueeze": (0,),
    "PermuteRows": (torch.tensor([3, 0, 2, 1]),),
    "PermuteInputFeatures": (torch.tensor([3, 0, 2, 1]),),
    "TiledToGroupedRows": (2, 2),
    "TiledToGroupedInputs": (2, 2),
    "Cast": (torch.bfloat16,),
}


def other_operation(module, name, *arguments):
    """Return an operation outside of ``OPERATIONS``, or one of Inkling if there is no module."""
    found = core if module is None else importlib.import_module(f"transformers.integrations.{module}")
    return getattr(found, name)(*arguments)


def module_with_experts():
    module = torch.nn.Module()
    module.config = None
    module.gate_up_proj = torch.nn.Parameter(torch.empty(0, dtype=DTYPE))
    return module


def applied(operation, sources):
    """Return a function that applies an operation to tensors by name, as a rule of these sources does."""
    patterns = [*sources, *["absent"] * (4 - len(sources))]

    def convert(tensors):
        converted = operation.convert(
            {name: [tensor] for name, tensor in tensors.items()},
            source_patterns=patterns,
            target_patterns=["gate_up_proj"],
            full_layer_name="gate_up_proj",
            model=module_with_experts(),
            config=None,
        )
        return firsts(converted)

    return convert


@pytest.mark.parametrize(("module", "name", "sources"), COMPUTES.values(), ids=COMPUTES.keys())
def test_operation_that_computes_is_not_lowered_and_reads_no_values(module, name, sources):
    operation = other_operation(module, name, *[BLOCKS] * (module in ("finegrained_fp8", "mxfp4")))
    convert = applied(operation, sources)
    trace = trace_of(convert, state_table(sources))
    assert not trace.plan.targets
    made = convert(sources)
    assert trace.computed.keys() == made.keys()
    assert [(t.shape, t.dtype) for t in trace.changes.made.values()] == [(t.shape, t.dtype) for t in made.values()]
    assert set().union(*(unknown.rows for unknown in trace.computed.values())) == set(range(len(sources)))
    rules = RuleSet([core.WeightConverter([*sources], "gate_up_proj", operations=[operation])])
    leaves = {pattern: [leaf(row, tuple(t.shape))] for row, (pattern, t) in enumerate(sources.items())}
    context = Context(tuple(sources), ("gate_up_proj",), ())

    def lowered():
        return lower(rules.operations(0), leaves, context)

    with pytest.raises(NotLowerable, match=name):
        lowered()


def test_experts_of_inkling_without_scales_are_copied():
    operation = other_operation(None, "Inkling2LoopDequantizeExperts")
    trace = trace_of(applied(operation, ["w13.weight"]), SourceTable(["w13.weight"], ["BF16"], [(2, 4, 6)]))
    assert trace.plan.target("gate_up_proj").is_whole


def test_weight_without_scales_is_copied_by_the_quantizer_and_planned_by_the_rule_of_the_model():
    operation = other_operation("finegrained_fp8", "Fp8Dequantize", BLOCKS)
    names = [f"w1.{i}.weight" for i in range(3)]
    rule = core.WeightConverter("w1.*.weight", "gate_up_proj", operations=[operation, core.MergeModulelist(dim=0)])
    table, model = SourceTable(names, ["BF16"] * 3, [(2, 3)] * 3), module_with_experts()
    trace = trace_of(lambda tensors: oracles.upstream_values([rule], tensors, model), table)
    own = own_rule(rule)
    assert own is not None
    plan = planned(table, own, model, {}, False)
    assert plan is not None
    assert_same_targets(trace.plan, plan)


@pytest.mark.parametrize(("name", "arguments"), COPIES_OF_GGUF.items(), ids=COPIES_OF_GGUF.keys())
def test_operation_of_gguf_copies_and_is_not_lowered_because_such_files_are_not_read(name, arguments):
    operation = other_operation("gguf.gguf_conversion_mapping", name, *arguments)
    trace = trace_of(applied(operation, ["a"]), SourceTable(["a"], ["F32"], [(4, 4)]))
    expected = applied(operation, ["a"])({"a": torch.arange(16.0).reshape(4, 4)})["gate_up_proj"]
    target = trace.plan.target("gate_up_proj")
    assert (target.shape, target.dtype) == (tuple(expected.shape), "BF16" if name == "Cast" else "F32")
    assert origins(target)["element"].tolist() == expected.flatten().tolist()
    with pytest.raises(NotLowerable, match=name):
        RuleSet([core.WeightConverter("a", "gate_up_proj", operations=[operation])]).operations(0)
