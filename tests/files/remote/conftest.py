"""The checkpoint on each kind of storage."""

from __future__ import annotations

import fsspec
import pytest

from tests.files.remote.support import write_sharded
from tests.loopback_web import serve


@pytest.fixture
def folder(tmp_path):
    return write_sharded(tmp_path / "published")


@pytest.fixture
def web(folder):
    with serve(folder) as web:
        yield web


@pytest.fixture(params=["file", "memory", "http"])
def url(request, folder):
    """Return the URL of the folder on each kind of storage."""
    if request.param == "http":
        yield request.getfixturevalue("web").url
    elif request.param == "file":
        yield f"file://{folder}"
    else:
        store = fsspec.filesystem("memory")
        store.put(str(folder), "/bucket/", recursive=True)
        yield f"memory://bucket/{folder.name}"
        store.rm("/bucket", recursive=True)
