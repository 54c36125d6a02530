"""Tests of 500 random schedules of faults: each load has the right bytes, or ends with one clear error."""

from __future__ import annotations

import tempfile

import pytest

from tests.files.remote.random_faults import Schedule, make_short, run_schedule, write_checkpoint

QUICK = 40
ALL = 500


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "published"
    write_checkpoint(folder)
    return folder


@pytest.mark.parametrize("seed", [*range(QUICK), *(pytest.param(n, marks=pytest.mark.long) for n in range(QUICK, ALL))])
def test_schedule_ends_with_the_right_bytes_or_one_clear_error(seed, published, tmp_path, monkeypatch):
    make_short(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    schedule = Schedule.of(seed)
    outcome = run_schedule(schedule, published, tmp_path / "copy", tmp_path / "temporary")
    print(schedule, outcome)
