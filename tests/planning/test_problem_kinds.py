"""Tests of problems of one kind, which are reported once."""

import pytest

from automodel_conv.planning.problem_kinds import ProblemKinds


def scales_missing(count):
    problems = ProblemKinds()
    for n in range(count):
        problems.add("{} has no scale: no tensor is named {}", f"a{n}", f"a{n}_scale")
    assert len(problems) == count
    return problems


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_problems_of_one_kind_are_reported_one_by_one(count):
    texts = [f"a{n} has no scale: no tensor is named a{n}_scale" for n in range(count)]
    assert scales_missing(count).texts() == texts


@pytest.mark.parametrize(("count", "more"), [(4, 1), (33_024, 33_021)])
def test_many_problems_of_one_kind_are_one_text_with_three_names_and_a_count(count, more):
    text = f"a0 has no scale: no tensor is named a0_scale; the same for a1, a2 and {more} more"
    assert scales_missing(count).texts() == [text]


def test_as_many_as_wanted_are_reported_one_by_one():
    assert len(scales_missing(20).texts(20)) == 20
    [text] = scales_missing(21).texts(20)
    assert text.endswith("; the same for a1, a2 and 18 more")


def test_kinds_are_in_the_order_of_their_first_problems():
    problems = ProblemKinds()
    for name in ("b", "a", "c", "d"):
        problems.add("{} is F8_E4M3", name)
        problems.add(f"{{}} of {{}} [{len(name)}, {ord(name)}]", "{}", name)
    problems.add("nothing has a name")
    texts = problems.texts()
    assert texts[0] == "b is F8_E4M3; the same for a, c and 1 more"
    assert texts[1:] == [
        "{} of b [1, 98]",
        "{} of a [1, 97]",
        "{} of c [1, 99]",
        "{} of d [1, 100]",
        "nothing has a name",
    ]
    assert len(problems) == 9


def test_without_problems_there_is_no_text():
    assert not ProblemKinds()
    assert ProblemKinds().texts() == []
