"""Fixtures: a file to read from, and one to write to."""

import pytest

from automodel_conv.files import system
from tests.files.support import CONTENT


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    return str(path)


@pytest.fixture
def fd(file):
    descriptor = system.open_readonly(file)
    yield descriptor
    system.close(descriptor)


@pytest.fixture
def target(tmp_path):
    descriptor = system.create(str(tmp_path / "new"))
    yield descriptor
    system.close(descriptor)
