"""The method of NVIDIA Model Optimizer: FP8, MXFP8, NVFP4, MXFP4 or INT8, the same for all weights or one per module.

Sources: NVIDIA Model Optimizer 0.47: ``torch/export/quant_utils.py`` (``process_layer_quant_config`` for the names of
algorithms, ``to_quantized_weight`` for codes and scales, ``postprocess_state_dict`` for the names of tensors) and
``convert_hf_config.py``; vLLM 0.33.0, ``ModelOptQuantConfigBase.from_config`` and ``ModelOptMixedPrecisionConfig`` in
``model_executor/layers/quantization/modelopt.py``; the files of DeepSeek-V3.1-NVFP4, MiniMax-M3-NVFP4 and others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from automodel_conv.planning.arrangement import rows_in_words
from automodel_conv.planning.methods.method import (
    ANY_MODULE,
    CHANNEL,
    EXPONENT_SCALES,
    FLOAT_SCALES,
    FP8_CODES,
    FP8_SCALES,
    TENSOR,
    Method,
    Packing,
    Scheme,
    UnsupportedScheme,
    block_of,
    modules_of,
)

MIXED = "MIXED_PRECISION"


def _fp8_blocks(size: Any) -> list[Scheme]:
    return [Scheme("e4m3", block_of((size or 128, size or 128)), FLOAT_SCALES)]


def _nvfp4(size: Any) -> list[Scheme]:
    """Return the schemes of NVFP4: with groups of columns, or of rows in a stack of transposed weights.

    modelopt transposes the experts of Llama 4 and gpt-oss, [E, in, out], quantizes groups of inputs, and transposes
    codes and scales back. A byte then holds two rows of a column.
    """
    size = size or 16
    by_columns = Scheme("e2m1", block_of((1, size)), FP8_SCALES, global_scale=True)
    if size % 2:
        return [by_columns]
    return [by_columns, by_columns._replace(block=(size // 2, 2), stack_arrangement=rows_in_words(2))]


def _mxfp4(size: Any) -> list[Scheme]:
    return [Scheme("e2m1", block_of((1, size or 32)), EXPONENT_SCALES)]


# Functions from a group size, which may be 0 or None, to the schemes of an algorithm.
_ALGORITHMS: dict[str, Callable[[Any], list[Scheme]]] = {
    "FP8": lambda size: [Scheme("e4m3", TENSOR, FLOAT_SCALES)],
    # A stack of experts may have one scale for each expert.
    "FP8_PER_CHANNEL_PER_TOKEN": lambda size: [Scheme("e4m3", block, FLOAT_SCALES) for block in (CHANNEL, TENSOR)],
    "FP8_PB_WO": _fp8_blocks,
    "FP8_PB_REAL": _fp8_blocks,
    "FP8_BLOCK_SCALES": _fp8_blocks,  # vLLM's alias, from early files of Qwen3.8-Flash-Next
    "MXFP8": lambda size: [Scheme("e4m3", block_of((1, size or 32)), EXPONENT_SCALES)],
    "NVFP4": _nvfp4,
    "W4A16_NVFP4": _nvfp4,
    "W4A8_NVFP4_FP8": _nvfp4,
    "MXFP4": _mxfp4,
    "W4A8_MXFP4_FP8": _mxfp4,
    "W8A16": lambda size: [Scheme("int8", CHANNEL, FLOAT_SCALES)],
}

_SMOOTHED = "multiplies inputs by a pre_quant_scale, so that the stored weights are not those of the model"
_REFUSED = {
    "NVFP4_AWQ": _SMOOTHED,
    "W4A8_AWQ": _SMOOTHED,
    "W4A16_AWQ": _SMOOTHED,
    "NVFP4_SVD": f"{_SMOOTHED}, and adds a low-rank residual",
    "W8A8_SQ_PER_CHANNEL": _SMOOTHED,
}


def modelopt_schemes(config: Mapping[str, Any]) -> list[Scheme]:
    """Return the schemes that modelopt's part of a config allows; see ``Method.schemes``."""
    stated = config.get("quantization") or config  # the form of hf_quant_config.json
    algorithm = stated.get("quant_algo")
    if algorithm is None and any(stated.get(key) is not None for key in ("kv_cache_scheme", "kv_cache_quant_algo")):
        return []
    algorithm = str(algorithm).upper()
    if algorithm != MIXED:
        return _schemes_of(algorithm, stated.get("group_size"))
    modules: dict[tuple[str, Any], list[str]] = {}
    for module, layer in (stated.get("quantized_layers") or {}).items():
        modules.setdefault((str(layer["quant_algo"]).upper(), layer.get("group_size")), []).append(module)
    if not modules:  # only the tensors determine which algorithm each has
        return [scheme for name in _ALGORITHMS for scheme in _schemes_of(name, None)]
    return [scheme for (name, size), names in modules.items() for scheme in _schemes_of(name, size, names)]


def _schemes_of(algorithm: str, group_size: Any, names: Iterable[str] = ()) -> list[Scheme]:
    if algorithm in _REFUSED:
        raise UnsupportedScheme(f"modelopt's {algorithm}, which {_REFUSED[algorithm]}", sorted([*_ALGORITHMS, MIXED]))
    if algorithm not in _ALGORITHMS:
        raise UnsupportedScheme(f"modelopt's {algorithm}", sorted([*_ALGORITHMS, MIXED]))
    modules = modules_of(names) if names else ANY_MODULE
    return [scheme._replace(modules=modules) for scheme in _ALGORITHMS[algorithm](group_size)]


MODELOPT = Method(
    name="modelopt",
    aliases=("modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"),  # names of vLLM
    schemes=modelopt_schemes,
    codes=(*FP8_CODES, Packing("", "U8", "e2m1"), Packing("", "I8", "int8")),
    scales=("_scale", "_scale_inv", "_weight_scale"),  # experts.gate_up_proj has the last, FP8_BLOCK_SCALES the second
    global_scale=("_scale_2", "_weight_scale_2"),
    dropped=(".input_scale", "_input_scale"),
    refused={
        ".pre_quant_scale": "is not the weight of the model, because its inputs are multiplied by a scale",
        ".svdquant_lora_a": "has a low-rank residual",
    },
)
