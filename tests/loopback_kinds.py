"""The files of a folder on every kind of storage: on web servers, in buckets, on the Hub, and behind other URLs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest

from automodel_conv.files.source_options import SourceOptions
from tests import loopback_hub
from tests.loopback_gcs import serve_gcs
from tests.loopback_moto import CREDENTIALS, serve_moto
from tests.loopback_s3 import serve_s3
from tests.loopback_store import serve

KINDS = ("http", "s3", "moto", "gs", "hf", "org/name", "memory", "file")
BUCKET = "bucket"
REPOSITORY = "some-org/Some.Model"


class Place(NamedTuple):
    """The path and the options by which callers name a checkpoint."""

    path: str
    options: SourceOptions


@contextmanager
def placed(kind: str, folder: Path, patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Place]:
    """Serve a folder; skip the test if a package for this kind is not installed.

    Args:
        kind: one of ``KINDS``.
        folder: the folder.
        patch: sets variables of the environment.
        cache: folder for the cache of the Hub.
    """
    no_other_credentials(patch)
    if kind == "http":
        with serve(folder) as server:
            yield Place(server.url, {})
    elif kind in ("s3", "moto"):
        pytest.importorskip("s3fs")
        with _s3(kind, folder, patch) as url:
            yield Place(f"s3://{BUCKET}/", {"storage_options": _s3_options(url)})
    elif kind == "gs":
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else gcsfs asks Google itself about the bucket
        pytest.importorskip("gcsfs")
        with serve_gcs(folder, BUCKET) as server:
            yield Place(f"gs://{BUCKET}", {"storage_options": {"token": "anon", "endpoint_url": server.url}})
    elif kind in ("hf", "org/name"):
        pytest.importorskip("huggingface_hub")
        with loopback_hub.serve({REPOSITORY: folder}) as hub:
            loopback_hub.use(hub, cache, patch)
            yield Place(f"hf://{REPOSITORY}@main" if kind == "hf" else REPOSITORY, {})
    elif kind == "memory":
        store = fsspec.filesystem("memory")
        store.put(f"{folder}/", "/kinds/of/", recursive=True)
        try:
            yield Place("memory://kinds/of", {})
        finally:
            store.rm("/kinds", recursive=True)
    else:
        yield Place(f"file://{folder}", {})


def no_other_credentials(patch: pytest.MonkeyPatch) -> None:
    """Remove the settings for S3 and for proxies that this machine may have."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("NO_PROXY", "*")


def _s3_options(url: str) -> dict[str, object]:
    return {"key": "k", "secret": "s", "endpoint_url": url, "skip_instance_cache": True}


@contextmanager
def _s3(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[str]:
    no_other_credentials(patch)
    for name, value in CREDENTIALS.items():
        patch.setenv(name, value)
    if kind == "s3":
        with serve_s3(folder, BUCKET) as server:
            yield server.url
        return
    pytest.importorskip("moto.server")
    with serve_moto() as url:
        system = fsspec.filesystem("s3", **_s3_options(url))
        system.mkdir(BUCKET)
        for path in folder.rglob("*"):
            if path.is_file():
                system.put_file(str(path), f"{BUCKET}/{path.relative_to(folder).as_posix()}")
        yield url
