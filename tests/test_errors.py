"""Error texts: their parts and order, advice that fits the caller, and nothing that a terminal would act on."""

import pickle

import pytest

from automodel_conv import errors
from automodel_conv.errors import (
    ConversionError,
    Message,
    NameProblems,
    ReadError,
    UnknownTarget,
    kind_of,
    listing,
    message,
)


def test_text_answers_what_where_expected_found_and_do_in_this_order():
    text = message("it failed", do="try again", found=0, expected="1", where="a file")
    assert text.splitlines() == [
        "it failed",
        "  where:    a file",
        "  expected: 1",
        "  found:    0",
        "  do:       try again",
    ]
    assert message("it failed") == "it failed"


def test_several_pieces_of_advice_are_one_line():
    assert message("it failed", do=["a", "b"]).splitlines() == ["it failed", "  do:       a; b"]


def test_advice_about_an_argument_that_the_caller_lacks_is_left_out():
    error = ConversionError(message("it failed", do=["{strict=False} loads the rest", "check the file"]))
    assert "do:       strict=False loads the rest; check the file" in str(error)
    error.say({"strict=False": "--no-strict"}.get)
    assert str(error) == "it failed\n  do:       --no-strict loads the rest; check the file"
    error.say(lambda argument: None)
    assert str(error) == "it failed\n  do:       check the file"


def test_first_wording_that_applies_is_used():
    error = ConversionError(Message("it failed", [("use {a}", "use {b}", "give up")]))
    assert "use a" in str(error)
    error.say({"b": "B"}.get)
    assert str(error) == "it failed\n  do:       use B"
    assert error.reason() == "it failed\n  do:       give up"


def test_lines_are_added_before_the_advice():
    error = ReadError(message("it failed", do="try again"))
    error.add("  filled:   3 of 4")
    assert str(error).splitlines() == ["it failed", "  filled:   3 of 4", "  do:       try again"]


def test_reason_has_only_the_advice_that_names_no_argument():
    error = ConversionError(message("it failed", do=["{threads=1} helps", "buy a disk"]))
    assert error.reason() == "it failed\n  do:       buy a disk"
    assert "threads=1 helps; buy a disk" in str(error)


@pytest.mark.parametrize("character", ["\x1b", "\r", "\0", "\x9b", "\u202e", "\u2028", "\ud800", "\x7f"], ids=ascii)
def test_characters_that_a_terminal_acts_on_are_escaped(character):
    text = str(ConversionError(f"a{character}b"))
    assert text == f"a{ascii(character)[1:-1]}b"
    assert text.isprintable()
    text.encode()


def test_tabs_lines_and_other_scripts_stay_and_long_lines_are_cut():
    assert str(ConversionError("a\tb\nä漢")) == "a\tb\nä漢"
    first, second = str(ConversionError(f"{'x' * 2000}\n{'y' * 2001}")).split("\n")
    assert first == "x" * 2000
    assert second == "y" * 2000 + "..."


@pytest.mark.parametrize(
    ("items", "limit", "lines"),
    [
        ([], 2, [""]),
        (["a"], 2, ["    a"]),
        (["a", 3], 2, ["    a", "    3"]),
        ("abcde", 2, ["    a", "    b", "    ... and 3 more"]),
    ],
    ids=["none", "one", "as many as are shown", "more"],
)
def test_listing_shows_so_many_and_counts_the_rest(items, limit, lines):
    assert listing(iter(items), limit).split("\n") == lines


def test_every_error_is_a_value_error_of_one_base_class():
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert len(classes) > 10
    assert all(issubclass(c, ConversionError) and issubclass(c, ValueError) for c in classes)


def test_all_problems_of_names_are_kept_as_tuples():
    error = NameProblems("text", missing=iter("ab"), mismatched=[("c", (1,), (2,))])
    assert (error.missing, error.unexpected, error.mismatched) == (("a", "b"), (), (("c", (1,), (2,)),))


def test_unknown_target_is_a_key_error_whose_text_is_not_quoted():
    error = UnknownTarget("no target 'a'\n  found: b")
    assert isinstance(error, KeyError)
    assert str(error) == "no target 'a'\n  found: b"


def test_error_keeps_its_text_when_it_is_sent_to_another_process():
    error = pickle.loads(pickle.dumps(ConversionError(message("it failed", where="a", do="try again"))))
    assert str(error) == "it failed\n  where:    a\n  do:       try again"


def test_kind_of_an_argument_is_a_phrase():
    assert kind_of({}) == "a dict"
    assert kind_of(dict) == "the class dict"
