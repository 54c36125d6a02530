"""Fixtures of a model to save."""

from __future__ import annotations

import pytest

from tests.doors.saving.support import NAMES, loaded_by_upstream


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    if not NAMES:
        pytest.skip("transformers is not installed")
    return loaded_by_upstream("mixtral", tmp_path_factory.mktemp("mixtral"))
