"""Producers of quantized tensors: transformers, compressed-tensors and torchao write them with their own code.

From a weight ``[rows, columns]`` a producer creates the stored tensors, by the suffix after the weight's name, and the
values that they decode to, exact in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Stored = dict[str, Tensor]


class Producer(NamedTuple):
    config: Mapping[str, Any]
    make: Callable[[Tensor], tuple[Stored, Tensor]]


def spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Return scales as float64, one for each element."""
    *lead, rows, columns = shape
    wide = scales.double().reshape(*lead, -(-rows // block[0]), -1)
    return wide.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]


def fine_grained(block: tuple[int, int], scale_fmt: str = "float") -> Producer:
    """Return DeepSeek-V3's format. ``Fp8Quantize`` of transformers is used if the block divides the shape."""
    config = {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3", "scale_fmt": scale_fmt}

    def make(weight: Tensor) -> tuple[Stored, Tensor]:
        from transformers.integrations.finegrained_fp8 import Fp8Quantize

        if any(size % b for size, b in zip(weight.shape, block, strict=True)):
            return block_wise(weight, block)
        settings = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
        stored = Fp8Quantize(SimpleNamespace(quantization_config=settings)).convert({"weight": weight})
        codes, scales = stored["weight"], stored["weight_scale_inv"]
        exact = codes.double() * spread(scales, block, weight.shape)
        return {"": codes, "_scale_inv": scales}, exact

    return Producer(config, make)


def block_wise(weight: Tensor, block: tuple[int, int]) -> tuple[Stored, Tensor]:
    """Quantize in blocks, the last of which are smaller: DeepSeek-V3's kv_a_proj_with_mqa has 576 rows."""
    rows, columns = weight.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(down * block[0], across * block[1])
    padded[:rows, :columns] = weight.float()
    largest = padded.reshape(down, block[0], across, block[1]).abs().amax((1, 3))
    scales = (largest / 448).clamp(min=1e-12)
    codes = (weight.double() / spread(scales, block, weight.shape)).float().to(torch.float8_e4m3fn)
    return {"": codes, "_scale_inv": scales}, codes.double() * spread(scales, block, weight.shape)


def one_scale(weight: Tensor) -> tuple[Stored, Tensor]:
    """Quantize in Mistral's format: one scale without dimensions for the whole tensor."""
    stored, exact = block_wise(weight, (weight.shape[0], weight.shape[1]))
    return stored | {"_scale_inv": stored["_scale_inv"].reshape(())}, exact


def mxfp8(weight: Tensor) -> tuple[Stored, Tensor]:
    """Quantize with torchao in MiniMax-M3's and Inkling's format: exponents in one byte, 32 codes each."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    tensor = MXTensor.to_mx(weight, torch.float8_e4m3fn, 32)
    codes, scales = tensor.qdata, tensor.scale.view(torch.uint8)
    exact = codes.double() * spread(torch.exp2(scales.double() - 127), (1, 32), weight.shape)
    return {"": codes, "_scale_inv": scales}, exact


def packed_fp4(weight: Tensor) -> tuple[Stored, Tensor]:
    """Quantize with torchao as DeepSeek-V4's experts are: two codes per I8, even columns low, e8m0 scales of 32."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    tensor = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    codes = tensor.qdata.view(torch.uint8)
    scales = tensor.scale.view(torch.uint8)
    exact = fp4_values(codes) * spread(torch.exp2(scales.double() - 127), (1, 32), weight.shape)
    return {"": codes.view(torch.int8), ".scale": scales.view(torch.float8_e8m0fnu)}, exact


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def fp4_values(codes: Tensor) -> Tensor:
    """Return the two values of each byte ``[rows, bytes]``, the low half first."""
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return FP4[nibbles.long()]


def compressed(stored_format: str, divisor: float | None = None, **weights: Any) -> Producer:
    """Return a format of compressed-tensors, compressed by its own code.

    Args:
        divisor: global scale of the weights, for formats with one.
    """
    group = {"targets": ["Linear"], "weights": weights, "format": stored_format}
    config = {"quant_method": "compressed-tensors", "format": stored_format, "config_groups": {"group_0": group}}

    def make(weight: Tensor) -> tuple[Stored, Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=stored_format)
        shape, block = weight.shape, block_of(weights, weight.shape)
        arguments: dict[str, Any] = {"weight": weight}
        low = -8 if weights["num_bits"] == 4 and weights["type"] == "int" else None
        padded = weight.float().reshape(shape[0] // block[0], block[0], shape[1] // block[1], block[1])
        largest, least = padded.amax((1, 3)), padded.amin((1, 3))
        reach = torch.maximum(largest.abs(), least.abs())
        tops = {("int", 4): 7.5, ("int", 8): 127.0, ("float", 8): 448.0, ("float", 4): 6.0}
        top = tops[weights["type"], weights["num_bits"]]
        zeros = torch.zeros_like(reach, dtype=torch.int8)
        scales = reach / top
        if not weights.get("symmetric", True):
            scales = (largest - least) / 15
            zeros = (low - least / scales).round().clamp(-8, 7).to(torch.int8)
            arguments["weight_zero_point"] = zeros
        common = torch.ones(1)
        if divisor is not None:
            common = torch.tensor([divisor])
            arguments["weight_global_scale"] = common
            scales = (scales * common).to(torch.float8_e4m3fn).float()
        if "mx" in stored_format:
            scales = torch.exp2(torch.ceil(torch.log2(scales)))
        arguments["weight_scale"] = scales.to(weight.dtype)
        stored = BaseCompressor.get_value_from_registry(stored_format).compress(arguments, scheme)
        values = values_of(stored, shape, zeros, block)
        kept = {name.removeprefix("weight"): tensor for name, tensor in stored.items()}
        exact_scales = stored["weight_scale"]
        if exact_scales.dtype == torch.uint8:
            exact_scales = torch.exp2(exact_scales.double() - 127)
        return kept, values * (spread(exact_scales, block, shape) / common.double())

    return Producer(config, make)


def block_of(weights: Mapping[str, Any], shape: torch.Size) -> tuple[int, int]:
    strategy = weights["strategy"]
    if strategy in ("group", "tensor_group"):
        return 1, weights["group_size"]
    if strategy == "block":
        return tuple(weights["block_structure"])
    return (1, shape[1]) if strategy == "channel" else (shape[0], shape[1])


def values_of(stored: Stored, shape: torch.Size, zeros: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the values of the codes, without scales."""
    if "weight" in stored:
        return stored["weight"].double()
    packed = stored["weight_packed"]
    if packed.dtype == torch.uint8:
        return fp4_values(packed)
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    return unpack_from_int32(packed, 4, shape).double() - spread(zeros, block, shape)


def modelopt(algorithm: str, make: Callable[[Tensor], tuple[Stored, Tensor]], **config: Any) -> Producer:
    """Return a format of modelopt, whose scales have the suffix ``_scale`` whatever ``make`` calls them."""

    def renamed(weight: Tensor) -> tuple[Stored, Tensor]:
        stored, exact = make(weight)
        return {suffix.replace("_scale_inv", "_scale"): part for suffix, part in stored.items()}, exact

    return Producer({"quant_method": "modelopt", "quant_algo": algorithm, **config}, renamed)


def per_channel(weight: Tensor) -> tuple[Stored, Tensor]:
    """Quantize with one scale for each row, which FP8_PER_CHANNEL_PER_TOKEN stores without a second dimension."""
    stored, exact = block_wise(weight, (1, weight.shape[1]))
    return stored | {"_scale_inv": stored["_scale_inv"].flatten()}, exact


def square_blocks(weight: Tensor) -> tuple[Stored, Tensor]:
    """Quantize in FP8_PB_WO's blocks of 128 x 128, whose scales have two more dimensions, of size 1."""
    stored, exact = block_wise(weight, (128, 128))
    return stored | {"_scale_inv": stored["_scale_inv"][:, None, :, None]}, exact


def int8_per_channel(weight: Tensor) -> tuple[Stored, Tensor]:
    """Quantize to INT8 with one scale for each row, without a second dimension, as modelopt's W8A16 does."""
    scales = weight.float().abs().amax(1) / 127
    codes = (weight.float() / scales[:, None]).round().clamp(-128, 127).to(torch.int8)
    return {"": codes, "_scale": scales}, codes.double() * scales.double()[:, None]


def modelopt_mxfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    """Quantize as DeepSeek-V4's experts are, with modelopt's names and dtypes."""
    stored, exact = packed_fp4(weight)
    return {"": stored[""].view(torch.uint8), "_scale": stored[".scale"].view(torch.uint8)}, exact


def weights_only_nvfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    """Quantize in modelopt's NVFP4 without scales of activations."""
    stored, exact = modelopt_nvfp4(weight)
    return {suffix: part for suffix, part in stored.items() if "input" not in suffix}, exact


def modelopt_nvfp4(weight: Tensor, size: int = 16) -> tuple[Stored, Tensor]:
    """Quantize in modelopt's NVFP4, whose global scale multiplies the others. A stack has one for each matrix."""
    groups = weight.double().unflatten(-1, (-1, size))
    common = (weight.double().abs().amax((-2, -1)) / (6 * 448)).float()
    scales = (groups.abs().amax(-1) / 6 / common.double()[..., None, None]).float().to(torch.float8_e4m3fn)
    factors = scales.double() * common.double()[..., None, None]
    numbers = (groups / factors[..., None]).nan_to_num(0).flatten(-2)
    nearest = torch.bucketize(numbers.abs(), (FP4[:7] + FP4[1:8]) / 2).add(8 * (numbers < 0)).to(torch.uint8)
    codes = nearest[..., 0::2] | nearest[..., 1::2] << 4
    exact = FP4[nearest.long()] * factors.repeat_interleave(size, -1)
    return {"": codes, "_scale": scales, "_scale_2": common, ".input_scale": torch.ones(())}, exact


def int4_by_input(weight: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize in groups of input features, the first in its own group, as GPTQ and AWQ do.

    Returns:
        Codes ``[in, out]``, zero points and scales ``[groups, out]``, and values ``[out, in]``.
    """
    columns = weight.double().t()
    groups = [columns[start : start + group] for start in range(0, len(columns), group)]
    largest, least = torch.stack([part.amax(0) for part in groups]), torch.stack([(-part).amax(0) for part in groups])
    scales = ((largest.abs().maximum(least.abs()) / 7) if symmetric else (largest + least) / 15).half()
    zeros = torch.full(scales.shape, 8) if symmetric else (least / scales).round().clamp(0, 15).int()
    of_row = torch.arange(len(columns)) // group
    codes = ((columns / scales[of_row]).round() + zeros[of_row]).clamp(0, 15).int()
    values = (codes - zeros[of_row]) * scales[of_row].double()
    return codes, zeros.int(), scales, values.t()


def in_words(codes: Tensor, order: Sequence[int] = range(8)) -> Tensor:
    """Return I32 ``[rows, n / 8]`` of codes ``[rows, n]``: nibble ``k`` is column ``order[k]`` of eight."""
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(order):
        words |= codes[:, column::8].long() << 4 * nibble
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def gptq(group_size: int, version: str = "gptq", symmetric: bool = True) -> Producer:
    """Return GPTQ's format: words along the input features, zero points less one in version 1."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, "sym": symmetric}

    def make(weight: Tensor) -> tuple[Stored, Tensor]:
        group = weight.shape[1] if group_size == -1 else group_size
        codes, zeros, scales, exact = int4_by_input(weight, group, symmetric)
        packed_zeros = in_words(zeros) - (0x11111111 if version == "gptq" else 0)
        groups = torch.arange(weight.shape[1], dtype=torch.int32) // group
        stored = {".qweight": in_words(codes.t()).t(), ".qzeros": packed_zeros, ".scales": scales, ".g_idx": groups}
        return stored, exact

    return Producer(config | {"checkpoint_format": version}, make)


def awq(group_size: int, **more: Any) -> Producer:
    """Return AutoAWQ's format: words along the output features, in the order of its ``packing_utils.AWQ_ORDER``."""
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def make(weight: Tensor) -> tuple[Stored, Tensor]:
        group = weight.shape[1] if group_size == -1 else group_size
        codes, zeros, scales, exact = int4_by_input(weight, group, symmetric=False)
        return {".qweight": in_words(codes, order), ".qzeros": in_words(zeros, order), ".scales": scales}, exact

    return Producer(config | more, make)


INT4 = {"num_bits": 4, "type": "int"}
INT8 = {"num_bits": 8, "type": "int"}
FLOAT8 = {"num_bits": 8, "type": "float"}
FLOAT4 = {"num_bits": 4, "type": "float"}
PRODUCERS: dict[str, Producer] = {
    "fp8 128x128": fine_grained((128, 128)),
    "fp8 32x16": fine_grained((32, 16)),
    "fp8 ue8m0": fine_grained((32, 32), "ue8m0"),
    "fp8 per tensor": Producer({"quant_method": "fp8", "weight_block_size": None}, one_scale),
    "mxfp8": Producer({"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, mxfp8),
    "fp4 experts": Producer({"quant_method": "fp8", "weight_block_size": [128, 128]}, packed_fp4),
    "int4 g32": compressed("pack-quantized", **INT4, strategy="group", group_size=32),
    "int4 g32 with zero points": compressed("pack-quantized", **INT4, strategy="group", group_size=32, symmetric=False),
    "int4 per channel": compressed("pack-quantized", **INT4, strategy="channel"),
    "int8 per channel": compressed("int-quantized", **INT8, strategy="channel"),
    "int8 per tensor": compressed("naive-quantized", **INT8, strategy="tensor"),
    "fp8 per channel": compressed("float-quantized", **FLOAT8, strategy="channel"),
    "fp8 blocks of compressed-tensors": compressed(
        "float-quantized", **FLOAT8, strategy="block", block_structure=[32, 32]
    ),
    "mxfp8 of compressed-tensors": compressed(
        "mxfp8-quantized", **FLOAT8, strategy="group", group_size=32, scale_dtype="torch.uint8"
    ),
    "gptq": gptq(32),
    "gptq v2": gptq(16, "gptq_v2", symmetric=False),
    "gptq v1 with zero points": gptq(32, symmetric=False),
    "gptq per channel": gptq(-1),
    "awq": awq(32),
    "awq per channel": awq(-1),
    "nvfp4": compressed("nvfp4-pack-quantized", 700.0, **FLOAT4, strategy="tensor_group", group_size=16),
    "fp8 of modelopt": modelopt("FP8", one_scale),
    "fp8 per channel of modelopt": modelopt("FP8_PER_CHANNEL_PER_TOKEN", per_channel),
    "fp8 blocks of modelopt": modelopt("fp8_pb_wo", square_blocks),
    "fp8 blocks under their other name": modelopt("FP8_BLOCK_SCALES", square_blocks),
    "mxfp8 of modelopt": modelopt("MXFP8", mxfp8),
    "nvfp4 of modelopt": modelopt("NVFP4", modelopt_nvfp4, group_size=16),
    "nvfp4 of modelopt, weights only": modelopt("W4A16_NVFP4", weights_only_nvfp4, group_size=16),
    "int8 of modelopt": modelopt("W8A16", int8_per_channel),
    "mxfp4 of modelopt": modelopt("W4A8_MXFP4_FP8", modelopt_mxfp4, group_size=32),
    "mxfp4 of compressed-tensors": compressed(
        "mxfp4-pack-quantized", **FLOAT4, strategy="group", group_size=32, scale_dtype="torch.uint8"
    ),
}
