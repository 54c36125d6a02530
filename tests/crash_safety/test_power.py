"""Tests of power failures: a simulated disk loses unsynced data, and the same call then writes a whole checkpoint."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import automodel_conv as amc
from automodel_conv.errors import DestinationError, VerificationError
from automodel_conv.execution import writing
from automodel_conv.files import destination as destination_module
from automodel_conv.publishing import conversion_files
from tests.crash_safety.disk import stop
from tests.crash_safety.support import (
    KINDS,
    SIZES,
    Files,
    assert_whole_or_refused,
    everything,
    new_directory,
    planted,
    use,
)


def fail_power(
    call: Callable[[Path], Any], root: Path, source: Path, wanted: Files, *, last: int | None = None, seeds: int = 1
) -> int:
    """Fail the power before each changing file call of ``call(directory)``, then repeat the call.

    Args:
        last: number of final calls to test; None for all.
    """
    root.mkdir()
    total = stop(lambda: call(root / "counted"), 10**9).calls
    for seed in range(seeds):
        for number in range(total, 0 if last is None else total - last, -1):
            directory = new_directory(root / f"{seed}-{number}", source)
            disk = stop(partial(call, directory), number)
            disk.lose(directory, random.Random(1000 * seed + number))
            whole = assert_whole_or_refused(directory, wanted)
            if whole:
                with contextlib.suppress(DestinationError):
                    call(directory)
            else:
                call(directory)
            assert everything(directory) == wanted
    return total


def converts(source: Path, kind: str) -> Callable[[Path], Any]:
    return lambda directory: amc.convert_checkpoint(source, directory, **KINDS[kind])


def saves(model: Any) -> Callable[[Path], Any]:
    return lambda directory: amc.save_checkpoint(model, directory, **SIZES)


def test_conversion_with_a_power_failure_is_refused_by_loaders_and_then_finishes(source, wanted, tmp_path):
    kind = "in few files"
    assert fail_power(converts(source, kind), tmp_path / "out", source, wanted[kind]) > 50


def test_save_with_a_power_failure_leaves_nothing_that_loads_and_can_be_repeated(model, source, wanted, tmp_path):
    assert fail_power(saves(model), tmp_path / "out", source, wanted["saved"]) > 50


MUTANTS = {
    "a file is recorded before it is on the disk": (writing, "            system.sync(fd)\n", ""),
    "a file is recorded before it is written": (
        conversion_files,
        "                if shard.name in unfinished:\n",
        "                if shard.name in unfinished:\n                    place.finish(shard)\n",
    ),
    "the index comes first": (
        destination_module,
        "        return [*shards, index_name]",
        "        return [index_name, *shards]",
    ),
    "the index may reach the disk before the files": (
        destination_module,
        "                if name == names[-1]:",
        "                if False:",
    ),
    "the index may reach the disk before files in folders": (
        destination_module,
        "                    for folder in (*folders, self.directory):",
        "                    for folder in (self.directory,):",
    ),
    "files may reach their places before their bytes": (
        destination_module,
        "            for path in others.values():\n                _sync(path)\n",
        "",
    ),
    "a file is written to its final path": (
        destination_module,
        "        return os.path.join(self.staging, name)",
        "        return os.path.join(self.directory, name)",
    ),
    "files that were already moved stay": (
        destination_module,
        '            append_record(self._journal, {"placing": placed})\n',
        "",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_planted_fault_fails_under_power_failure(model, source, wanted, tmp_path, monkeypatch, mutant):
    module, *change = MUTANTS[mutant]
    use(monkeypatch, module, planted(module, *change))
    kind = "saved" if "placing" in change[0] else "regrouped"
    call = saves(model) if kind == "saved" else converts(source, kind)
    with pytest.raises((AssertionError, DestinationError, VerificationError, pytest.fail.Exception)):
        fail_power(call, tmp_path / "out", source, wanted[kind], last=55, seeds=10)
