"""Tests of the process of the demo: each step is a process of its own, and digests depend on every bit."""

import os
import signal

import pytest
import torch

from automodel_conv.cli.demo_process import digests, in_new_process


def test_steps_run_in_new_processes_which_end():
    first, second = in_new_process(os.getpid), in_new_process(os.getpid)
    assert len({first, second, os.getpid()}) == 3
    for process in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_step_that_dies_raises():
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        in_new_process(signal.raise_signal, signal.SIGKILL)


def test_digests_depend_on_every_bit_and_the_dtype():
    tensor = torch.ones(4)
    other = tensor.clone()
    other[3] += 2**-20
    same, bit, dtype = (digests({"x": t})["x"] for t in (tensor.clone(), other, tensor.view(torch.int32)))
    assert digests({"x": tensor})["x"] == same
    assert len({same, bit, dtype}) == 3
