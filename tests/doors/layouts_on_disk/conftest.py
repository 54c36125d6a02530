"""Fixtures of checkpoints written by transformers, one of each type."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return ``published(type, sizes)``: the directory and the tensors of the model, each created once."""
    from tests.doors.layouts_on_disk.support import SIZES, publish  # needs transformers, like all tests here

    checkpoints = {}

    def get(model_type, sizes=SIZES[0]):
        if (model_type, sizes) not in checkpoints:
            directory = tmp_path_factory.mktemp(model_type)
            model = publish(model_type, sizes, directory)
            checkpoints[model_type, sizes] = (
                directory,
                {name: tensor.clone() for name, tensor in model.state_dict().items()},
            )
        return checkpoints[model_type, sizes]

    return get
