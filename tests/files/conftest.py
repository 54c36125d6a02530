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
    with system.open_readonly(file) as opened:
        yield opened.fileno()


@pytest.fixture
def target(tmp_path):
    with system.create(str(tmp_path / "new")) as created:
        yield created.fileno()
