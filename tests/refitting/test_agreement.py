"""Tests of what ranks tell each other before a refit, with threads as ranks."""

from __future__ import annotations

import pytest
import torch

from automodel_conv.distributed import collectives
from automodel_conv.errors import CoverageError, NameProblems, RankError, UnsupportedError
from automodel_conv.planning.regions import box, whole
from automodel_conv.refitting.agreement import Agreed, Own, Roles, agree, publish
from automodel_conv.refitting.held import Held, trained
from tests.distributed.meshes import Group, Ranks
from tests.refitting.support import module, zeros


@pytest.fixture
def ranks(monkeypatch):
    made = Ranks()
    monkeypatch.setattr(collectives, "dist", made)
    return made


def owns(**changes):
    """Return what two ranks of a trainer and two of an engine state, with changes of some of them by number."""
    plain = [Own(rank, rank < 2, rank >= 2, 1000, "cpu", 0) for rank in range(4)]
    for field, values in changes.items():
        plain = [own._replace(**{field: values.get(own.rank, getattr(own, field))}) for own in plain]
    return plain


def agreed(ranks, stated):
    group = Group(range(len(stated)))
    return ranks.run(len(stated), lambda rank: agree([group], stated[rank]))


def test_all_ranks_know_the_roles_and_the_number_of_experts(ranks):
    stated = owns(num_experts={0: 8, 3: 16})
    assert agreed(ranks, stated) == [Agreed(Roles((0, 1), (2, 3)), 16)] * 4


def test_rank_may_do_both(ranks):
    roles = agreed(ranks, owns(receives={0: True}))[3].roles
    assert roles == Roles((0, 1), (0, 2, 3))
    assert roles.has_both
    assert not Roles((0, 1), (2, 3)).has_both


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bucket_bytes": {2: 10}}, r"(?s)different buckets.*rank 1: 1000\s+rank 2: 10.*pass the same bucket_bytes="),
        ({"device": {1: "cuda"}}, r"(?s)different kinds of devices.*rank 0: cpu\s+rank 1: cuda"),
        ({"sends": {0: False, 1: False}}, "no rank of the refit has sends=True"),
        ({"receives": {2: False, 3: False}}, "no rank of the refit has sends=False"),
    ],
    ids=["bucket", "device", "no sender", "no receiver"],
)
def test_all_ranks_raise_the_same_error(ranks, changes, text):
    errors = agreed(ranks, owns(**changes))
    assert {type(error) for error in errors} == {UnsupportedError}
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(UnsupportedError, match=text):
        raise errors[0]


def of_rank(shapes, regions=(), **options):
    """Return what a rank holds, with regions of whole tensors in place of its own."""
    made = trained(zeros(shapes), [], None, options.get("experts"), options.get("num_experts", 0))
    held = Held(made.held.tensors, {**made.held.regions, **dict(regions)})
    if not regions:
        return made
    wholes = trained(zeros({name: region.shape for name, region in held.regions.items()}), [], None, None, 0)
    return wholes.__class__(held, wholes.plan, wholes.layout)


def publish_all(ranks, owned):
    group = Group(range(len(owned)))
    return ranks.run(len(owned), lambda rank: publish([group], rank, owned[rank], 1 << 20))


def test_equal_parts_are_one_part_with_several_holders(ranks):
    halves = [of_rank({"a": (2, 3), "b": (4,)}, {"a": box((4, 3), (start, 0), (2, 3))}) for start in (0, 2, 0, 2)]
    found = publish_all(ranks, [*halves, None])
    for each in found:
        assert each.parts == found[0].parts
        assert each.plan == found[0].plan
    held = {(each.part.source, each.part.region): each.holders for each in found[0].parts}
    assert held == {
        (0, box((4, 3), (0, 0), (2, 3))): (0, 2),
        (0, box((4, 3), (2, 0), (2, 3))): (1, 3),
        (1, whole((4,))): (0, 1, 2, 3),
    }


def test_stages_of_a_pipeline_are_united(ranks):
    found = publish_all(ranks, [of_rank({"a": (2,), "norm": (3,)}), of_rank({"norm": (3,), "b": (4,)}), None])
    plan = found[2].plan
    assert [target.name for target in plan.targets] == ["a", "norm", "b"]
    assert [plan.sources.names[target.sources[0]] for target in plan.targets] == ["a", "norm", "b"]
    assert [each.holders for each in found[2].parts] == [(0,), (0, 1), (1,)]


def test_empty_parts_have_no_holder(ranks):
    owned = [
        of_rank({"a": (3, 2)}, {"a": box((3, 2), (0, 0), (3, 2))}),
        of_rank({"a": (0, 2)}, {"a": box((3, 2), (3, 0), (0, 2))}),
    ]
    found = publish_all(ranks, owned)[0]
    assert [each.holders for each in found.parts] == [(0,)]
    assert publish_all(ranks, [of_rank({"a": (0, 2)})])[0].parts == ()


@pytest.mark.parametrize(
    ("regions", "numel"),
    [
        ([((0, 0), (2, 3))], 6),
        ([((0, 0), (2, 3)), ((0, 0), (4, 3))], 18),
        ([((0, 0), (2, 3)), ((1, 0), (3, 3))], 15),
        ([((0, 0), (4, 2)), ((0, 0), (2, 3))], 14),
    ],
    ids=["missing", "whole and half", "overlapping", "other ways"],
)
def test_parts_that_do_not_divide_a_tensor_are_refused(ranks, regions, numel):
    owned = [of_rank({"a": lengths}, {"a": box((4, 3), start, lengths)}) for start, lengths in regions]
    for error in publish_all(ranks, [*owned, None]):
        assert isinstance(error, CoverageError), error
        assert "do not hold all of a, or divide it in different ways" in str(error)
        assert f"{numel} elements in different parts" in str(error)


@pytest.mark.parametrize("other", [{"a": (2, 4)}, {"a": (6,)}], ids=str)
def test_other_shapes_are_named(ranks, other):
    for error in publish_all(ranks, [of_rank({"a": (2, 3)}), of_rank(other), None]):
        assert isinstance(error, NameProblems)
        assert "ranks of the trainer hold different tensors a" in str(error)
        assert "on rank 1" in str(error)


def test_other_dtypes_are_named(ranks):
    other = trained(zeros({"a": (2, 3)}, torch.float64), [], None, None, 0)
    for error in publish_all(ranks, [of_rank({"a": (2, 3)}), other]):
        assert "F64 [2, 3] on rank 1" in str(error)


def test_plain_experts_with_other_values_are_refused(ranks):
    owned = [
        trained(module({"experts.down_proj": torch.full((2, 2, 2), float(rank))}), [], None, None, 0)
        for rank in range(2)
    ]
    for error in publish_all(ranks, owned):
        assert isinstance(error, RankError)
        assert "ranks hold different values of experts.down_proj, as if each had experts of its own" in str(error)
        assert "rank 0 and rank 1 differ" in str(error)
