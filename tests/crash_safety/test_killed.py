"""Tests of killed conversions and saves: loaders refuse the directory, and the same call then finishes."""

from __future__ import annotations

import os
import random
import signal

import pytest

import automodel_conv as amc
from automodel_conv.errors import DestinationError
from tests.crash_safety.support import (
    SIZES,
    arguments_of,
    assert_whole_or_refused,
    calls_of,
    everything,
    files,
    finish,
    new_directory,
    noted,
)


@pytest.mark.parametrize(("kind", "step"), [("nemo", 1), ("transformers", 3)])
def test_conversion_killed_at_any_file_call_is_refused_by_loaders_and_then_finishes(
    forked, source, wanted, tmp_path, kind, step
):
    total = calls_of(forked, "convert", arguments_of(source, tmp_path / "counted", kind))
    assert files(tmp_path / "counted") == wanted[kind]
    kills, resumed = 0, set()
    for call in range(1, total + 1, step):
        directory = new_directory(tmp_path / f"{call}", source)
        when = "before" if call // step % 2 else "after"
        answer = forked.run(
            "convert", arguments=arguments_of(source, directory, kind), signal="SIGKILL", call=call, when=when
        )
        kills += os.WIFSIGNALED(answer["status"]) and os.WTERMSIG(answer["status"]) == signal.SIGKILL
        assert_whole_or_refused(directory, wanted[kind])
        resumed.add(finish(source, directory, kind, wanted))
    assert kills >= 85 // step * (1 + (step > 1))
    shards = sum(name.endswith(".safetensors") for name in wanted[kind])
    assert shards >= 5
    assert resumed >= set(range(shards + 1)), "not every number of finished files occurred"


def test_conversion_killed_at_random_times_is_refused_by_loaders_and_then_finishes(forked, source, wanted, tmp_path):
    chosen = random.Random(1)
    kills = 0
    for number in range(30):
        kind = ("nemo", "transformers")[number % 2]
        directory = new_directory(tmp_path / f"{number}", source)
        answer = forked.run(
            "convert",
            arguments=arguments_of(source, directory, kind),
            signal="SIGKILL",
            delay=chosen.uniform(0, 0.08),
        )
        kills += os.WIFSIGNALED(answer["status"])
        assert_whole_or_refused(directory, wanted[kind])
        finish(source, directory, kind, wanted)
    assert kills


@pytest.mark.parametrize("kind", ["nemo", "transformers"])
def test_conversion_killed_repeatedly_finishes_without_losing_a_file(forked, source, wanted, tmp_path, kind):
    chosen = random.Random(2)
    directory = new_directory(tmp_path / "out", source)
    kills, done = 0, set()
    for _ in range(100):
        call = chosen.randrange(12, 60)
        answer = forked.run("convert", arguments=arguments_of(source, directory, kind), signal="SIGKILL", call=call)
        if not os.WIFSIGNALED(answer["status"]):
            break
        kills += 1
        if assert_whole_or_refused(directory, wanted[kind]) and not noted(directory):
            break  # killed after everything was written and the journal was removed
        assert noted(directory) >= done
        done = noted(directory)
    assert kills >= 3
    assert len(done) > 0
    assert answer.get("resumed", len(done)) == len(done)
    assert files(directory) == wanted[kind]


def test_save_killed_at_any_file_call_leaves_nothing_that_loads_and_can_be_repeated(
    forked, model, source, wanted, tmp_path
):
    total = calls_of(forked, "save", {"directory": str(tmp_path / "counted"), **SIZES})
    assert files(tmp_path / "counted") == wanted["saved"]
    kills = 0
    for call in range(1, total + 1):
        directory = new_directory(tmp_path / f"{call}", source)
        when = "before" if call % 2 else "after"
        arguments = {"directory": str(directory), **SIZES}
        answer = forked.run("save", arguments=arguments, signal="SIGKILL", call=call, when=when)
        kills += os.WIFSIGNALED(answer["status"])
        if assert_whole_or_refused(directory, wanted["saved"]):
            with pytest.raises(DestinationError, match="holds a checkpoint already"):
                amc.save_checkpoint(model, directory, **SIZES)
        else:
            amc.save_checkpoint(model, directory, **SIZES)
        assert everything(directory) == wanted["saved"]
    assert kills >= 60
