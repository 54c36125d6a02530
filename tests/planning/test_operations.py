"""Tests of each operation against loops over coordinates, and of inputs that do not fit."""

import random

import pytest
from hypothesis import given, settings

from automodel_conv.planning.lowering import lower
from automodel_conv.planning.operations import OPERATIONS, Context, NotLowerable, Operation
from automodel_conv.planning.values import LoweringError, leaf
from automodel_conv.upstream.rules import RuleSet
from tests.planning.operation_cases import CASES, SEEDS, each_operation, lowered
from tests.planning.oracles import flat


def test_every_operation_has_a_case():
    assert CASES.keys() == OPERATIONS.keys()


def answer(case):
    return {key: (tensor.shape, flat(tensor)) for key, tensor in case.expected.items()}


@each_operation
@settings(max_examples=40)
@given(seed=SEEDS)
def test_operation_equals_loops_over_coordinates(name, seed):
    case = CASES[name](random.Random(seed))
    operation = Operation(name, tuple(sorted(case.options.items())))
    assert lowered([operation], case) == answer(case)


@pytest.mark.parametrize(
    ("operation", "shapes", "text"),
    [
        (Operation("MergeModulelist", (("dim", 0),)), [(2, 3), (2, 4)], "cannot join"),
        (Operation("Concatenate", (("dim", 1),)), [(2, 3), (3, 3)], "cannot join"),
        (Operation("Concatenate", (("dim", 2),)), [(2, 3)], "no dimension 2"),
        (Operation("Transpose", (("dim0", 0), ("dim1", 2))), [(2, 3)], "no dimension 2"),
        (Operation("Interleave", (("dim", 0),)), [(3, 2)], "cannot reshape"),
        (Operation("PermuteForRope", (("heads", 4),)), [(6, 2)], "cannot reshape"),
        (Operation("Split", (("dim", 0),)), [(5,)], "cannot split"),
        (Operation("Conv3dToLinear"), [(2, 3, 4)], "5-D or 2-D"),
        (Operation("MergeModulelist", (("dim", 0),)), [(2, 3), (2, 3), (3, 2)], "cannot join"),
        (
            Operation("LinearToConv3d", (("in_channels", 2), ("kernel_size", (2, 2, 2)))),
            [(3, 15)],
            "cannot reshape",
        ),
    ],
    ids=str,
)
def test_sources_that_do_not_fit_are_named_with_the_operation(operation, shapes, text):
    inputs = {"a": [leaf(i, shape) for i, shape in enumerate(shapes)]}
    context = Context(("a",), ("m",), ((2,), (2,)))
    with pytest.raises(LoweringError, match=text) as error:
        lower([operation], inputs, context)
    assert operation.name in str(error.value)


def test_ernie_split_of_too_few_is_named():
    operation = Operation("ErnieSplitAndDecoupleTextVisionExperts", (("concat_dim", 1), ("stack_dim", 0)))
    with pytest.raises(LoweringError, match=r"Ernie.*cannot be divided among 2"):
        lower([operation], {"a": [leaf(0, (2, 1, 3))]}, Context(("a",), ("m.*", "n.*"), ()))


def test_operations_without_a_config_are_not_guessed():
    core = pytest.importorskip("transformers.core_model_loading")
    try:
        operation = core.PermuteForRope(permute_layer_names=["q"])
    except TypeError:
        operation = core.PermuteForRope()
    rule = core.WeightConverter("a", "b", operations=[operation])
    with pytest.raises(NotLowerable, match="PermuteForRope"):
        RuleSet([rule]).operations(0)
