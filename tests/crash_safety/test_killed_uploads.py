"""Tests of killed conversions to S3: readers see nothing, and the same call then finishes with what was uploaded."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

import automodel_conv as amc
from automodel_conv.errors import ConversionError
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.files.uploads import s3_store
from automodel_conv.files.uploads.folder_by_path import folder_of
from automodel_conv.files.uploads.upload_journal import upload_state
from tests.crash_safety.support import BESIDE, KINDS, has_index
from tests.faults import forks
from tests.stores import BUCKET, S3Server, serve_s3

PART_BYTES = 40_000
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs", reason="it writes s3://")
    pytest.importorskip("moto", reason="it is the server")
    with serve_s3() as server:
        yield server


@pytest.fixture(scope="module")
def uploading(source, tmp_path_factory):
    """Return a process that forks, and whose uploads wait in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with forks() as program:
            warm = tmp_path_factory.mktemp("warm")
            program.run("warm", arguments={"source": str(source), "destination": str(warm / "out"), "layout": "nemo"})
            yield program


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(s3_store, "PART_BYTES", PART_BYTES)


def job(server: S3Server, source: Path, folder: str, kind: str) -> dict[str, Any]:
    arguments = {"source": str(source), "destination": f"s3://{BUCKET}/{folder}", "storage_options": server.options}
    return {"arguments": arguments | KINDS[kind], "part_bytes": PART_BYTES}


def uploaded(server: S3Server, folder: str) -> set[str]:
    """Return the names of the shards that the journal reports as uploaded."""
    place = folder_of(f"s3://{BUCKET}/{folder}", SourceSettings(storage_options=server.options))
    journal = Path(place.directory, "incomplete.automodel_conv", "journal.jsonl")
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return upload_state([json.loads(line) for line in lines]).uploaded


def assert_whole_or_nothing(server: S3Server, folder: str, whole: dict[str, bytes]) -> bool:
    """Check that a folder is the whole checkpoint or is refused; return whether it is one."""
    present = server.files(folder)
    if has_index(present):
        assert present == whole
        return True
    assert present.items() <= whole.items()
    with pytest.raises(ConversionError):
        amc.open_checkpoint(f"s3://{BUCKET}/{folder}")
    return False


def killed(uploading, server, source, wanted, kind, **fault) -> tuple[bool, int, int]:
    """Kill a conversion, check what is visible, and repeat it.

    Returns:
        Whether it was killed, and how many shards were uploaded before and taken over.
    """
    folder = f"killed-{next(_numbers)}"
    one = job(server, source, folder, kind)
    answer = uploading.run("convert", signal="SIGKILL", **fault, **one)
    is_killed = os.WIFSIGNALED(answer["status"]) and os.WTERMSIG(answer["status"]) == signal.SIGKILL
    is_whole = assert_whole_or_nothing(server, folder, wanted[kind])
    before = uploaded(server, folder)
    again = uploading.run("convert", **one)
    assert again["outcome"] == "done", again
    assert again["descriptors"] <= 3, "sockets of s3fs, and nothing else"
    assert server.files(folder) == wanted[kind]
    assert not server.open_uploads(folder)
    assert not os.path.exists(
        folder_of(f"s3://{BUCKET}/{folder}", SourceSettings(storage_options=server.options)).directory
    )
    if not is_whole:
        assert again["resumed"] >= len(before)
    return is_killed, len(before), again["resumed"]


@pytest.fixture
def environment(uploading, monkeypatch, server, tmp_path_factory):
    """Let this process look where the program's uploads wait, and read from the server."""
    cache = next(path for path in tmp_path_factory.getbasetemp().glob("cache*") if path.is_dir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.options["secret"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)


def total_of(uploading, server, source, wanted, kind) -> int:
    folder = f"counted-{next(_numbers)}"
    answer = uploading.run("convert", **job(server, source, folder, kind))
    assert answer["outcome"] == "done", answer
    assert server.files(folder) == wanted[kind]
    assert {name for name in BESIDE} <= server.files(folder).keys()
    return answer["calls"]


def test_conversion_killed_at_some_moments_shows_nothing_and_then_finishes(
    environment, uploading, server, source, wanted
):
    total = total_of(uploading, server, source, wanted, "nemo")
    kills, resumed = 0, set()
    for number, call in enumerate(range(8, total, total // 5)):
        when = ("before", "after")[number % 2]
        is_killed, _, count = killed(uploading, server, source, wanted, "nemo", call=call, when=when)
        kills += is_killed
        resumed.add(count)
    assert kills >= 4
    assert len(resumed) >= 3


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nemo", "in few files"])
def test_conversion_killed_at_many_moments_shows_nothing_and_then_finishes(
    environment, uploading, server, source, wanted, kind
):
    total = total_of(uploading, server, source, wanted, kind)
    chosen = random.Random(3)
    kills, resumed = 0, set()
    for number, call in enumerate(sorted(chosen.choices(range(1, total + 1), k=25))):
        when = ("before", "after")[number % 2]
        is_killed, _, count = killed(uploading, server, source, wanted, kind, call=call, when=when)
        kills += is_killed
        resumed.add(count)
    assert kills >= 22
    assert len(resumed) >= 3


@pytest.mark.long
def test_conversion_killed_at_random_times_shows_nothing_and_then_finishes(
    environment, uploading, server, source, wanted
):
    chosen = random.Random(4)
    kills = sum(killed(uploading, server, source, wanted, "nemo", delay=chosen.uniform(0.2, 1.2))[0] for _ in range(20))
    assert kills >= 5
