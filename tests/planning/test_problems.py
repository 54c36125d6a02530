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
    for part in ("the checkpoint", "w: expected [3, 2], found [2, 3]", "d: d1, d2", "i: i.3, i.4"):
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


def test_strict_is_advised_only_if_it_would_load_what_is_of_use():
    assert "strict=False loads what fits" in str(error_of(Problems(missing=["m"], unexpected=["u"])))
    for fatal in (
        Problems(incomplete=[("t", ("t.3",))]),
        Problems(incomplete=[("t", ("t.3",))], failed=[("t", "an operation fails")]),
        Problems(missing=["m"], failed=[("t", "an operation fails")]),
        Problems(missing=["m.experts.down_proj"], lacks_all_experts=True),
    ):
        assert "strict" not in str(error_of(fatal))


def test_decoding_is_advised_if_the_load_keeps_codes():
    text = str(error_of(Problems(missing=["m"], unexpected=["u"], keeps_codes=True)))
    assert "; dequantize=True decodes codes to values; rules=[] keeps codes and scales as stored" in text
    assert "strict" not in text


def test_absent_parts_are_to_be_copied_again_only_if_no_file_has_them():
    problems, advice = Problems(incomplete=[("t", ("t.3",))]), "copy or download the files again: no file has these"
    assert advice in str(error_of(problems, in_files={"t.2"}))
    assert advice not in str(error_of(problems, in_files={"t.3"}))  # the caller leaves it out
    assert advice not in str(error_of(problems))
    in_a_file = str(error_of(problems, in_files={"t.2"}, unindexed=[("t.3", "b.safetensors")]))
    assert advice not in in_a_file
    assert "download the index and the files again" in in_a_file
    assert advice not in str(error_of(Problems(missing=["m"]), in_files={"t.2"}))


def of_numbers(experts, router):
    """Return the problems of a model with 32 experts in each of two layers; the checkpoint has other numbers."""
    paths = [f"layers.{layer}.experts.down_proj" for layer in range(2)]
    problems = Problems(mismatched=[(path, (experts, 4, 3), (32, 4, 3)) for path in paths])
    problems.incomplete = [(path, (f"{path}.31",)) for path in paths if experts < 32]
    problems.mismatched += [(f"layers.{layer}.gate.weight", (router, 4), (32, 4)) for layer in range(2) if router != 32]
    return problems


def test_different_numbers_of_experts_are_stated_in_one_line():
    title, line, *_ = str(error_of(of_numbers(16, 16), in_files=(), model_is_built=True)).split("\n")
    assert title == "checkpoint and model do not fit together: the checkpoint"
    assert line == "  config.json states 32 experts, the files have 16"
    assert "  the model has 32 experts, the files have 64\n" in str(error_of(of_numbers(64, 64), in_files=()))
    assert "  the model has 32 experts, the tensors have 16\n" in str(error_of(of_numbers(16, 16)))
    assert "copy or download" not in str(error_of(of_numbers(16, 16), in_files=()))


def test_experts_that_the_router_has_are_missing_from_the_files():
    for problems in (of_numbers(31, 32), of_numbers(16, 24)):
        text = str(error_of(problems, in_files=()))
        assert "experts," not in text
        assert "copy or download the files again" in text


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
