"""These tests run on a GPU at real sizes; without one they run tiny, in Triton's interpreter."""

import pytest
import torch

from tests.gpu.raw import ON_GPU


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
