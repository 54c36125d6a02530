"""Tests of operands: misfits are refused before anything is written; bytes and alignments are counted."""

import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from automodel_conv.errors import ConversionError, UnsupportedError
from automodel_conv.kernels import jit, launch, transpose
from automodel_conv.kernels.address_table import alignment, bytes_moved, matrices_at
from tests.kernels.lots import lot
from tests.kernels.support import VERBS

needs_triton = pytest.mark.skipif(not jit.IS_INSTALLED, reason="triton is not installed")
pytestmark = pytest.mark.usefixtures("small_tiles", "launched")


def zeros(*shape, dtype=torch.bfloat16, count=2):
    return [torch.zeros(shape, dtype=dtype) for _ in range(count)]


MISFITS = {
    "one more source": ("strided_copy", lambda: (zeros(2, 3), zeros(2, 3, count=3))),
    "another shape": ("strided_copy", lambda: (zeros(2, 3), zeros(3, 2))),
    "not turned": ("transpose", lambda: (zeros(2, 3), zeros(2, 3))),
    "one dimension": ("strided_copy", lambda: (zeros(6), zeros(6))),
    "elements apart": ("strided_copy", lambda: (zeros(2, 3), [t[:, ::2] for t in zeros(2, 6)])),
    "two shapes": ("strided_copy", lambda: (zeros(2, 3), [*zeros(2, 3, count=1), *zeros(3, 2, count=1)])),
    "two dtypes": (
        "strided_copy",
        lambda: (zeros(2, 3), [*zeros(2, 3, count=1), *zeros(2, 3, count=1, dtype=torch.float32)]),
    ),
    "two strides": ("strided_copy", lambda: (zeros(2, 3), [*zeros(2, 3, count=1), zeros(2, 4)[0][:, :3]])),
    "half as wide": ("interleave", lambda: (zeros(3, 2), zeros(2, 3), zeros(2, 3))),
    "unlike halves": ("interleave", lambda: (zeros(3, 4), zeros(2, 3), zeros(2, 3, dtype=torch.float32))),
    "an odd source": ("deinterleave", lambda: (zeros(3, 2), zeros(3, 2), zeros(2, 7))),
    "a meta tensor": ("strided_copy", lambda: (zeros(2, 3), [t.to("meta") for t in zeros(2, 3)])),
    "too wide": (
        "strided_copy",
        lambda: ([torch.empty(9 * 2**26).as_strided((9, 1), (2**26, 1)).zero_()], [torch.zeros(1).expand(9, 1)]),
    ),
}


@needs_triton
@pytest.mark.parametrize("misfit", MISFITS)
def test_operands_that_do_not_fit_are_refused_before_anything_is_written(misfit):
    name, operands = MISFITS[misfit]
    arguments = operands()
    with pytest.raises(ConversionError, match="expected"):
        VERBS[name][0](*arguments)
    assert all(not bool(t.any()) for tensors in arguments for t in tensors if t.device.type == "cpu")


@needs_triton
@pytest.mark.parametrize("name", ["strided_copy", "transpose"])
@pytest.mark.parametrize(
    ("dst", "src"),
    [(torch.bfloat16, torch.float64), (torch.int32, torch.float32), (torch.int16, torch.bfloat16)],
    ids=str,
)
def test_casts_that_kernels_do_not_support_are_refused(name, dst, src):
    with pytest.raises(UnsupportedError, match="between these dtypes"):
        VERBS[name][0](zeros(3, 3, dtype=dst), zeros(3, 3, dtype=src))


@needs_triton
def test_transposes_between_elements_are_refused():
    dst = lot((8, 8), torch.bfloat16, [1], 0, poisoned=True)
    src = lot((8, 8), torch.bfloat16, [0], 0)
    with pytest.raises(ConversionError, match="multiples of the element size"):
        transpose.transpose(dst.matrices, src.matrices)


def test_matrices_that_leave_their_memory_are_refused():
    memory = torch.zeros(100, dtype=torch.uint8)
    matrices_at(memory, [0, 64], (2, 3), 12, torch.bfloat16)
    for offsets, stride in (([0, 71], 12), ([-1], 12), ([0], -1)):
        with pytest.raises(ConversionError, match="extends beyond its tensor"):
            matrices_at(memory, offsets, (2, 3), stride, torch.bfloat16)
    with pytest.raises(ConversionError, match="contiguous"):
        matrices_at(memory[::2], [0], (2, 3), 3, torch.bfloat16)


def test_host_tensors_are_refused_where_the_interpreter_is_off():
    code = """
import torch
from automodel_conv.errors import UnsupportedError
from automodel_conv.kernels.transpose import transpose
try:
    transpose([torch.zeros(2, 3)], [torch.ones(3, 2)])
except UnsupportedError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "interpreter, which is off" in done.stdout or "not installed" in done.stdout


@needs_triton
def test_missing_requirement_of_triton_on_a_gpu_is_reported_first(monkeypatch):
    class Driver:
        def __init__(self, *errors):
            self.active = mock.Mock(**{"get_current_target.side_effect": errors or None})

    def reason(driver):
        with mock.patch("triton.runtime.driver", driver), mock.patch.object(jit, "INTERPRETED", False):
            return launch.why_not.__wrapped__(torch.device("cuda", 0))

    monkeypatch.setenv("CC", sys.executable)
    assert reason(Driver()) is None
    no_headers = subprocess.CalledProcessError(1, ["gcc", "main.c"])
    for error in (no_headers, RuntimeError("0 active drivers"), AssertionError("libcuda.so cannot found!")):
        assert str(error) in reason(Driver(error))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in reason(Driver())
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", {"cc": "/usr/bin/cc"}.get)  # a name that Triton does not search for
    assert "gcc and clang" in reason(Driver())


def test_every_byte_of_every_operand_counts_as_moved_once():
    assert bytes_moved(zeros(3, 4), zeros(2, 3, dtype=torch.float32), zeros(2, 3)) == 2 * (24 + 24 + 12)
    assert bytes_moved(zeros(0, 4), []) == 0


def test_alignment_is_the_largest_power_of_two_divisor():
    numbers = np.arange(1, 200)
    assert alignment(numbers).tolist() == [max(a for a in (1, 2, 4, 8, 16) if n % a == 0) for n in numbers.tolist()]
