"""Fixture of a published model."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    from tests.model_zoo import build_model, write_checkpoint

    model = build_model("mixtral")
    write_checkpoint(model, directory := tmp_path_factory.mktemp("published"))
    return type(model).from_pretrained(directory), directory
