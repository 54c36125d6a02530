"""Tests of errors as JSON shows them."""

import pytest

from automodel_conv.cli.results.failures import failure_of, interruption, usage_failure
from automodel_conv.cli.results.loads import Claims, Mismatch
from automodel_conv.errors import CheckpointError, NameProblems, ReadError, in_context, listing, message


def test_parts_are_those_of_the_message():
    error = CheckpointError(
        message("it broke", where="a file", expected=3, found="many\n  where: not a part", do=["a", "b"])
    )
    failure = failure_of(error)
    assert (failure.type, failure.what, failure.where, failure.expected) == (
        "CheckpointError",
        "it broke",
        "a file",
        "3",
    )
    assert failure.found == "many\n  where: not a part"
    assert (failure.do, failure.notes, failure.names) == (("a", "b"), (), None)
    assert failure.text == str(error)
    assert failure.help == "https://automodel-conv.github.io/automodel_conv/errors/#checkpointerror"


def test_text_without_parts_is_what_went_wrong():
    failure = failure_of(ReadError("it broke"))
    assert (failure.what, failure.where, failure.expected, failure.found, failure.do) == (
        "it broke",
        None,
        None,
        None,
        (),
    )


def test_advice_is_spelled_for_the_caller():
    error = ReadError(message("it broke", where="here", do=["{strict=False} helps", "wait"]))
    error.say({"strict=False": "--no-strict"}.get)
    assert failure_of(error).do == ("--no-strict helps", "wait")
    assert failure_of(error).where == "here"
    error.say(lambda argument: None)
    assert failure_of(error).do == ("wait",)


def test_added_lines_are_notes_and_the_other_parts_stay():
    error = ReadError(message("it broke", where="here", do="wait"))
    error.add("  filled:   1 of 2 targets")
    error.add("  also:     more")
    failure = failure_of(error)
    assert failure.notes == ("filled:   1 of 2 targets", "also:     more")
    assert (failure.what, failure.where, failure.do) == ("it broke", "here", ("wait",))


def test_context_comes_before_the_cause_and_parts_are_those_of_the_cause():
    cause = ReadError(message("no such file", where="a file", do="look"))
    failure = failure_of(ReadError(in_context("tensors were not read\n  tensor:   b", cause)))
    assert failure.what == "tensors were not read\n  tensor:   b\nno such file"
    assert (failure.where, failure.do) == ("a file", ("look",))


def test_lines_are_not_cut_and_characters_are_not_escaped():
    failure = failure_of(ReadError(message("x" * 5000, where="\x1b[31m\udce9")))
    assert failure.what == "x" * 5000
    assert failure.where == "\x1b[31m\udce9"
    assert "x" * 2001 not in failure.text


def test_listing_is_not_indented():
    assert failure_of(ReadError(message("it broke", found="\n" + listing("ab")))).found == "a\nb"


def test_names_that_do_not_fit_are_lists():
    error = NameProblems(
        "they do not fit",
        missing=["a"],
        unexpected=["b"],
        mismatched=[("c", (1, 2), (2, 1))],
        duplicated=[("d", ("e", "f"))],
        incomplete=[("g", ("h",))],
    )
    names = failure_of(error).names
    assert (names.missing, names.unexpected) == (("a",), ("b",))
    assert names.mismatched == (Mismatch("c", (1, 2), (2, 1)),)
    assert (names.duplicated, names.incomplete) == ((Claims("d", ("e", "f")),), (Claims("g", ("h",)),))


@pytest.mark.parametrize("base", [ReadError, CheckpointError])
def test_type_is_the_class_that_is_documented(base):
    assert failure_of(type("_Inner", (base,), {"__module__": "elsewhere"})("it broke")).type == base.__name__


def test_usage_and_interruption_have_types_of_their_own():
    usage = usage_failure(message("no such option", do="write --layout"), "the text")
    assert (usage.type, usage.what, usage.do, usage.text) == (
        "UsageError",
        "no such option",
        ("write --layout",),
        "the text",
    )
    assert (interruption().type, interruption().what) == ("Interrupted", "interrupted")
