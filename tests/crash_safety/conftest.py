"""Fixtures: a model, its checkpoint, the expected outputs without faults, and a process that forks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import automodel_conv as amc
from tests.crash_safety.support import (
    BESIDE,
    KINDS,
    SIZES,
    Files,
    files,
)
from tests.faults import Forks, forks
from tests.model_zoo import build_model, write_checkpoint

# The faults use Linux system calls.
collect_ignore_glob = [] if sys.platform == "linux" else ["*"]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace ``os.fsync`` by a no-op: a killed process loses no written data. Tests of lost power simulate a disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def model() -> Any:
    return build_model("mixtral")


@pytest.fixture(scope="session")
def source(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_checkpoint(model, directory)
    for name in BESIDE:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


@pytest.fixture(scope="session")
def wanted(model: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Return the files of each kind of conversion, and of a save, that ran without interruption."""
    root = tmp_path_factory.mktemp("wanted")
    for kind, arguments in KINDS.items():
        amc.convert_checkpoint(source, root / kind, **arguments)
    amc.save_checkpoint(model, root / "saved", **SIZES)
    return {kind: files(root / kind) for kind in (*KINDS, "saved")}


@pytest.fixture(scope="session")
def forked(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks() as program:
        warm = tmp_path_factory.mktemp("warm")
        program.run("warm", arguments={"source": str(source), "destination": str(warm / "out"), "layout": "nemo"})
        yield program
