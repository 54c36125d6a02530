"""``from_pretrained`` without and under the hook, with comparisons of the results."""

from __future__ import annotations

import hashlib
from pathlib import Path

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import unpadded


def both(model_class, path, **options):
    """Load without and under the hook; return both models and the hook's reports after comparing them."""
    stock, info = model_class.from_pretrained(path, output_loading_info=True, **options)
    with amc.accelerate_transformers() as acceleration:
        hooked, hooked_info = model_class.from_pretrained(path, output_loading_info=True, **options)
    assert_same_model(hooked, stock)
    assert hooked_info == info
    return stock, hooked, acceleration.loads


def assert_same_model(model, expected):
    actual, wanted = model.state_dict(), expected.state_dict()
    assert list(actual) == list(wanted)
    for name, tensor in wanted.items():
        assert actual[name].device == tensor.device
        if not tensor.is_meta:
            assert_bytes_equal(actual[name], tensor, strides=True)
    for (name, buffer), (_, other) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert buffer.is_meta or (assert_bytes_equal(buffer, other), name)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]


def saved(model, directory: Path):
    """Save the model; return the name and hash of each file."""
    model.save_pretrained(directory)
    return hashes(directory)


def hashes(directory: Path):
    return {file.name: hashlib.sha256(unpadded(file)).hexdigest() for file in directory.glob("*.safetensors*")}
