"""The method of NVIDIA Model Optimizer: FP8 and NVFP4.

Sources: NVIDIA Model Optimizer 0.40, ``torch/export/convert_hf_config.py``; the files that it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel_conv.planning.methods.method import (
    FLOAT_SCALES,
    FP8_CODES,
    FP8_SCALES,
    TENSOR,
    Method,
    Packing,
    Scheme,
    UnsupportedScheme,
    block_of,
)


def _schemes(config: Mapping[str, Any]) -> list[Scheme]:
    if config.get("quant_algo") is None and config.get("kv_cache_scheme") is not None:
        return []
    algorithm = str(config.get("quant_algo")).upper()
    if algorithm == "FP8":
        return [Scheme("e4m3", TENSOR, FLOAT_SCALES)]
    if algorithm == "NVFP4":
        return [Scheme("e2m1", block_of((1, config.get("group_size") or 16)), FP8_SCALES, global_scale=True)]
    raise UnsupportedScheme(f"modelopt's {algorithm}", ["FP8", "NVFP4"])


MODELOPT = Method(
    name="modelopt",
    schemes=_schemes,
    codes=(*FP8_CODES, Packing("", "U8", "e2m1")),
    scales=("_scale", "_weight_scale"),  # experts.gate_up_proj has the latter
    global_scale=("_scale_2", "_weight_scale_2"),
    dropped=(".input_scale", "_input_scale"),
)
