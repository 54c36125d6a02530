"""Settings for every test: where Triton runs, how many examples hypothesis tries, which tests need a GPU."""

import importlib.util
import os
import signal

import pytest
import torch
from hypothesis import settings

# Triton reads this when it is imported, so set it before any test file imports Triton. Host tensors need the
# interpreter. 0 is only for tests/gpu on a GPU: `python -m benchmarks.gpu` runs them so.
os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")


def pytest_configure(config):
    # A shell makes background processes ignore Ctrl-C, which some tests send to themselves.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A run that should hide a package but does not would pass without testing anything.
    for package in filter(None, os.environ.get("HIDDEN_PACKAGES", "").split(",")):
        if importlib.util.find_spec(package) is not None:
            raise pytest.UsageError(f"{package} is in HIDDEN_PACKAGES, yet it can be imported")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and Triton's interpreter off"))
