"""Tests of the examples in the docstrings of kernels: they run, and every verb and its torch version has one.

pytest does not collect them, because ``automodel_conv/kernels`` is a link to a folder outside of the package.
"""

import doctest
import importlib
import pkgutil

import pytest

from automodel_conv.kernels import jit
from tests.house.public_api import VERBS

PACKAGE = "automodel_conv.kernels"
MODULES = [module.name for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)]
NEED_TRITON = {*VERBS, "deinterleave"}
PUBLIC = [(module, name) for module, names in VERBS.items() for name in names]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name):
    if name in NEED_TRITON and not jit.INTERPRETED:
        pytest.skip("verbs run on tensors of the CPU only in Triton's interpreter")
    module = importlib.import_module(f"{PACKAGE}.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(("module", "name"), [*PUBLIC, ("code_tables", "code_table")])
def test_every_public_function_has_an_example(module, name):
    function = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)
    assert doctest.DocTestParser().get_examples(function.__doc__)
