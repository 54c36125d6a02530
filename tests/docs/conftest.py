"""The Hub and the buckets of the documentation's code blocks."""

import shutil

import pytest
from filelock import FileLock

from tests.docs.checkpoints import folders_of, write_all
from tests.loopback_gcs import serve_gcs
from tests.loopback_hub import serve
from tests.loopback_moto import CREDENTIALS
from tests.loopback_s3 import serve_s3


@pytest.fixture(scope="session")
def hub(tmp_path_factory, worker_id):
    """Serve the checkpoints that the pages name; all workers of a run share their files."""
    own = tmp_path_factory.getbasetemp()
    directory = (own if worker_id == "master" else own.parent) / "published"
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            unfinished = directory.with_suffix(".part")
            write_all(unfinished)
            unfinished.rename(directory)
    with serve(folders_of(directory)) as hub:
        yield hub


@pytest.fixture
def stores(hub, tmp_path):
    """Return the variables that direct a page to buckets named "models", which hold one of the checkpoints."""
    bucket = tmp_path / "bucket"
    shutil.copytree(hub.repositories["Qwen/Qwen3-30B-A3B"], bucket / "Qwen3-30B-A3B")
    with serve_s3(bucket, "models") as s3, serve_gcs(bucket, "models") as gcs:
        yield CREDENTIALS | {
            "AWS_ENDPOINT_URL": s3.url,
            "STORAGE_EMULATOR_HOST": gcs.url,
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
