"""Tests of the folder of unfinished work: its lock and its removal."""

import multiprocessing
import os
import sys
import time

import pytest

from automodel_conv.errors import DestinationError
from automodel_conv.files import system
from automodel_conv.files.staging import (
    JOURNAL_NAME,
    LOCK_NAME,
    STAGING_NAME,
    holds_work,
    locked,
    remove_all,
    remove_leftovers,
    remove_staging,
    staged_path,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux locks")


@pytest.fixture
def staging(tmp_path):
    (tmp_path / STAGING_NAME).mkdir()
    return tmp_path / STAGING_NAME


def test_work_is_there_if_it_has_a_journal(tmp_path, staging):
    assert not holds_work(str(tmp_path))
    (staging / JOURNAL_NAME).touch()
    assert holds_work(str(tmp_path))
    assert staged_path(str(tmp_path), JOURNAL_NAME) == str(staging / JOURNAL_NAME)


def test_a_lock_refuses_another_one_until_it_is_closed(tmp_path):
    staging = str(tmp_path / STAGING_NAME)
    refusal = pytest.raises(DestinationError, match=f"(?s)another process writes.*{tmp_path}")
    with locked(staging, str(tmp_path)), refusal, locked(staging, str(tmp_path)):
        pass
    with locked(staging, str(tmp_path)):
        pass


def test_a_lock_ends_with_its_block_even_if_a_forked_process_goes_on(tmp_path):
    staging = str(tmp_path / STAGING_NAME)
    with locked(staging, str(tmp_path)):
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
    try:
        with locked(staging, str(tmp_path)):
            assert process.is_alive()
    finally:
        process.kill()
        process.join()


def test_a_lock_whose_file_its_owner_removes_is_taken_on_a_new_file(tmp_path, monkeypatch):
    staging, real = str(tmp_path / STAGING_NAME), system.lock

    def removed_meanwhile(fd):
        monkeypatch.setattr(system, "lock", real)
        os.remove(os.path.join(staging, LOCK_NAME))
        return real(fd)

    monkeypatch.setattr(system, "lock", removed_meanwhile)
    with locked(staging, str(tmp_path)), system.open_append(os.path.join(staging, LOCK_NAME)) as other:
        assert not system.lock(other.fileno())


def test_the_lock_is_removed_after_all_else(staging, monkeypatch):
    for name in ("a", LOCK_NAME, "zz"):
        (staging / name).touch()
    removed, remove = [], system.remove
    monkeypatch.setattr(system, "remove", lambda path: (removed.append(os.path.basename(path)), remove(path)))
    remove_staging(str(staging))
    assert removed == ["a", "zz", LOCK_NAME]
    assert not staging.exists()


def test_leftovers_are_removed_unless_another_process_has_them(tmp_path, staging):
    with locked(str(staging), str(tmp_path)), pytest.raises(DestinationError, match="another process"):
        remove_leftovers(str(tmp_path))
    (staging / "beside").mkdir()
    (staging / "beside" / "a").touch()
    (tmp_path / "model.safetensors").touch()
    for _ in range(2):
        remove_leftovers(str(tmp_path))
        assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").touch()
    (tmp_path / "removed" / "inner").mkdir(parents=True)
    (tmp_path / "removed" / "link").symlink_to(tmp_path / "kept")
    remove_all(str(tmp_path / "removed"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "kept"]
