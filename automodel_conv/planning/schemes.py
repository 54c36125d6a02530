"""What a config says of quantization: by which method, under which names, and in which schemes.

Sources: transformers 5.23.0, ``utils/quantization_config.py``; compressed-tensors 0.20.0, ``compressors/*/base.py`` and
``quantization/quant_args.py``; the files of DeepSeek-V3, DeepSeek-V4, gpt-oss and Kimi-K2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from automodel_conv.errors import QuantizationError, UnsupportedError, message

_KEEPS = "keeps codes and scales as they are"
KEEP = (
    "leave {carry} out, or carry from a checkpoint that is not quantized",
    f"{{dequantize=False}} {_KEEPS}, for a {{model}} that has both or with {{rules=[]}}",
    f"{{dequantize=False}} with {{rules=[]}} {_KEEPS}",
    f"{{dequantize=False}} {_KEEPS}",
    f"{{rules=[]}} without {{dequantize=True}} {_KEEPS}",
)
"""What a caller can do about tensors that are not decoded. The names of a model of numbers have no place for scales."""


class Storage(NamedTuple):
    """How a method stores a weight called N: suffixes to N, or in place of its last component if they start with a dot.

    ``codes``: by suffix and dtype, the format. ``scales``: exactly one is there. ``dropped``: what only running the
    model quantized needs. ``refused``: what would change the numbers in a way that is not decoded.
    """

    codes: Mapping[tuple[str, str], str]
    scales: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    zero_points: str = ""
    global_scale: str = ""
    divides: bool = False


_FP8 = {("", "F8_E4M3"): "e4m3", ("", "F8_E5M2"): "e5m2"}
STORAGES: Mapping[str, Storage] = {
    # DeepSeek-V3, Qwen3-FP8, MiniMax-M2 (_scale_inv); DeepSeek-V4 (.scale; experts e2m1 as I8); Mistral (.qscale_*).
    "fp8": Storage(
        {**_FP8, ("", "I8"): "e2m1", ("", "F4"): "e2m1"},
        ("_scale_inv", "_scale", ".scale", ".qscale_weight"),
        (".activation_scale", "_activation_scale", ".input_scale", ".qscale_act"),
    ),
    "fbgemm_fp8": Storage(_FP8, ("_scale",), (".input_scale_ub",)),
    # gpt-oss: [..., rows, groups, 16] bytes of codes, meant as [..., columns, rows].
    "mxfp4": Storage({("_blocks", "U8"): "e2m1"}, ("_scales",)),
    "compressed-tensors": Storage(
        {**_FP8, ("_packed", "I32"): "int4", ("_packed", "U8"): "e2m1"},
        ("_scale",),
        ("_shape", ".input_scale", ".input_global_scale", ".input_zero_point"),
        ("_g_idx",),
        zero_points="_zero_point",
        global_scale="_global_scale",
        divides=True,
    ),
    "modelopt": Storage(
        {**_FP8, ("", "U8"): "e2m1"},
        ("_scale",),
        (".input_scale",),
        global_scale="_scale_2",
    ),
}

# Under the attention module, its k_proj and v_proj, or whatever holds the cache. Sources: vLLM 0.33.0,
# ``maybe_remap_kv_scale_name`` in ``model_executor/model_loader/weight_utils.py`` and ``BaseKVCacheMethod``.
_OF_KV_CACHES = re.compile(
    r"(?:^|\.)(?:(?:q|k|v|kv|prob)_scale|[qkv]_zero_point|[kv]_cache\.scale|self_attn\.q\.scale)$"
)

_ENDS_OF_KV_CACHES = ("_scale", "_zero_point", ".scale")  # few names have one, which is found out faster


def is_of_kv_cache(name: str) -> bool:
    """Whether a tensor is a scale or zero point of a quantized KV cache, or of attention that runs quantized.

    It belongs to no weight, and no model of numbers has it.
    """
    return bool(rows_of_kv_caches([name]))


def rows_of_kv_caches(names: Iterable[str]) -> list[int]:
    """The places of such names in ``names``: one loop, which saves a call for each name."""
    return [
        place
        for place, name in enumerate(names)
        if name.endswith(_ENDS_OF_KV_CACHES) and _OF_KV_CACHES.search(name) is not None
    ]


def part_name(weight: str, suffix: str) -> str | None:
    """What a part of a weight is called; None where weights of such names have no such part."""
    if not suffix.startswith("."):
        return weight + suffix
    module, _, leaf = weight.rpartition(".")
    return module + suffix if leaf == "weight" else None


# Rows and columns that share a scale, None for all there are.
Block = tuple[int | None, int | None]
_TENSOR: Block = (None, None)
_CHANNEL: Block = (1, None)

_NUMBERS = frozenset({"F32", "BF16", "F16"})
_EXPONENTS = frozenset({"F8_E8M0", "U8"})
_FP8_SCALES = frozenset({"F8_E4M3"})


class Scheme(NamedTuple):
    """What a config allows a weight to be."""

    format: str
    """Of its codes."""
    block: Block
    scales: frozenset[str]
    """Dtypes that its scales may have."""
    zero_points: bool = False
    global_scale: bool = False


def read_config(config: Mapping[str, Any], where: str | None = None) -> tuple[Storage, list[Scheme]]:
    """How a checkpoint with this ``quantization_config`` is stored, and all schemes that the config allows.

    No scheme at all is allowed where the config says that only the KV cache is quantized.

    Args:
        where: the file that says it, for errors.

    Raises:
        UnsupportedError: a method or scheme that is not decoded here; names it.
        QuantizationError: the config is malformed.
    """
    method = config.get("quant_method")
    storage = STORAGES.get(method) if isinstance(method, str) else None
    if storage is None:
        raise UnsupportedError(
            message(
                f"checkpoints of the quantization method {method!r} are not decoded",
                where=where,
                expected=f"one of {sorted(STORAGES)}",
                do=[KEEP],
            )
        )
    try:
        schemes = _schemes(str(method), config)
        for scheme in schemes:
            columns = scheme.block[1]
            if scheme.format in ("e2m1", "int4") and columns is not None and columns % 2:
                raise _Undecoded(f"groups of {columns} codes of 4 bits", "an even number")
    except _Undecoded as error:
        what, expected = error.args
        text = f"this quantization scheme is not decoded: {what}"
        raise UnsupportedError(message(text, where=where, expected=expected, do=[KEEP])) from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        text = f"the quantization_config of method {method} is malformed"
        raise QuantizationError(message(text, where=where, found=f"{type(error).__name__}: {error}")) from error
    return storage, schemes


class _Undecoded(Exception):
    """A scheme that is not decoded, and what is."""


def _schemes(method: str, config: Mapping[str, Any]) -> list[Scheme]:
    if method == "fp8":
        return _fp8_schemes(config)
    if method == "fbgemm_fp8":
        return [Scheme("e4m3", _CHANNEL, _NUMBERS)]
    if method == "mxfp4":
        return [Scheme("e2m1", (1, 32), _EXPONENTS)]
    if method == "modelopt":
        return _modelopt_schemes(config)
    return _compressed_schemes(config)


def _fp8_schemes(config: Mapping[str, Any]) -> list[Scheme]:
    blocks = [_TENSOR, _CHANNEL]
    if "weight_block_size" not in config:  # transformers' default, while vLLM's is one scale a tensor
        blocks.insert(0, (128, 128))
    elif config["weight_block_size"] is not None:
        blocks = [_block(config["weight_block_size"])]
    fp8 = [Scheme(format, block, _NUMBERS | _EXPONENTS) for format in ("e4m3", "e5m2") for block in blocks]
    # DeepSeek-V4's experts: the config tells the block of the other weights alone.
    return [*fp8, Scheme("e2m1", (1, 32), _EXPONENTS)]


def _modelopt_schemes(config: Mapping[str, Any]) -> list[Scheme]:
    if config.get("quant_algo") is None and config.get("kv_cache_scheme") is not None:
        return []
    algorithm = str(config.get("quant_algo")).upper()
    if algorithm == "FP8":
        return [Scheme("e4m3", _TENSOR, _NUMBERS)]
    if algorithm == "NVFP4":
        return [Scheme("e2m1", _block((1, config.get("group_size") or 16)), _FP8_SCALES, global_scale=True)]
    raise _Undecoded(f"modelopt's {algorithm}", ["FP8", "NVFP4"])


# compressed-tensors 0.20.0, ``CompressionFormat``: those of which the codes are one of our formats, with their scales.
_COMPRESSED = {
    "pack-quantized": ("int", 4, "int4", _NUMBERS),
    "float-quantized": ("float", 8, "e4m3", _NUMBERS),
    "naive-quantized": ("float", 8, "e4m3", _NUMBERS),
    "mxfp8-quantized": ("float", 8, "e4m3", _EXPONENTS),
    "nvfp4-pack-quantized": ("float", 4, "e2m1", _FP8_SCALES),
    "mxfp4-pack-quantized": ("float", 4, "e2m1", _EXPONENTS),
}


def _compressed_schemes(config: Mapping[str, Any]) -> list[Scheme]:
    if (config.get("transform_config") or {}).get("config_groups"):
        raise _Undecoded("compressed-tensors' transforms of weights", "no transform_config")
    sparse = (config.get("sparsity_config") or {}).get("format")
    if sparse not in (None, "dense"):
        raise _Undecoded(f"compressed-tensors' {sparse}", "no sparsity_config")
    groups = [group for group in (config.get("config_groups") or {}).values() if group.get("weights")]
    return [_compressed_scheme(group["weights"], group.get("format") or config.get("format")) for group in groups]


def _compressed_scheme(weights: Mapping[str, Any], stored: Any) -> Scheme:
    kind, bits = weights.get("type"), weights.get("num_bits")
    known = _COMPRESSED.get(str(stored))
    if known is None or known[:2] != (kind, bits):
        raise _Undecoded(f"compressed-tensors' {stored} with {bits}-bit {kind} weights", sorted(_COMPRESSED))
    if weights.get("actorder") not in (None, False, "static", "weight"):  # "dynamic" is another word for "group"
        raise _Undecoded("compressed-tensors' groups by activation order", "no actorder, or static or weight")
    _, _, format, scales = known
    zero_points = not weights.get("symmetric", True)
    if zero_points and format != "int4":
        raise _Undecoded(f"zero points of {format} codes", "symmetric weights")
    return Scheme(format, _compressed_block(weights), scales, zero_points, scales is _FP8_SCALES)


def _compressed_block(weights: Mapping[str, Any]) -> Block:
    strategy = weights.get("strategy")
    if strategy in ("group", "tensor_group"):
        return _block((1, weights["group_size"]))
    if strategy == "block":
        return _block(weights["block_structure"])
    if strategy == "channel":
        return _CHANNEL
    if strategy == "tensor":
        return _TENSOR
    raise _Undecoded(f"compressed-tensors' strategy {strategy!r}", ["tensor", "channel", "group", "block"])


def _block(block: Sequence[Any]) -> Block:
    rows, columns = block
    for size in (rows, columns):
        if type(size) is not int or not 0 < size < 2**31:
            raise ValueError(f"{size!r} is no size of a block or group")
    return rows, columns
