"""What holds for every test: where Triton runs, how much hypothesis tries, who needs a GPU."""

import importlib.util
import os
import signal

import pytest
import torch
from hypothesis import settings

# Triton reads this when it is imported, so before any test file imports it. Tensors on the host need the interpreter;
# 0 is for tests/gpu alone, on a GPU, which is how `python -m benchmarks.gpu` runs them.
os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")


def pytest_configure(config):
    # A shell lets what it starts in the background ignore Ctrl-C, which tests send to themselves.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A leg that hides a package and does not would pass without having tested anything.
    for package in filter(None, os.environ.get("HIDDEN_PACKAGES", "").split(",")):
        if importlib.util.find_spec(package) is not None:
            raise pytest.UsageError(f"{package} is in HIDDEN_PACKAGES, yet it can be imported")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and Triton's interpreter off"))
