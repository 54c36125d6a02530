"""Fixtures of the packaging tests: one copy of the sources, one wheel, an empty environment."""

import shutil
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.packaging.environments import REPOSITORY, Environment, build_wheel

SOURCES = (
    "automodel_conv",
    "kernels",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "CHANGELOG.md",
    "CITATION.cff",
)


@pytest.fixture(scope="session")
def installed_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


@pytest.fixture
def environment(tmp_path) -> Environment:
    root = tmp_path / "environment"
    venv.create(root, with_pip=False, symlinks=True)
    return Environment(root)


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """Copy the files that distributions are built from, because a build writes next to them."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="session")
def wheel(sources, tmp_path_factory) -> Path:
    return build_wheel(sources, tmp_path_factory.mktemp("wheel"))
