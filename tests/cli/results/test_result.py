"""Tests of the base of results."""

from dataclasses import dataclass

import pytest

from automodel_conv.cli.results.result import Result, filled


class Counted(Result, frozen=True):
    """A result."""

    files: int
    double: int
    name: str


@dataclass(frozen=True)
class Report:
    """A report with a field, a property, and a field that the result does not have."""

    files: int
    other: int = 0

    @property
    def double(self):
        return 2 * self.files


def test_fields_are_filled_from_attributes_and_properties_of_the_same_name():
    assert filled(Counted, Report(3), name="a") == Counted(files=3, double=6, name="a")


def test_given_fields_come_before_those_of_the_report():
    assert filled(Counted, Report(3), name="a", double=1).double == 1


def test_field_that_nothing_has_is_an_error():
    with pytest.raises(AttributeError, match="name"):
        filled(Counted, Report(3))


def test_field_that_the_result_lacks_is_an_error():
    with pytest.raises(TypeError, match="size"):
        filled(Counted, Report(3), name="a", size=1)


def test_result_shows_no_problem_unless_it_says_so():
    assert Counted(1, 2, "a").status == 0
