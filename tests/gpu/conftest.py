"""These tests run on a GPU, or on the software GPU, at real sizes; elsewhere they run tiny, in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    # Not at the top: a plugin that decides it may come after this file.
    from tests.gpu.place import PLACE, Place

    return torch.device("cuda", torch.cuda.current_device()) if PLACE is Place.GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
