"""Weights as AMD Quark stores them, without its package.

amd-quark 0.13 needs packages that the environment does not have. The names, dtypes, shapes and configs here are those
that its ``export_safetensors`` wrote for a small Llama, and its ``get_real_quantizer`` decoded those files to the same
values (NVFP4 to one unit in the last place, as Quark rounds the product of both scales to float32).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.quantized.producers import Producer, Stored, block_wise, fp4_values, packed_fp4, spread


def config(weight: Any, **other: Any) -> dict[str, Any]:
    """Return a config in which all layers have weights as described."""
    layer = {"weight": weight, "bias": None, "input_tensors": None, "output_tensors": None, "target_device": None}
    return {
        "quant_method": "quark",
        "global_quant_config": layer,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        **other,
    }


def weight(dtype: str, qscheme: str, **other: Any) -> dict[str, Any]:
    """Return the description of weights, with all the fields of ``QTensorConfig`` that matter here."""
    fields = {"is_dynamic": False, "ch_axis": None, "group_size": None, "block_size": None, "symmetric": True}
    fields |= {"scale_format": None, "scale_type": "float", "is_scale_quant": False}
    return {"dtype": dtype, "qscheme": qscheme, **fields, **other}


MXFP4 = weight("fp4", "per_group", ch_axis=-1, group_size=32, scale_format="e8m0", symmetric=None)
PER_TENSOR = weight("fp8_e4m3", "per_tensor")
INT8 = weight("int8", "per_tensor")
PER_CHANNEL = weight("fp8_e4m3", "per_channel", ch_axis=0)
PER_BLOCK = weight("fp8_e4m3", "per_block", block_size=[16, 32], scale_type="float32")
MXFP8 = weight("fp8_e4m3", "per_group", ch_axis=-1, group_size=32, scale_format="e8m0")
MXFP8_BLOCKS = weight("fp8_e4m3", "per_block", block_size=[32, 32], scale_type="float8_e8m0fnu")
NVFP4 = [
    weight("fp4", "per_group", ch_axis=-1, group_size=16, scale_format="float32"),
    weight("fp8_e4m3", "per_tensor", is_scale_quant=True),
]


def mxfp4(matrix: Tensor) -> tuple[Stored, Tensor]:
    """Store codes and exponents as bytes."""
    stored, exact = packed_fp4(matrix)
    return {"": stored[""].view(torch.uint8), "_scale": stored[".scale"].view(torch.uint8)}, exact


def mxfp4_of_quantizers(matrix: Tensor) -> tuple[Stored, Tensor]:
    """Name the scale after the module of Quark that holds it, as amd/Qwen3-VL-235B-A22B-Instruct-MXFP4 does."""
    stored, exact = mxfp4(matrix)
    scale = {".weight_quantizer.scale": stored["_scale"], ".input_quantizer.scale": torch.tensor(0.5)}
    return {"": stored[""], **scale}, exact


def per_tensor(matrix: Tensor) -> tuple[Stored, Tensor]:
    """Store one bfloat16 scale without dimensions, and a static scale of activations."""
    scale = (matrix.float().abs().max() / 448).to(torch.bfloat16)
    codes = (matrix.float() / scale.float()).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale, ".input_scale": torch.tensor(0.25)}, codes.double() * scale.double()


def int8(matrix: Tensor) -> tuple[Stored, Tensor]:
    """Store one float32 scale and zero points of zero, as Quark does although its integers are symmetric."""
    scale = matrix.float().abs().max() / 127
    codes = (matrix.float() / scale).round().to(torch.int8)
    zero = torch.zeros((), dtype=torch.int8)
    parts = {"": codes, "_scale": scale, "_zero_point": zero, ".input_scale": scale * 2, ".input_zero_point": zero + 1}
    return parts, codes.double() * scale.double()


def per_channel(matrix: Tensor) -> tuple[Stored, Tensor]:
    """Store one float32 scale for each row, in one dimension."""
    stored, exact = block_wise(matrix, (1, matrix.shape[1]))
    return {"": stored[""], "_scale": stored["_scale_inv"].flatten()}, exact


def per_block(matrix: Tensor) -> tuple[Stored, Tensor]:
    """Store float32 scales of blocks."""
    stored, exact = block_wise(matrix, (16, 32))
    return {"": stored[""], "_scale": stored["_scale_inv"]}, exact


def exponents(rows: int, dtype: torch.dtype) -> Any:
    """Return a function that stores FP8 codes under an exponent for each ``rows`` x 32 block."""

    def make(matrix: Tensor) -> tuple[Stored, Tensor]:
        scales = block_wise(matrix, (rows, 32))[0]["_scale_inv"]
        powers = torch.exp2(torch.ceil(torch.log2(scales)))
        codes = (matrix.double() / spread(powers, (rows, 32), matrix.shape)).float().to(torch.float8_e4m3fn)
        stored = (torch.log2(powers) + 127).to(torch.uint8).view(dtype)
        return {"": codes, "_scale": stored}, codes.double() * spread(powers, (rows, 32), matrix.shape)

    return make


def nvfp4(matrix: Tensor) -> tuple[Stored, Tensor]:
    """Store FP8 scales of 16 codes and a float32 scale that multiplies them."""
    rows, columns = matrix.shape
    groups = matrix.float().reshape(rows, columns // 16, 16).abs().amax(-1) / 6
    common = groups.max() / 448
    scales = (groups / common).to(torch.float8_e4m3fn)
    generator = torch.Generator().manual_seed(math.prod(matrix.shape))
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    exact = fp4_values(codes) * (spread(scales, (1, 16), matrix.shape) * common.double())
    return {"": codes, "_scale": scales, "_scale_2": common, ".input_scale_2": torch.tensor(0.5)}, exact


QUARK = {
    "mxfp4": Producer(config(MXFP4), mxfp4),
    "mxfp4, scales named after quantizers": Producer(config(MXFP4), mxfp4_of_quantizers),
    "fp8 per tensor": Producer(config(PER_TENSOR), per_tensor),
    "fp8 per channel": Producer(config(PER_CHANNEL), per_channel),
    "fp8 per block": Producer(config(PER_BLOCK), per_block),
    "mxfp8": Producer(config(MXFP8), exponents(1, torch.uint8)),
    "mxfp8 in blocks": Producer(config(MXFP8_BLOCKS), exponents(32, torch.float8_e8m0fnu)),
    "nvfp4": Producer(config(NVFP4), nvfp4),
    "int8": Producer(config(INT8), int8),
    "mxfp4 in a list of one": Producer(config([MXFP4]), mxfp4),
}
