"""An S3 server for the tests of this folder, and a cache of their own on this machine."""

from __future__ import annotations

import pytest

from tests.stores import serve_s3


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs", reason="it writes s3://")
    pytest.importorskip("moto", reason="it is the server")
    with serve_s3() as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return the directory in which files wait for their upload; other tests do not see them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
