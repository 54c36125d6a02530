"""The Hub of the documentation's code blocks."""

import pytest
from filelock import FileLock

from tests.docs.checkpoints import folders_of, write_all
from tests.loopback_hub import serve


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
