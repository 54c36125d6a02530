"""Tests of uses of rules that fit in every respect, and of the reasons that leave the others out."""

import pytest

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers.core_model_loading import Chunk, MergeModulelist, WeightConverter, WeightRenaming

from automodel_conv.planning.complete_uses import whole_conversions
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.rules import RuleSet

MERGE = WeightConverter("experts.*.w1.weight", "experts.gate_up_proj", operations=[MergeModulelist(dim=0)])
SPLIT = WeightConverter("qkv", ["q", "k", "v"], operations=[Chunk(dim=0)])


def uses(sources, targets, rules, **options):
    """Return the rows and target names of complete uses, and the targets that are left with their reasons."""
    table = SourceTable(list(sources), ["F32"] * len(sources), list(sources.values()))
    specs = {name: TargetSpec("F32", shape) for name, shape in targets.items()}
    complete, left = whole_conversions(table, RuleSet(rules), specs, **options)
    return [(use.rows, [target.name for target in use.targets]) for use in complete], left


def experts(layer, numbers, shape=(2, 3)):
    return {f"{layer}.experts.{e}.w1.weight": shape for e in numbers}


@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (1, 1), (0, 3)])
def test_use_that_fits_is_returned_with_its_rows(shape):
    targets = {"a.experts.gate_up_proj": (3, *shape)}
    assert uses(experts("a", range(3), shape), targets, [MERGE]) == ([((0, 1, 2), list(targets))], {})


def test_use_without_all_parts_is_left_and_the_others_are_not():
    sources = experts("a", (0, 2)) | experts("b", range(3))
    targets = {"a.experts.gate_up_proj": (3, 2, 3), "b.experts.gate_up_proj": (3, 2, 3)}
    complete, left = uses(sources, targets, [MERGE])
    assert complete == [((2, 3, 4), ["b.experts.gate_up_proj"])]
    assert left == {"a.experts.gate_up_proj": "parts are absent: a.experts.1.w1.weight"}


def test_use_of_another_shape_is_left():
    complete, left = uses(experts("a", range(3)), {"a.experts.gate_up_proj": (3, 3, 2)}, [MERGE])
    assert complete == []
    assert left == {"a.experts.gate_up_proj": "shape [3, 2, 3] instead of [3, 3, 2]"}


def test_use_with_a_target_that_the_model_lacks_is_left():
    complete, left = uses({"m.qkv": (6, 2)}, {"m.q": (2, 2), "m.k": (2, 2)}, [SPLIT])
    assert complete == []
    assert left == {"m.q": "the model has no m.v"}


def test_use_whose_target_has_a_source_of_its_own_is_left():
    sources = {"m.qkv": (6, 2), "m.v": (2, 2)}
    complete, left = uses(sources, {f"m.{name}": (2, 2) for name in "qkv"}, [SPLIT])
    assert complete == []
    assert left == {"m.q": "several sources claim one of its targets"}


def test_renamed_tensors_count_only_if_they_are_codes():
    sources, targets, rules = (
        {"old.a": (2,), "old.b": (2,)},
        {"new.a": (2,), "new.b": (2,)},
        [WeightRenaming("old", "new")],
    )
    assert uses(sources, targets, rules) == ([], {})
    assert uses(sources, targets, rules, coded={1}) == ([((1,), ["new.b"])], {})
