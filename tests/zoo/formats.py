"""The published formats of quantized weights: how each stores a matrix, who publishes it, and what its config says.

A format writes random codes and scales of a matrix, so that every code occurs, and returns the values that they mean
in float64. The sources of each format are in its function. No code of the package takes part.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.quantized.producers import FLOAT4, FLOAT8, INT4, Producer, compressed, fp4_values, spread

Stored = dict[str, Tensor]
"""Tensors by the suffix after the name of the weight. A suffix with a dot in front replaces ``.weight``; one
with ``../`` is next to the module."""
Shape = tuple[int, ...]
Make = Callable[[Shape, torch.Generator], tuple[Stored, Tensor]]


@dataclass(frozen=True)
class Format:
    """One way in which weights are published."""

    make: Make
    """Returns the tensors that store a weight of a shape, and its values."""
    settings: Mapping[str, Any]
    """A ``quantization_config`` of a checkpoint in which all weights have this format."""


def generator_of(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def fp8_codes(shape: Shape, random: torch.Generator) -> Tensor:
    """Return e4m3 codes of any value but the two NaNs."""
    codes = torch.randint(254, shape, dtype=torch.int64, generator=random)
    return (codes + codes.ge(127)).to(torch.uint8).view(torch.float8_e4m3fn)


def fp4_codes(shape: Shape, random: torch.Generator) -> Tensor:
    """Return bytes of two e2m1 codes each."""
    return torch.randint(256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=random)


def float_scales(shape: Shape, random: torch.Generator) -> Tensor:
    """Return positive float32 scales that bfloat16 could not hold."""
    exponents = torch.randint(-12, -4, shape, generator=random)
    return torch.ldexp(1 + torch.rand(shape, generator=random), exponents)


def exponents(shape: Shape, random: torch.Generator) -> Tensor:
    """Return scales that are powers of two, as exponents in one byte each."""
    return torch.randint(110, 130, shape, dtype=torch.uint8, generator=random)


def powers(stored: Tensor) -> Tensor:
    return torch.exp2(stored.double() - 127)


def grid(shape: Shape, block: tuple[int, int]) -> Shape:
    return *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def fine_grained(block: tuple[int, int], suffix: str = "_scale_inv", scale_dtype: torch.dtype = torch.float32) -> Make:
    """Return DeepSeek-V3's format: FP8, one scale per block, the last blocks smaller.

    Sources: transformers 5.24.0, ``integrations/finegrained_fp8.py``; the files of DeepSeek-V3.2, whose float32 scales
    are powers of two, and of DeepSeek-V4, whose scales are ``.scale`` in e8m0.
    """

    def make(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
        codes = fp8_codes(shape, random)
        if scale_dtype == torch.float32:
            stored = float_scales(grid(shape, block), random)
            wide = stored.double()
        else:
            stored = exponents(grid(shape, block), random)
            wide = powers(stored)
            stored = stored.view(scale_dtype)
        return {"": codes, suffix: stored}, codes.double() * spread(wide, block, torch.Size(shape))

    return make


def int8(scale_dtype: torch.dtype, dims: int) -> Make:
    """INT8, one scale per row: ``[rows, 1]`` of compressed-tensors, ``[rows]`` of modelopt and Quark."""

    def make(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
        codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=random)
        scales = float_scales((shape[0], 1), random).to(scale_dtype)
        return {"": codes, "_scale": scales if dims == 2 else scales[:, 0]}, codes.double() * scales.double()

    return make


def fp8_shards(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
    """Return a shard of Qwen3.8-Flash-Next's n-gram embedding: FP8, and a bfloat16 scale that all shards share.

    Source: vllm#55040.
    """
    codes, scale = fp8_codes(shape, random), torch.tensor(0.000199, dtype=torch.bfloat16)
    return {"": codes, "../weight_scale": scale}, codes.double() * scale.double()


def per_channel(suffix: str, dims: int = 2) -> Make:
    """FP8, one float32 scale per row: llm-compressor's, fbgemm's and modelopt's FP8_PER_CHANNEL_PER_TOKEN."""

    def make(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
        codes = fp8_codes(shape, random)
        scales = float_scales((shape[0],), random)
        exact = codes.double() * scales.double()[:, None]
        return {"": codes, suffix: scales[:, None] if dims == 2 else scales}, exact

    return make


def per_matrix(scale_suffix: str, input_suffix: str) -> Make:
    """FP8, one float32 scale without dimensions for a matrix, and that of the activations.

    Sources: Mistral's files and transformers 5.24.0, ``integrations/finegrained_fp8.py``; NVIDIA Model Optimizer 0.47,
    ``torch/export/quant_utils.py``, ``to_quantized_weight``; amd-quark 0.13, ``torch/export``.
    """

    def make(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
        codes, scale = fp8_codes(shape, random), float_scales((), random)
        exact = codes.double() * scale.double()
        return {"": codes, scale_suffix: scale, input_suffix: float_scales((), random)}, exact

    return make


def modelopt_blocks(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
    """Return modelopt's FP8_PB_WO: scales ``[rows of blocks, 1, columns of blocks, 1]``.

    Source: NVIDIA Model Optimizer 0.47, ``torch/export/quant_utils.py``; TensorRT-LLM#17433.
    """
    stored, exact = fine_grained((128, 128), "_scale")(shape, random)
    return stored | {"_scale": stored["_scale"][:, None, :, None].contiguous()}, exact


def mxfp8(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
    """Return MXFP8: exponents as U8, one per 32 codes of a row.

    Sources: NVIDIA Model Optimizer 0.47; compressed-tensors 0.20.1, ``compressors/mxfp8``.
    """
    codes, scales = fp8_codes(shape, random), exponents(grid(shape, (1, 32)), random)
    return {"": codes, "_scale": scales}, codes.double() * spread(powers(scales), (1, 32), torch.Size(shape))


def nvfp4(with_input: bool = True) -> Make:
    """Return modelopt's NVFP4: FP8 scales of 16 codes, and one float32 factor of them all.

    Source: NVIDIA Model Optimizer 0.47, ``torch/quantization/qtensor/nvfp4_tensor.py``.
    """

    def make(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
        codes, factor = fp4_codes(shape, random), float_scales((), random)
        scales = fp8_codes(grid(shape, (1, 16)), random).float().abs().to(torch.float8_e4m3fn)
        exact = fp4_values(codes) * spread(scales.double() * factor.double(), (1, 16), torch.Size(shape))
        stored = {"": codes, "_scale": scales, "_scale_2": factor}
        return stored | ({".input_scale": float_scales((), random)} if with_input else {}), exact

    return make


def mxfp4(scale_suffix: str, code_dtype: torch.dtype, scale_dtype: torch.dtype, code_suffix: str = "") -> Make:
    """Return MXFP4: exponents of 32 codes, two codes in a byte, the first one low.

    Sources: OCP Microscaling Formats 1.0; the files of DeepSeek-V4 (I8 and ``.scale`` in e8m0); amd-quark 0.13,
    ``torch/utils/pack.py`` (U8); compressed-tensors 0.20.1, ``compressors/mxfp4`` (``weight_packed``, U8).
    """

    def make(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
        codes, scales = fp4_codes(shape, random), exponents(grid(shape, (1, 32)), random)
        exact = fp4_values(codes) * spread(powers(scales), (1, 32), torch.Size(shape))
        return {code_suffix: codes.view(code_dtype), scale_suffix: scales.view(scale_dtype)}, exact

    return make


def gpt_oss_mxfp4(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
    """Return gpt-oss's MXFP4 of a weight ``[experts, columns, rows]``: blocks of 16 bytes of its transpose.

    Source: transformers 5.24.0, ``integrations/mxfp4.py``; the files of gpt-oss.
    """
    experts, columns, rows = shape
    blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=random)
    scales = exponents(blocks.shape[:-1], random)
    values = fp4_values(blocks.flatten(0, 2)).reshape(experts, rows, columns // 32, 32) * powers(scales)[..., None]
    return {"_blocks": blocks, "_scales": scales}, values.reshape(experts, rows, columns).transpose(1, 2)


def llama4_nvfp4(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
    """Return modelopt's NVFP4 of Llama-4's fused experts ``[experts, in, out]``: two codes of one column in a byte.

    Source: NVIDIA Model Optimizer 0.47, ``torch/export/quant_utils.py``; vllm#21499.
    """
    experts, rows, columns = shape
    codes = torch.randint(256, (experts, rows // 2, columns), dtype=torch.uint8, generator=random)
    scales = fp8_codes((experts, rows // 16, columns), random).float().abs().to(torch.float8_e4m3fn)
    factor = float_scales((), random)
    values = fp4_values(codes.transpose(1, 2).contiguous().flatten(0, 1)).reshape(experts, columns, rows)
    exact = values.transpose(1, 2) * scales.double().repeat_interleave(16, 1) * factor.double()
    parts = {"_weight_scale": scales, "_weight_scale_2": factor, "_input_scale": float_scales((), random)}
    return {"": codes, **parts}, exact


def inkling2_loop_nvfp4(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
    """Return Inkling2Loop's NVFP4 of a stack ``[E, rows, columns]``: FP8 scales of 16 codes, a quotient per expert.

    Quotients have so few bits that no product of transformers, in float32, is rounded. Source: transformers 5.24.0,
    ``Inkling2LoopDequantizeExperts`` in ``core_model_loading.py``.
    """
    experts, rows, columns = shape
    codes = fp4_codes(shape, random)
    scales = fp8_codes((experts, rows, columns // 16), random).float().abs().to(torch.float8_e4m3fn)
    amax = torch.randint(128, 256, (experts,), generator=random).float()
    parts = {"_scale": scales, "_amax": amax, "_outer_scale_denominator": torch.full((experts,), 4096.0)}
    blocks = fp4_values(codes.flatten(0, 1)).reshape(experts, rows, columns // 16, 16) * scales.double()[..., None]
    return {"": codes, **parts}, (blocks * (amax / 4096.0).double()[:, None, None, None]).reshape(shape)


def inkling2_loop_mxfp8(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
    """Return Inkling2Loop's MXFP8 of a stack: exponents of 32 codes. Source: as ``inkling2_loop_nvfp4``."""
    codes = fp8_codes(shape, random)
    scales = exponents((*shape[:2], shape[2] // 32), random)
    return {"": codes, "_scale": scales}, codes.double() * powers(scales).repeat_interleave(32, -1)


def unpacked_nibbles(words: Tensor) -> Tensor:
    """Return the eight numbers of each 32-bit word, the lowest bits first, in a new last dimension."""
    return torch.stack([(words >> (4 * place)) & 15 for place in range(8)], -1)


def _words(shape: Shape, random: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=random).to(torch.int32)


def gptq(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
    """Return GPTQ of 4 bits and groups of 128, in the order of the columns; zero points are stored less 1.

    Sources: gptqmodel 5.4, ``nn_modules/qlinear/torch.py`` and ``convert_gptq_v1_to_v2_format_module``.
    """
    out, columns = shape
    words, zeros = _words((columns // 8, out), random), _words((columns // 128, out // 8), random)
    scales = float_scales((columns // 128, out), random).half()
    codes = unpacked_nibbles(words).transpose(1, 2).reshape(columns, out)  # nibble k of row r is input 8 r + k
    points = unpacked_nibbles(zeros + 0x11111111).reshape(columns // 128, out)  # one addition for all eight
    groups = torch.arange(columns) // 128
    exact = (codes - points[groups]).double() * scales.double()[groups]
    parts = {".qweight": words, ".qzeros": zeros, ".scales": scales, ".g_idx": groups.to(torch.int32)}
    return parts, exact.T


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
    """Return AWQ of 4 bits and groups of 128, "gemm": outputs are in the order 0, 2, 4, 6, 1, 3, 5, 7 in a word.

    Source: autoawq 0.2.9, ``awq/utils/packing_utils.py``, ``awq/modules/linear/gemm.py``.
    """
    out, columns = shape
    words, zeros = _words((columns, out // 8), random), _words((columns // 128, out // 8), random)
    scales = float_scales((columns // 128, out), random).half()

    def ordered(packed: Tensor) -> Tensor:
        numbers = torch.empty(*packed.shape, 8, dtype=torch.int64)
        numbers[..., AWQ_ORDER] = unpacked_nibbles(packed).long()
        return numbers.flatten(-2)

    groups = torch.arange(columns) // 128
    exact = (ordered(words) - ordered(zeros)[groups]).double() * scales.double()[groups]
    return {".qweight": words, ".qzeros": zeros, ".scales": scales}, exact.T


def by(producer: Producer) -> Make:
    """Return a format that compressed-tensors itself writes, of random weights."""

    def make(shape: Shape, random: torch.Generator) -> tuple[Stored, Tensor]:
        return producer.make(torch.randn(shape, generator=random).bfloat16())

    return make


def _compressed(stored_format: str, divisor: float | None = None, **weights: Any) -> Format:
    producer = compressed(stored_format, divisor, **weights)
    settings = {"quantization_status": "compressed", "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"]}
    return Format(by(producer), dict(producer.config) | settings)


def _compressed_int8() -> Format:
    """Source: compressed-tensors 0.20.1, ``compressors/naive_quantized`` (int-quantized)."""
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    return Format(
        int8(torch.bfloat16, 2),
        settings | {"quantization_status": "compressed", "ignore": ["lm_head", "re:.*self_attn.*"]},
    )


def _modelopt(algorithm: str, **settings: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, **settings}


def _quark(**weight: Any) -> dict[str, Any]:
    """Source: amd-quark 0.13, ``torch/quantization/config/config.py`` and ``torch/export``."""
    described = {"is_dynamic": False, "symmetric": True, "ch_axis": -1, "observer_cls": "PerBlockMXObserver", **weight}
    export = {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"}
    whole = {"weight": described, "input_tensors": None, "output_tensors": None, "bias": None}
    return {"quant_method": "quark", "global_quant_config": whole, "exclude": [], "export": export}


def _quark_nvfp4() -> dict[str, Any]:
    """Source: as ``_quark``; the weights' description is a list, the scales' own description second."""
    codes = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "ch_axis": -1, "is_dynamic": False}
    scales = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "is_scale_quant": True}
    settings = _quark()
    settings["global_quant_config"]["weight"] = [codes, scales]
    return settings


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
_E8M0 = torch.float8_e8m0fnu
_MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}

FORMATS: dict[str, Format] = {
    "FP8, one scale per block": Format(fine_grained((128, 128)), _FP8),
    "FP8, one scale per matrix": Format(
        per_matrix("_scale_inv", ".activation_scale"),
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    ),
    "FP8, exponents per block": Format(fine_grained((128, 128), ".scale", _E8M0), _FP8 | {"scale_fmt": "ue8m0"}),
    "FP8, exponents per 32 x 32": Format(
        fine_grained((32, 32), ".scale", _E8M0), _FP8 | {"scale_fmt": "ue8m0", "weight_block_size": [32, 32]}
    ),
    "FP8 shards with one scale": Format(fp8_shards, _FP8),
    "FP4 experts of DeepSeek": Format(mxfp4(".scale", torch.int8, _E8M0), _FP8 | {"scale_fmt": "ue8m0"}),
    "MXFP4 of gpt-oss": Format(gpt_oss_mxfp4, {"quant_method": "mxfp4"}),
    "compressed-tensors INT4": _compressed("pack-quantized", **INT4, strategy="group", group_size=32),
    "compressed-tensors INT4 with zero points": _compressed(
        "pack-quantized", **INT4, strategy="group", group_size=32, symmetric=False
    ),
    "compressed-tensors INT4 per channel": _compressed("pack-quantized", **INT4, strategy="channel"),
    "compressed-tensors FP8": _compressed("float-quantized", **FLOAT8, strategy="channel"),
    "compressed-tensors FP8, one scale per matrix": _compressed("float-quantized", **FLOAT8, strategy="tensor"),
    "compressed-tensors FP8, one scale per block": _compressed(
        "float-quantized", **FLOAT8, strategy="block", block_structure=[128, 128]
    ),
    "compressed-tensors MXFP8": Format(mxfp8, _compressed("mxfp8-quantized", **FLOAT8, **_MX).settings),
    "compressed-tensors NVFP4": _compressed(
        "nvfp4-pack-quantized", 700.0, **FLOAT4, strategy="tensor_group", group_size=16
    ),
    "compressed-tensors MXFP4": Format(
        mxfp4("_scale", torch.uint8, torch.uint8, "_packed"),
        _compressed("mxfp4-pack-quantized", **FLOAT4, **_MX).settings,
    ),
    "compressed-tensors INT8": _compressed_int8(),
    "fbgemm_fp8": Format(per_channel("_scale"), {"quant_method": "fbgemm_fp8"}),
    "ModelOpt FP8": Format(per_matrix("_scale", ".input_scale"), _modelopt("FP8")),
    "ModelOpt FP8 per channel": Format(per_channel("_scale", dims=1), _modelopt("FP8_PER_CHANNEL_PER_TOKEN")),
    "ModelOpt FP8_PB_WO": Format(modelopt_blocks, _modelopt("FP8_PB_WO")),
    "ModelOpt MXFP8": Format(mxfp8, _modelopt("MXFP8")),
    "ModelOpt NVFP4": Format(nvfp4(), _modelopt("NVFP4", group_size=16)),
    "ModelOpt W4A16_NVFP4": Format(nvfp4(False), _modelopt("W4A16_NVFP4", group_size=16)),
    "ModelOpt NVFP4 of Llama-4": Format(llama4_nvfp4, _modelopt("NVFP4", group_size=16)),
    "ModelOpt MXFP4": Format(mxfp4("_scale", torch.uint8, torch.uint8), _modelopt("W4A8_MXFP4_FP8")),
    "ModelOpt W8A16": Format(int8(torch.float32, 1), _modelopt("W8A16")),
    "Inkling2Loop NVFP4": Format(inkling2_loop_nvfp4, {}),
    "Inkling2Loop MXFP8": Format(inkling2_loop_mxfp8, {}),
    "Quark MXFP4": Format(
        mxfp4("_scale", torch.uint8, torch.uint8),
        _quark(dtype="fp4", qscheme="per_group", group_size=32, scale_format="e8m0", scale_type="float8_e8m0fnu"),
    ),
    "Quark FP8, one scale per block": Format(
        fine_grained((128, 128), "_scale"),
        _quark(dtype="fp8_e4m3", qscheme="per_block", block_size=[128, 128], scale_type="float32"),
    ),
    "Quark NVFP4": Format(nvfp4(), _quark_nvfp4()),
    "Quark FP8, one scale per matrix": Format(
        per_matrix("_scale", ".input_scale"), _quark(dtype="fp8_e4m3", qscheme="per_tensor", scale_type="float32")
    ),
    "Quark FP8, one scale per row": Format(
        per_channel("_scale", dims=1),
        _quark(dtype="fp8_e4m3", qscheme="per_channel", ch_axis=0, scale_type="float32"),
    ),
    "Quark INT8": Format(int8(torch.float32, 1), _quark(dtype="int8", qscheme="per_channel", ch_axis=0)),
    "GPTQ": Format(gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}),
    "AWQ": Format(awq, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}),
}
