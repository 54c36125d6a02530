"""Checkpoints that transformers wrote, one of each type."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """``published(type, sizes)``: the directory and the tensors of the model; each is made once."""
    from tests.doors.layouts_on_disk.support import SIZES, publish  # needs transformers, as all tests here do

    made = {}

    def get(model_type, sizes=SIZES[0]):
        if (model_type, sizes) not in made:
            directory = tmp_path_factory.mktemp(model_type)
            model = publish(model_type, sizes, directory)
            made[model_type, sizes] = directory, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return made[model_type, sizes]

    return get
