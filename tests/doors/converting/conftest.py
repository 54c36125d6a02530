"""Fixtures of checkpoints to convert."""

from __future__ import annotations

import pytest

import automodel_conv as amc
from tests.doors.converting.support import plain

try:
    from tests.model_zoo import build_model, write_checkpoint
except ModuleNotFoundError:
    build_model = None


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Write a small mixtral as it is published, in several files."""
    if build_model is None:
        pytest.skip("transformers is not installed")
    directory = tmp_path_factory.mktemp("published")
    write_checkpoint(build_model("mixtral"), directory)
    return directory


@pytest.fixture
def saved(tmp_path):
    amc.save_checkpoint(plain(), tmp_path / "saved", rules=[], max_shard_size=1500)
    return tmp_path / "saved"
