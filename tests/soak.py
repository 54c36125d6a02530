"""Repeated loads, saves and conversions in one process: memory and descriptors must not grow.

    python -m tests.soak [--rounds N] [--csv FILE]

A round is a load into a model, one to tensors, a save, a conversion, a load that fails, and the removal of the files.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import shutil
import sys
import tempfile
import threading
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.fault_sweep import VERSIONS, Model, Sweep, rules
from tests.faults import descriptors


class Measured(NamedTuple):
    """Resources that the process holds after a number of rounds."""

    rounds: int
    resident_bytes: int
    descriptors: int
    threads: int
    mappings: int


def soak(root: Path, rounds: int, every: int) -> list[Measured]:
    """Run the rounds. Return what the process holds after each ``every`` of them."""
    sweep = Sweep(root, threads=2)
    truncated = root / "source" / "model-00002-of-00002.safetensors"
    whole = truncated.read_bytes()
    held = []
    for number in range(1, rounds + 1):
        model = Model()
        amc.load_model(model, sweep.source, rules=rules(), threads=2)
        loaded = sweep.load_state_dict()
        for name, tensor in sweep.wanted.items():
            assert_bytes_equal(loaded[name], tensor)
            assert_bytes_equal(model.state_dict()[name], tensor)
        for verb in (sweep.save, sweep.convert):
            verb(root / "out")
            shutil.rmtree(root / "out")
        truncated.write_bytes(whole[:-1])
        try:
            sweep.load_state_dict()
            raise AssertionError("a truncated file was loaded")
        except amc.CheckpointError:
            truncated.write_bytes(whole)
        del model, loaded, tensor
        if number % every == 0:
            held.append(_held(number))
    return held


def _held(rounds: int) -> Measured:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    mappings = len(Path("/proc/self/maps").read_text().splitlines())
    return Measured(rounds, resident, descriptors(), threading.active_count(), mappings)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the measurements")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        held = soak(Path(root), options.rounds, max(1, options.rounds // 10))
    for one in held:
        sys.stdout.write(f"{one}\n")
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow((*Measured._fields, *VERSIONS))
            table.writerows((*one, *map(metadata.version, VERSIONS)) for one in held)


if __name__ == "__main__":
    main()
