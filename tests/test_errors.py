"""Error texts: their parts and order, advice that fits the caller, and nothing that a terminal would act on."""

import copy
import pickle
from pathlib import Path

import pytest

from automodel_conv import errors
from automodel_conv.distributed.collectives import all_or_raise
from automodel_conv.errors import (
    DOCUMENTATION,
    ConversionError,
    Message,
    NameProblems,
    RankError,
    ReadError,
    UnknownTarget,
    in_context,
    kind_of,
    listing,
    message,
    rate_text,
    size_text,
)

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]


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


def test_listing_begins_below_its_label():
    text = message("it failed", found="\n" + listing("ab"), expected=1)
    assert text.splitlines() == ["it failed", "  expected: 1", "  found:", "    a", "    b"]


def test_several_pieces_of_advice_are_one_line():
    assert message("it failed", do=["a", "b"]).splitlines() == ["it failed", "  do:       a; b"]


def test_advice_about_an_argument_that_the_caller_lacks_is_left_out():
    error = ConversionError(message("it failed", do=["{strict=False} loads the rest", "check the file"]))
    assert "do:       strict=False loads the rest; check the file" in str(error)
    error.say({"strict=False": "--no-strict"}.get)
    assert error.args[0] == "it failed\n  do:       --no-strict loads the rest; check the file"
    error.say(lambda argument: None)
    assert error.args[0] == "it failed\n  do:       check the file"


def test_first_wording_that_applies_is_used():
    error = ConversionError(Message("it failed", [("use {a}", "use {b}", "give up")]))
    assert "use a" in str(error)
    error.say({"b": "B"}.get)
    assert error.args[0] == "it failed\n  do:       use B"
    assert error.reason() == "it failed\n  do:       give up"


def test_lines_are_added_before_the_advice():
    error = ReadError(message("it failed", do="try again"))
    error.add("  filled:   3 of 4")
    assert error.args[0].splitlines() == ["it failed", "  filled:   3 of 4", "  do:       try again"]


def test_reason_has_only_the_advice_that_names_no_argument():
    error = ConversionError(message("it failed", do=["{threads=1} helps", "buy a disk"]))
    assert error.reason() == "it failed\n  do:       buy a disk"
    assert "threads=1 helps; buy a disk" in str(error)


@pytest.mark.parametrize("character", ["\x1b", "\r", "\0", "\x9b", "\u202e", "\u2028", "\ud800", "\x7f"], ids=ascii)
def test_characters_that_a_terminal_acts_on_are_escaped(character):
    text = ConversionError(f"a{character}b").args[0]
    assert text == f"a{ascii(character)[1:-1]}b"
    assert text.isprintable()
    text.encode()


def test_tabs_lines_and_other_scripts_stay_and_long_lines_are_cut():
    assert ConversionError("a\tb\nä漢").args[0] == "a\tb\nä漢"
    first, second, _ = str(ConversionError(f"{'x' * 2000}\n{'y' * 2001}")).split("\n")
    assert first == "x" * 2000
    assert second == "y" * 2000 + "..."


@pytest.mark.parametrize(
    ("items", "limit", "lines"),
    [
        ([], 2, [""]),
        (["a"], 2, ["    a"]),
        (["a", 3], 2, ["    a", "    3"]),
        ("abcde", 2, ["    a", "    b", "    ... and 3 more"]),
        (["a\n  found:    b\n    c"], 2, ["    a", "      found:    b", "        c"]),
    ],
    ids=["none", "one", "as many as are shown", "more", "of several lines"],
)
def test_listing_shows_so_many_and_counts_the_rest(items, limit, lines):
    assert listing(iter(items), limit).split("\n") == lines


def test_names_that_differ_only_in_numbers_do_not_hide_others():
    names = [f"layers.{n}.experts.{e}.weight" for n in range(40) for e in range(50)]
    lines = listing([*names, "head.weight", "layers.0.norm.weight"]).split("\n")
    assert lines == [
        *(f"    {name}" for name in names[:3]),
        "    ... and 1997 more like these",
        "    head.weight",
        "    layers.0.norm.weight",
    ]
    assert listing(names, 2).split("\n") == [*(f"    {name}" for name in names[:2]), "    ... and 1998 more"]
    assert listing(names[:20]).split("\n") == [f"    {name}" for name in names[:20]]


def test_listing_of_many_kinds_counts_all_that_it_does_not_show():
    names = [f"{kind * 3}.{n}" for kind in "abcdefghij" for n in range(10)]
    *shown, last = listing(names).split("\n")
    assert len(shown) == 20
    assert shown[3] == "    ... and 7 more like these"
    assert last == "    ... and 50 more"  # twenty lines tell of five kinds


def test_every_error_is_a_value_error_of_one_base_class():
    assert len(CLASSES) > 10
    assert all(issubclass(c, ConversionError) and issubclass(c, ValueError) for c in CLASSES)


def test_all_problems_of_names_are_kept_as_tuples():
    error = NameProblems("text", missing=iter("ab"), mismatched=[("c", (1,), (2,))])
    assert (error.missing, error.unexpected, error.mismatched) == (("a", "b"), (), (("c", (1,), (2,)),))


def test_unknown_target_is_a_key_error_whose_text_is_not_quoted():
    error = UnknownTarget("no target 'a'\n  found: b")
    assert isinstance(error, KeyError)
    assert str(error).startswith("no target 'a'\n  found: b\n")


def test_error_keeps_its_text_when_it_is_sent_to_another_process():
    error = pickle.loads(pickle.dumps(ConversionError(message("it failed", where="a", do="try again"))))
    assert error.args[0] == "it failed\n  where:    a\n  do:       try again"


def test_kind_of_an_argument_is_a_phrase():
    assert kind_of({}) == "a dict"
    assert kind_of(dict) == "the class dict"


def help_line(name: str) -> str:
    return f"  help:     https://automodel-conv.github.io/automodel_conv/errors/#{name}"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_printed_error_ends_with_its_entry_in_the_documentation(kind):
    error = kind(message("it failed", do="try again"))
    assert str(error).splitlines() == ["it failed", "  do:       try again", help_line(kind.__name__.lower())]
    assert error.args == ("it failed\n  do:       try again",)


def test_error_in_context_keeps_its_advice_last():
    cause = ReadError(message("it failed", found="that", do=["{strict=False} is it", "look"]))
    error = ReadError(in_context("a tensor could not be read\n  tensor:   a", cause))
    error.add("  filled:   3 of 4")
    error.say(lambda argument: None)
    assert error.args[0].splitlines() == [
        "a tensor could not be read",
        "  tensor:   a",
        "it failed",
        "  found:    that",
        "  filled:   3 of 4",
        "  do:       look",
    ]


def test_address_of_the_documentation_is_that_of_the_project():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Documentation"] == DOCUMENTATION


def test_class_defined_elsewhere_has_the_entry_of_its_base():
    class Late(ReadError):
        pass

    class Later(Late, KeyError):
        pass

    for kind in (Late, Later):
        assert str(kind("late")).splitlines() == ["late", help_line("readerror")]


@pytest.mark.parametrize(
    "again",
    [
        lambda error: pickle.loads(pickle.dumps(error)),
        copy.copy,
        copy.deepcopy,
        lambda error: type(error)(str(error)),
        lambda error: type(error)(*error.args),
    ],
    ids=["pickled", "copied", "copied deeply", "of its printed text", "of its arguments"],
)
def test_entry_is_printed_once_whatever_becomes_of_the_error(again):
    error = again(again(ReadError(message("it failed", do=["{strict=False} is it", "look"]))))
    error.add("  filled:   3 of 4")
    error.say(lambda argument: None)
    lines = str(again(error)).splitlines()
    assert lines[0] == "it failed"
    assert [line for line in lines if "help:" in line] == lines[-1:] == [help_line("readerror")]


def test_quoted_errors_have_no_entry():
    quoted = [str(ReadError("one\n  do:       look")), f"rank 1: {ReadError('two')}", str(ReadError())]
    error = RankError(message("it failed", found="\n" + listing(quoted), do="look"))
    error.add(f"  also:     {ReadError('three')}")
    lines = str(error).splitlines()
    assert [line for line in lines if "help:" in line] == lines[-1:] == [help_line("rankerror")]
    assert all(word in str(error) for word in ("one", "two", "three"))
    assert "help:" not in error.reason() + error.args[0] + repr(error)


def test_other_ranks_are_sent_no_entry(monkeypatch):
    sent = []
    monkeypatch.setattr("automodel_conv.distributed.collectives._exchange", lambda groups, text: sent.append(text))
    with pytest.raises(ReadError), all_or_raise([], "loading"):
        raise ReadError("it failed")
    assert sent == ["rank 0: ReadError: it failed"]


@pytest.mark.parametrize(
    ("nbytes", "size", "rate"),
    [
        (0, "0 bytes", "0 bytes/s"),
        (1, "1 byte", "1 byte/s"),
        (999, "999 bytes", "999 bytes/s"),
        (1000, "1.0 kB", "1.00 kB/s"),
        (999_999, "1,000.0 kB", "1,000.00 kB/s"),
        (10**21, "1,000.0 EB", "1,000.00 EB/s"),
        (786_432, "786.4 kB", "786.43 kB/s"),
        (52_300_000, "52.3 MB", "52.30 MB/s"),
        (1_500_000_000, "1.5 GB", "1.50 GB/s"),
    ],
)
def test_sizes_and_speeds_have_the_unit_that_fits(nbytes, size, rate):
    assert size_text(nbytes) == size
    assert rate_text(nbytes / 1e9) == rate
