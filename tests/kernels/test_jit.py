"""Tests of Triton, and of its replacement if it is not installed."""

import importlib.util

import pytest

from automodel_conv.kernels import jit


@pytest.fixture
def without_triton(monkeypatch):
    """Return the module as it is without Triton."""
    spec = importlib.util.spec_from_file_location("jit_without_triton", jit.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec.loader.exec_module(module)
    return module


def kernel(a):
    return a


def test_without_triton_functions_stay_as_they_are_with_options_or_without(without_triton):
    assert not without_triton.IS_INSTALLED
    assert not without_triton.INTERPRETED
    assert without_triton.jit(kernel) is kernel
    assert without_triton.jit(do_not_specialize=["a"])(kernel) is kernel


def test_without_triton_compile_time_constants_are_their_values(without_triton):
    assert without_triton.tl.constexpr(3) == 3


@pytest.mark.skipif(not jit.IS_INSTALLED, reason="triton is not installed")
def test_with_triton_functions_are_tritons_and_its_interpreter_is_seen():
    triton = pytest.importorskip("triton")
    assert jit.jit is triton.jit
    assert jit.INTERPRETED != isinstance(jit.jit(kernel), triton.JITFunction)
    assert jit.tl is importlib.import_module("triton.language")
