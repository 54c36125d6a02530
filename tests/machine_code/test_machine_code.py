"""Tests of the machine code that a GPU would run: every launchable variant, compiled without a GPU.

The interpreter, which runs the other tests of kernels, notices none of this: accesses narrower than promised, spilled
registers, unneeded exchanges between threads, too many instructions. It must be off here, hence the processes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(module, *arguments):
    return json.loads(printed(module, *arguments))


def printed(module, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_variant_keeps_its_promises_when_compiled(arch):
    report = run("tests.machine_code.compiled", arch)
    assert report["checked"] > 80
    assert report["wrong"] == {}


def test_each_planted_fault_is_detected_by_its_own_check():
    errors = run("tests.machine_code.planted")
    kinds = {fault: [text.partition(":")[0].partition(" by ")[0] for text in texts] for fault, texts in errors.items()}
    assert kinds == {
        "none": [],
        "lost hint": ["loads"],
        "narrow store": ["stores", "barriers", "shared memory"],  # loaded in vectors, stored one by one
        "spill": ["spills"],
        "exchange": ["barriers", "shared memory"],
        "no exchange": ["barriers"],
        "shuffles": ["barriers", "shared memory", "shuffles"],
    }


def test_launches_compile_a_variant_once_to_the_checked_code():
    assert run("tests.machine_code.launched") == {"launches": 12, "compilations": 1, "as checked": True}


def test_table_has_the_counts_of_every_given_triton():
    here = str(Path(importlib.util.find_spec("triton").origin).parents[1])
    text = printed("tests.machine_code.table", "90", "--only", "8 x uint8 to 8 x uint16", "--triton", here)
    head, _, *lines = text.splitlines()
    names = [table_row.strip() for table_row in head.split("|")[1:-1]]
    rows = [dict(zip(names, (table_row.strip() for table_row in line.split("|")[1:-1]), strict=True)) for line in lines]
    counts = {
        (row["variant"].endswith("transposed"), *(row[name] for name in ("BAR", "LDS", "STS", "SHFL"))) for row in rows
    }
    assert counts == {(False, "0", "0", "0", "0"), (True, "1", "4", "4", "0")}
    assert {row["LDG"] for row in rows} == {"8 x 8, 32 x 2, 4 x 1", "8 x 8, 4 x 4, 32 x 2"}
    assert {(row["STG"], row["sm"], row["spills"]) for row in rows} == {("4 x 16", "90", "0")}
    assert rows[::2] == rows[1::2]
