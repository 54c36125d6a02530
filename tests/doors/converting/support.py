"""Tensors and an oracle of conversions: stack, cat and transpose, one layer at a time."""

from __future__ import annotations

import torch

from automodel_conv.testing import address_valued


def plain():
    """Return tensors that no model has, some of dtypes that are never cast."""
    return {
        "z.weight": address_valued((40, 30), torch.bfloat16),
        "a.scale": address_valued((), torch.float32, 7),
        "codes": address_valued((17, 3), torch.uint8, 9),
        "fp8": address_valued((9, 5), torch.float8_e4m3fn, 1),
        "empty": torch.empty(0, 4),
    }
