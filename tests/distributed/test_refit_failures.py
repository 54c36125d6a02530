"""Tests of refits that fail: all ranks end with one error in time, and engines know which parameters are new."""

from __future__ import annotations

import signal
from typing import NamedTuple

import pytest

from tests.distributed.refit_failures import NAMES, SCENARIOS, TIMEOUT_S
from tests.distributed.starting import run_suite

KILLED = "killed"


class Ends(NamedTuple):
    """The errors of the ranks in order ("" without one), and what the texts of all of them have."""

    errors: tuple[str, ...]
    texts: tuple[str, ...] = ()


def of(rank: int, error: str, *texts: str) -> Ends:
    """Return the end of a scenario in which one rank raises an error, and the others learn of it."""
    return Ends(tuple(error if number == rank else "RankError" for number in range(4)), texts)


def of_engine(error: str, *texts: str) -> Ends:
    return Ends(("RankError", "RankError", error, error), texts)


def of_all(error: str, *texts: str) -> Ends:
    return Ends((error,) * 4, texts)


CHANGED = "rank 2: UnsupportedError: the tensors of a module have changed since the refit was planned"
AT_ONCE = {
    "changed shape": of_all(
        "RefitError", CHANGED, "t3: torch.float32 [8, 16] on cpu instead of torch.float32 [16, 8] on cpu"
    ),
    "changed dtype": of_all("RefitError", CHANGED, "t3: torch.float64 [16, 8] on cpu instead of torch.float32"),
    "lost parameter": of_all("RefitError", CHANGED, "t3"),
    "engine cannot copy": of_all("RefitError", "rank 2: MemoryError: no memory for a copy"),
    "trainer cannot copy": of_all("RefitError", "rank 1: MemoryError: no memory for a copy"),
    "fails twice": of_all("RefitError", "rank 2: MemoryError: no memory for a copy"),
    "only the trainer has it": of_engine("NameProblems", "the model has no parameter for (1)", "extra"),
    "only the engine has it": of_engine("NameProblems", "nothing in the checkpoint provides (1)", "extra"),
    "only one rank of the engine has it": of(2, "NameProblems", "nothing in the checkpoint provides (1)", "extra"),
    "other sizes": of_engine("NameProblems", "wrong shape (6)", "t0: expected [16, 9], found [16, 8]"),
    "other layers": of_engine("NameProblems", "provides (2)", "t4", "t5", "no parameter for (2)", "t0", "t1"),
    "trainers with other sizes": of_all("NameProblems", "different tensors t0", "F32 [4, 8]", "F32 [4, 9] on rank 1"),
    "trainers with other dtypes": of_all("NameProblems", "different tensors t0", "F32 [4, 8]", "F64 [4, 8] on rank 1"),
    "lacks a rank of the trainer": Ends(
        ("CoverageError", "-", "CoverageError", "CoverageError"),
        ("do not hold all of t0", "128 elements, shape [16, 8]", "64 elements"),
    ),
    "outside of the group": Ends(("", "UnsupportedError", "", ""), ("this rank is not in group=",)),
    "other buckets": of_all("UnsupportedError", "different buckets", "rank 1: 400", "rank 2: 800"),
    "tiny buckets": of_all("UnsupportedError", "bucket_bytes= is too small", "40 bytes for 2 ranks that send and 2"),
    "no buckets": of_all("UnsupportedError", "bucket_bytes= is too small", "0 bytes"),
    "nobody sends": of_all("UnsupportedError", "no rank of the refit has sends=True"),
    "nobody receives": of_all("UnsupportedError", "no rank of the refit has sends=False"),
    "engine of a rank that receives": of(2, "UnsupportedError", "engine= is for ranks that send"),
    "loader of the trainer": of(1, "UnsupportedError", "loader= is for ranks of the engine"),
    "loader with rules": of(2, "UnsupportedError", "loader= takes the names of the checkpoint itself"),
    "loader that fails": of(2, "KeyError", "no such layer"),
    "loader that computes": of(2, "UnsupportedError", "copies do not fill all parameters", "t3: aten.mul.Tensor"),
    "loader that skips": of(2, "NameProblems", "the loader writes nothing to t3"),
    "on meta": of(2, "UnsupportedError", "t3 has no data", "meta device"),
    "trainer on meta": of(1, "UnsupportedError", "t3 has no data", "meta device"),
    "partial sums": Ends(("UnsupportedError", "UnsupportedError", "RankError", "RankError"), ("partial sums",)),
    "experts twice": of_all("CoverageError", "do not hold all of experts.down_proj, or divide it in different ways"),
    "experts of another number": of(0, "CoverageError", "experts.down_proj does not hold the experts that experts="),
    "experts of no number": of_all("RankError", "ranks hold different values of experts.down_proj"),
    "overlapping memory": of(2, "ConversionError", "elements of the buffer of t3 share memory"),
    "tied in the engine only": of_engine("NameProblems", "t2 and t3 are one tensor of the engine"),
}
ENDS_OF_ALL = of_all("RefitError", "the refit was not finished")
AFTER_A_WHILE = {
    "trainer killed in a call": ENDS_OF_ALL._replace(errors=("RefitError", KILLED, "RefitError", "RefitError")),
    "late beyond the time": ENDS_OF_ALL,
}
MORE_AFTER_A_WHILE = {
    "cannot send": ENDS_OF_ALL,
    "late within the time": of_all(""),
    "killed in the second call": AFTER_A_WHILE["trainer killed in a call"],
    "trainer killed before a call": AFTER_A_WHILE["trainer killed in a call"],
    "engine killed before a call": ENDS_OF_ALL._replace(errors=("RefitError", "RefitError", KILLED, "RefitError")),
    "engine killed in a call": ENDS_OF_ALL._replace(errors=("RefitError", "RefitError", KILLED, "RefitError")),
    "trainer killed while it plans": Ends(
        ("RankError", KILLED, "RankError", "RankError"), ("was not finished by all",)
    ),
}


def wrong(expected, tmp_path):
    """Run scenarios, and return those that end in another way, as text."""
    errors = []
    for scenario, ended in run_suite("refit_failures", 4, tmp_path, list(expected)).items():
        try:
            for number, end in enumerate(ended):
                check(scenario, expected[scenario], number, end)
        except AssertionError as error:
            shown = "\n".join(f"rank {number}: {end}" for number, end in enumerate(ended))
            errors.append(f"{scenario}: {error!r}\n{shown}")
    return "\n\n".join(errors)


def check(scenario, expected, number, end):
    error = expected.errors[number]
    if error == KILLED:
        assert end.code == -signal.SIGKILL
        assert not end.results
        return
    assert end.code == 0, end.error
    if error == "-":
        assert not end.results
        return
    first = end.results[0]
    assert first["error"] == error
    for text in expected.texts if error else ():
        assert text in first["text"], text
    if error == "RankError" and scenario in AT_ONCE and scenario != "experts of no number":  # each rank finds these
        assert "planning a refit failed on" in first["text"]
    check_states(scenario, number, first)
    if scenario not in ("late beyond the time", "late within the time"):  # its own sleep is longer
        assert first["seconds"] < 2 * TIMEOUT_S
    if scenario == "fails twice":
        check_second(number, first, end.results[1])
        return
    for again in end.results[1:]:
        assert again["error"] == ""
        assert set(again["held"].values()) <= {"new"}


def check_states(scenario, number, result):
    """Compare what a rank of the engine says of its tensors with their elements."""
    said, held = result["said"], result["held"]
    if result["error"] == "":
        assert set(held.values()) <= {"new"}
    elif result["error"] != "RefitError":
        assert set(held.values()) <= {"old"}, "a tensor was written while a refit was planned"
        assert not said
    elif number < 2:
        assert not said
    else:
        assert said.keys() == set(NAMES)
        for name, state in held.items():
            assert said[name] in (state, "broken"), name
        check_progress(scenario, number, list(said.values()))


def check_second(number, first, second):
    """Check that a tensor that the first call wrote is not called old by the second, which wrote nothing."""
    assert second["error"] == "RefitError"
    assert "t5: torch.float64 [16, 8] on cpu instead of torch.float32" in second["text"]
    assert second["said"] == {name: "old" if state == "old" else "broken" for name, state in first["said"].items()}
    assert number < 2 or "broken" in second["said"].values()
    assert number != 2 or "old" in second["said"].values()


def check_progress(scenario, number, states):
    """Check that a call that was under way says so: the first tensors are new, the last ones old."""
    if scenario == "trainer cannot copy":  # it sent bytes of the round before in their place
        assert {*states} <= {"old", "broken"}
        assert "broken" in states
    elif scenario in ("engine cannot copy", "fails twice") and number == 3:
        assert {*states} == {"new"}
    elif "before a call" in scenario or scenario in ("changed shape", "changed dtype", "lost parameter"):
        assert {*states} == {"old"}
    else:
        assert {*states} == {"new", "broken", "old"}
        assert states.count("broken") <= 2  # only what was under way


def test_every_scenario_is_expected():
    assert AT_ONCE.keys() | AFTER_A_WHILE.keys() | MORE_AFTER_A_WHILE.keys() == SCENARIOS.keys()


def test_one_error_names_what_does_not_fit_and_nothing_is_written(tmp_path):
    text = wrong(AT_ONCE, tmp_path)
    assert not text, text


def test_a_rank_that_dies_or_is_late_ends_all_in_time(tmp_path):
    text = wrong(AFTER_A_WHILE, tmp_path)
    assert not text, text


@pytest.mark.long
def test_a_rank_that_dies_or_is_late_at_any_point_ends_all_in_time(tmp_path):
    text = wrong(MORE_AFTER_A_WHILE, tmp_path)
    assert not text, text
