"""Fixtures of tests that run on a GPU or the software GPU at real sizes, and elsewhere tiny, in the interpreter."""

import pytest
import torch

# Modules that depend on where the tests run are imported late: the plugin that decides this may load after this file.


@pytest.fixture(scope="session")
def device():
    from tests.gpu.place import PLACE, Place

    return torch.device("cuda", torch.cuda.current_device()) if PLACE is Place.GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from benchmarks import shapes
    from tests.gpu.models import SHAPE

    directory = tmp_path_factory.mktemp("checkpoint")
    shapes.write_checkpoint(SHAPE, str(directory))
    return directory


@pytest.fixture(scope="session")
def per_expert(checkpoint):
    """Return the tensors in the files, on the CPU."""
    from tests.gpu.models import tensors_of

    return tensors_of(checkpoint)


@pytest.fixture(scope="session")
def on_device(per_expert, device):
    return {name: tensor.to(device) for name, tensor in per_expert.items()}
