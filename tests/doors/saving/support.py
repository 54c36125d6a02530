"""Models and tensors to save."""

from __future__ import annotations

import torch

from automodel_conv.testing import address_valued

try:
    from tests.model_zoo import EXCLUDED, build_model, zoo_names

    NAMES = [name for name in zoo_names() if name not in EXCLUDED]
except ModuleNotFoundError:
    NAMES = []


def loaded_by_upstream(name, directory):
    model = build_model(name)
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory)


def plain():
    return {
        "b.weight": address_valued((5, 6), torch.bfloat16),
        "a.scale": address_valued((), torch.float32, 7),
        "é": address_valued((3, 0), torch.float32),
        "codes": address_valued((17,), torch.uint8, 9),
        "steps": torch.tensor(3),
    }
