"""Tests that ranks on several nodes notice that they do not share a folder, with threads as ranks."""

from __future__ import annotations

import os

import pytest

from automodel_conv.distributed import collectives
from automodel_conv.distributed.shared_folder import refuse_unshared
from automodel_conv.errors import UnsupportedError
from tests.distributed.meshes import Group, Ranks


@pytest.fixture
def ranks(monkeypatch):
    made = Ranks()
    monkeypatch.setattr(collectives, "dist", made)
    return made


def seen_by(ranks, paths):
    group = Group([*range(len(paths))])
    return ranks.run(len(paths), lambda rank: refuse_unshared([group], str(paths[rank])))


def test_ranks_that_see_the_same_file_go_on(ranks, tmp_path):
    (tmp_path / "a").write_bytes(b"header")
    assert seen_by(ranks, [tmp_path / "a"] * 3) == [None] * 3


@pytest.mark.parametrize("other", ["no file", "a file of an earlier save"])
def test_all_ranks_refuse_a_folder_of_each_node(ranks, tmp_path, other):
    (tmp_path / "a").write_bytes(b"header")
    if other != "no file":
        (tmp_path / "b").write_bytes(b"header")
        os.utime(tmp_path / "b", ns=(1, 1))
    errors = seen_by(ranks, [tmp_path / "a", tmp_path / "b", tmp_path / "a"])
    for error in errors:
        assert isinstance(error, UnsupportedError)
        assert "ranks on several nodes cannot upload one checkpoint" in str(error)
        assert "set XDG_CACHE_HOME to a directory that all nodes share" in str(error)


def test_single_process_shares_with_itself(tmp_path):
    refuse_unshared([], str(tmp_path / "absent"))
