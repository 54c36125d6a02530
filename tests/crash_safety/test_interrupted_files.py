"""Tests of interrupts at every place where Python can run the handler of Ctrl-C: no file and no lock stays."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import automodel_conv as amc
from automodel_conv.execution import checksums, comparing, file_slabs, reading, writing
from automodel_conv.files import destination, final_files, finished, header, source, staging, system
from tests.crash_safety.interrupts import interrupt_at
from tests.faults import descriptors

# All code that opens, passes on or closes files.
MODULES = (
    *(destination, final_files, finished, header, source, staging, system),
    *(checksums, comparing, file_slabs, reading, writing),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of one file, which has been opened, so that all imports are done."""
    directory = tmp_path_factory.mktemp("small")
    save(directory, directory)
    convert(directory, directory / "converted")
    convert(directory, directory / "converted")
    load(directory, directory)
    return directory


def save(_: Path, directory: Path) -> None:
    amc.save_checkpoint({"a": torch.ones(4)}, directory, rules=[], threads=1, checksums=True)


def convert(source: Path, directory: Path) -> None:
    amc.convert_checkpoint(source, directory, rules=[], threads=1, checksums=True, verify=True)


def load(source: Path, _: Path) -> None:
    amc.load_state_dict(source, rules=[], threads=1)


def compare(source: Path, directory: Path) -> None:
    """Convert to a directory that is finished already, and has leftovers."""
    staging_of(source / "converted").mkdir()
    convert(source, source / "converted")


def staging_of(directory: Path) -> Path:
    return directory / staging.STAGING_NAME


@pytest.mark.parametrize(("call", "places"), [(save, 500), (convert, 800), (load, 100), (compare, 300)])
def test_an_interrupt_anywhere_leaves_no_file_open_and_no_lock(
    small: Path, tmp_path: Path, call: Callable[[Path, Path], None], places: int
):
    for number in itertools.count(1):
        directory = small / "converted" if call is compare else tmp_path / f"{number}"
        before = descriptors()
        interrupt = interrupt_at(number, lambda directory=directory: call(small, directory), MODULES)
        if interrupt is None:
            break
        del interrupt  # its traceback refers to all frames
        if call is save and descriptors() > before:
            gc.collect()  # contextlib.ExitStack refers to an error of its own end in a circle
        assert descriptors() == before, number
        with staging.locked(str(staging_of(directory)), str(directory)):
            staging.remove_staging(str(staging_of(directory)))
    assert number > places
