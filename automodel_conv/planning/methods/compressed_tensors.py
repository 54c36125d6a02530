"""The compressed-tensors method (llm-compressor, Kimi-K2): INT4, INT8, FP8 and FP4, one format per group of weights.

Sources: compressed-tensors 0.20.1, ``compressors/*/base.py``, ``quantization/quant_args.py`` and
``CompressionFormat``; the files of Kimi-K2 and the config of Kimi-K3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel_conv.planning.methods.method import (
    CHANNEL,
    EXPONENT_SCALES,
    FLOAT_SCALES,
    FP8_CODES,
    FP8_SCALES,
    TENSOR,
    Block,
    Method,
    Packing,
    Scheme,
    UnsupportedScheme,
    block_of,
)

# Keys are the format, type and bits in a config. Values are the format of the codes (see ``Decode``) and the dtypes of
# the scales.
_FORMATS: Mapping[tuple[Any, Any, Any], tuple[str, frozenset[str]]] = {
    ("pack-quantized", "int", 4): ("int4", FLOAT_SCALES),
    ("int-quantized", "int", 8): ("int8", FLOAT_SCALES),
    ("float-quantized", "float", 8): ("e4m3", FLOAT_SCALES),
    ("naive-quantized", "int", 8): ("int8", FLOAT_SCALES),
    ("naive-quantized", "float", 8): ("e4m3", FLOAT_SCALES),
    ("mxfp8-quantized", "float", 8): ("e4m3", EXPONENT_SCALES),
    ("nvfp4-pack-quantized", "float", 4): ("e2m1", FP8_SCALES),
    ("mxfp4-pack-quantized", "float", 4): ("e2m1", EXPONENT_SCALES),
}


def _schemes(config: Mapping[str, Any]) -> list[Scheme]:
    if (config.get("transform_config") or {}).get("config_groups"):
        raise UnsupportedScheme("compressed-tensors' transforms of weights", "no transform_config")
    sparse = (config.get("sparsity_config") or {}).get("format")
    if sparse not in (None, "dense"):
        raise UnsupportedScheme(f"compressed-tensors' {sparse}", "no sparsity_config")
    groups = [group for group in (config.get("config_groups") or {}).values() if group.get("weights")]
    return [_scheme(group["weights"], group.get("format") or config.get("format")) for group in groups]


def _scheme(weights: Mapping[str, Any], stored: Any) -> Scheme:
    kind, bits = weights.get("type"), weights.get("num_bits")
    known = _FORMATS.get((stored, kind, bits))
    if known is None:
        expected = [f"{stored} with {bits}-bit {kind} weights" for stored, kind, bits in _FORMATS]
        raise UnsupportedScheme(f"compressed-tensors' {stored} with {bits}-bit {kind} weights", expected)
    if weights.get("actorder") not in (None, False, "static", "weight"):  # "dynamic" is another word for "group"
        raise UnsupportedScheme("compressed-tensors' groups by activation order", "no actorder, or static or weight")
    format, scales = known
    zero_points = not weights.get("symmetric", True)
    if zero_points and format != "int4":
        raise UnsupportedScheme(f"zero points of {format} codes", "symmetric weights")
    return Scheme(format, _block(weights), scales, zero_points, scales is FP8_SCALES)


def _block(weights: Mapping[str, Any]) -> Block:
    strategy = weights.get("strategy")
    if strategy in ("group", "tensor_group"):
        return block_of((1, weights["group_size"]))
    if strategy == "block":
        return block_of(weights["block_structure"])
    if strategy == "channel":
        return CHANNEL
    if strategy == "tensor":
        return TENSOR
    raise UnsupportedScheme(f"compressed-tensors' strategy {strategy!r}", ["tensor", "channel", "group", "block"])


COMPRESSED_TENSORS = Method(
    name="compressed-tensors",
    schemes=_schemes,
    codes=(
        *FP8_CODES,
        Packing("", "I8", "int8"),
        Packing("_packed", "I32", "int4", shape_suffix="_shape"),
        Packing("_packed", "U8", "e2m1"),
    ),
    scales=("_scale",),
    zero_points="_zero_point",
    global_scale=("_global_scale",),
    divides=True,
    dropped=("_shape", ".input_scale", ".input_global_scale", ".input_zero_point"),
    refused={"_g_idx": "is in groups by activation order"},
)
