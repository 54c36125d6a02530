"""Tests of the one error that lists all problems of a plan."""

import pytest

from automodel_conv.errors import NameProblems
from automodel_conv.planning.problems import Problems


def error_of(problems, **options):
    with pytest.raises(NameProblems) as caught:
        problems.raise_unless_fit("the checkpoint", **options)
    return caught.value


def test_no_problems_raise_nothing():
    Problems().raise_unless_fit("the checkpoint")


def test_one_error_names_every_problem_and_carries_it():
    problems = Problems(
        missing=["m"],
        unexpected=["u"],
        mismatched=[("w", (2, 3), (3, 2))],
        duplicated=[("d", ("d1", "d2"))],
        incomplete=[("i", ("i.3", "i.4"))],
    )
    error = error_of(problems)
    text = str(error)
    for part in ("the checkpoint", "w: expected [3, 2], found [2, 3]", "d: d1, d2", "i: i.3, i.4", "strict=False"):
        assert part in text
    assert text.index("missing") < text.index("    m") < text.index("unexpected") < text.index("    u")
    assert (error.missing, error.unexpected, error.mismatched) == (("m",), ("u",), (("w", (2, 3), (3, 2)),))
    assert (error.duplicated, error.incomplete) == ((("d", ("d1", "d2")),), (("i", ("i.3", "i.4")),))


def test_without_strict_only_targets_that_cannot_be_filled_count():
    problems = Problems(missing=["m"], unexpected=["u"])
    problems.raise_unless_fit("the checkpoint", strict=False)
    problems.failed.append(("t", "an operation fails"))
    text = str(error_of(problems, strict=False))
    assert "t: an operation fails" in text
    assert "strict=False" not in text


def test_missing_parts_explain_the_shape_of_their_target():
    problems = Problems(mismatched=[("t", (3, 2), (4, 2))], incomplete=[("t", ("t.3",))], failed=[("t", "a reason")])
    text = str(error_of(problems))
    assert "t: t.3" in text
    assert "wrong shape" not in text
    assert "a reason" not in text


EXPERTS = [
    ("layers.0.mlp.experts.gate_up_proj", (16, 6, 4), (8, 6, 4)),
    ("layers.0.mlp.experts.down_proj", (16, 4, 3), (8, 4, 3)),
]


def test_advice_for_some_of_the_experts_is_to_wrap_them_as_shards():
    text = str(error_of(Problems(mismatched=EXPERTS)))
    assert "if each rank has tensors of its own experts, wrap them as DTensors with Shard(0)" in text
    assert "strict=False" not in text


@pytest.mark.parametrize(
    "other",
    [
        ("layers.0.mlp.gate.weight", (16, 4), (8, 4)),  # the whole model has fewer experts
        ("layers.1.mlp.experts.down_proj", (16, 4, 3), (8, 3, 4)),
        ("layers.1.mlp.experts.down_proj", (8, 4, 3), (16, 4, 3)),
        ("layers.1.mlp.experts.down_proj", (16, 4, 3), ()),
    ],
)
def test_other_wrong_shapes_are_not_taken_for_the_experts_of_a_rank(other):
    text = str(error_of(Problems(mismatched=[*EXPERTS, other])))
    assert "Shard(0)" not in text
    assert "strict=False" in text


def test_long_lists_of_parts_are_counted():
    parts = tuple(f"t.{number}" for number in range(9))
    assert "t: t.0, t.1, t.2, t.3, ... 5 more" in str(error_of(Problems(incomplete=[("t", parts)])))
    assert "more" not in str(error_of(Problems(incomplete=[("t", parts[:4])])))


def test_tensors_outside_of_the_index_are_shown_only_if_something_is_missing():
    unindexed = [("m", "b.safetensors")]
    assert "m in b.safetensors" in str(error_of(Problems(missing=["m"]), unindexed=unindexed))
    assert "b.safetensors" not in str(error_of(Problems(unexpected=["u"]), unindexed=unindexed))
    Problems().raise_unless_fit("the checkpoint", unindexed=unindexed)


def test_sources_that_no_rule_assigns_can_be_set_aside():
    problems = Problems(unexpected=["mtp.w", "u"], unclaimed=[4, 2], without_place=["mtp.w"])
    assert problems.accept_unclaimed() == {2, 4}
    assert problems.unexpected == ["u"]


def test_reasons_name_targets_that_a_source_provides():
    problems = Problems(
        missing=["m"],
        unexpected=["u"],
        mismatched=[("w", (2, 3), (3, 2))],
        duplicated=[("d", ("d1", "d2"))],
        incomplete=[("i", ("i.1", "i.2", "i.3", "i.4"))],
        failed=[("f", "a reason")],
    )
    assert problems.reasons() == [
        "parts are absent: i.1, i.2, i.3",
        "shape [2, 3] instead of [3, 2]",
        "several sources claim it: d1, d2",
        "the model has no u",
        "a reason",
    ]
