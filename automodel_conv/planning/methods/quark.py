"""The method of AMD Quark: MXFP4, FP8 of every block, MXFP8, NVFP4, INT8.

A config has one description of weights for all layers, and others for layers that globs name. Each lists a dtype, how
many elements share a scale (``qscheme``), and the format of the scales.

Sources: amd-quark 0.13, ``QTensorConfig.to_dict`` in ``torch/quantization/config/config.py``, ``torch/utils/pack.py``
(low nibble first) and the files that it writes; vLLM 0.33.0, ``model_executor/layers/quantization/quark`` and
``utils/ocp_mx_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    modules_of,
)

_FORMATS = {"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2", "fp4": "e2m1", "int8": "int8"}
_VALUES = ("bfloat16", "float16", "float32")
"""Dtypes of weights that are stored as values."""
_BLOCKS = ["per_tensor", "per_channel with ch_axis 0", "per_group along a row", "per_block"]


def _schemes(config: Mapping[str, Any]) -> list[Scheme]:
    stored = (config.get("export") or {}).get("weight_format", "real_quantized")
    if stored != "real_quantized":
        raise UnsupportedScheme(f"quark's weight_format {stored!r}", "real_quantized")
    others = [config.get("global_quant_config"), *(config.get("layer_type_quant_config") or {}).values()]
    names: dict[Scheme, list[str]] = {}
    for name, layer in (config.get("layer_quant_config") or {}).items():
        for scheme in _schemes_of([layer]):
            names.setdefault(scheme, []).append(name)
    stated = [scheme._replace(modules=modules_of(modules)) for scheme, modules in names.items()]
    return [*dict.fromkeys(_schemes_of(others)), *stated]


def _schemes_of(layers: Iterable[Mapping[str, Any] | None]) -> Iterator[Scheme]:
    """Yield the scheme of each description of a layer whose weights are quantized."""
    schemes = (_scheme(layer["weight"]) for layer in layers if layer and layer.get("weight"))
    yield from (scheme for scheme in schemes if scheme is not None)


def _scheme(weight: Any) -> Scheme | None:
    """Return the scheme of weights; None if they are stored as values."""
    first, *others = weight if isinstance(weight, list) else [weight]
    if first.get("is_dynamic") or (first["dtype"] in _VALUES and not others):
        return None
    stages = " and ".join(stage["dtype"] for stage in (first, *others))
    if others:
        scale = others[0]
        is_nvfp4 = (first["dtype"], scale["dtype"], scale["qscheme"]) == ("fp4", "fp8_e4m3", "per_tensor")
        if not is_nvfp4 or not scale.get("is_scale_quant", True) or len(others) > 1:
            raise UnsupportedScheme(f"quark's {stages} in sequence", "fp4 with scales in fp8_e4m3")
        return Scheme("e2m1", _block(first), FP8_SCALES, global_scale=True)
    if first["dtype"] not in _FORMATS:
        raise UnsupportedScheme(f"quark's {stages}", [*_FORMATS])
    if first["dtype"] == "int8" and (first.get("qscheme") == "per_group" or not first.get("symmetric")):
        kind = "symmetric" if first.get("symmetric") else "asymmetric"
        raise UnsupportedScheme(f"quark's {kind} int8 {first.get('qscheme')}", "symmetric int8 per_tensor, per_channel")
    return Scheme(_FORMATS[first["dtype"]], _block(first), _scales(first))


def _block(weight: Mapping[str, Any]) -> Block:
    kind, axis = weight.get("qscheme"), weight.get("ch_axis")
    if kind == "per_tensor":
        return TENSOR
    if kind == "per_channel" and axis == 0:
        return CHANNEL
    if kind == "per_group" and axis in (1, -1, None):
        return block_of((1, weight["group_size"]))
    if kind == "per_block":
        return block_of(weight["block_size"])
    raise UnsupportedScheme(f"quark's {kind} with ch_axis {axis}", _BLOCKS)


def _scales(weight: Mapping[str, Any]) -> frozenset[str]:
    """Return the dtypes of scales.

    A config states exponents as a format of scales, or as their type.
    """
    stated = weight.get("scale_format")
    if stated not in (None, "float32", "e8m0"):
        raise UnsupportedScheme(f"quark's scales of {stated}", ["float32", "e8m0"])
    is_exponent = stated == "e8m0" or weight.get("scale_type") == "float8_e8m0fnu"
    return EXPONENT_SCALES if is_exponent else FLOAT_SCALES


QUARK = Method(
    name="quark",
    schemes=_schemes,
    codes=(*FP8_CODES, Packing("", "U8", "e2m1"), Packing("", "I8", "int8")),
    # Layers that an export restores from an FP8 checkpoint keep its name, _scale_inv.
    scales=("_scale", "_scale_inv", ".weight_quantizer.scale"),
    global_scale=("_scale_2",),
    dropped=(
        "_zero_point",  # zeros, as integers are symmetric
        ".input_scale",
        ".input_zero_point",
        ".input_scale_2",
        ".input_quantizer.scale",
        ".output_scale",
        ".output_quantizer.scale",
    ),
    refused={
        ".input_rotation": "needs its input rotated",
        ".input_prescale": "needs its input scaled",
        ".bias_scale": "has a quantized bias",
        ".bias_quantizer.scale": "has a quantized bias",
    },
)
