"""The method of NVIDIA Model Optimizer: FP8 and NVFP4.

Sources: NVIDIA Model Optimizer 0.40, ``torch/export/convert_hf_config.py``; the files that it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel_conv.planning.arrangement import rows_in_words
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
        return _nvfp4(config.get("group_size") or 16)
    raise UnsupportedScheme(f"modelopt's {algorithm}", ["FP8", "NVFP4"])


def _nvfp4(size: int) -> list[Scheme]:
    """Return the schemes of NVFP4: with groups of columns, or of rows in a stack of transposed weights.

    modelopt transposes the experts of Llama 4 and gpt-oss, [E, in, out], quantizes groups of inputs, and transposes
    codes and scales back. A byte then holds two rows of a column.
    """
    by_columns = Scheme("e2m1", block_of((1, size)), FP8_SCALES, global_scale=True)
    if size % 2:
        return [by_columns]
    return [by_columns, by_columns._replace(block=(size // 2, 2), stack_arrangement=rows_in_words(2))]


MODELOPT = Method(
    name="modelopt",
    schemes=_schemes,
    codes=(*FP8_CODES, Packing("", "U8", "e2m1")),
    scales=("_scale", "_weight_scale"),  # experts.gate_up_proj has the latter
    global_scale=("_scale_2", "_weight_scale_2"),
    dropped=(".input_scale", "_input_scale"),
)
