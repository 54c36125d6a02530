"""What a config says of quantization: by which method, and in which schemes; and the scales that are of no weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from automodel_conv.errors import QuantizationError, UnsupportedError, message
from automodel_conv.planning.copies import CODE_BITS
from automodel_conv.planning.methods.method import Method, Scheme, Undecoded
from automodel_conv.planning.methods.table import METHODS

_KEEPS = "keeps codes and scales as they are"
KEEP = (
    "leave {carry} out, or carry from a checkpoint that is not quantized",
    f"{{dequantize=False}} {_KEEPS}, for a {{model}} that has both or with {{rules=[]}}",
    f"{{dequantize=False}} with {{rules=[]}} {_KEEPS}",
    f"{{dequantize=False}} {_KEEPS}",
    f"{{rules=[]}} without {{dequantize=True}} {_KEEPS}",
)
"""What a caller can do about tensors that are not decoded. The names of a model of numbers have no place for scales."""

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


def read_config(config: Mapping[str, Any], where: str | None = None) -> tuple[Method, list[Scheme]]:
    """How a checkpoint with this ``quantization_config`` is stored, and all schemes that the config allows.

    No scheme at all is allowed where the config says that only the KV cache is quantized.

    Args:
        where: the file that says it, for errors.

    Raises:
        UnsupportedError: a method or scheme that is not decoded here; names it.
        QuantizationError: the config is malformed.
    """
    name = config.get("quant_method")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise UnsupportedError(
            message(
                f"checkpoints of the quantization method {name!r} are not decoded",
                where=where,
                expected=f"one of {sorted(METHODS)}",
                do=[KEEP],
            )
        )
    try:
        schemes = method.schemes(config)
        for scheme in schemes:
            bits, columns = CODE_BITS[scheme.format], scheme.block[1]
            if columns is not None and columns * bits % 8:
                raise Undecoded(f"groups of {columns} codes of {bits} bits", "an even number")
    except Undecoded as error:
        text = f"this quantization scheme is not decoded: {error.what}"
        raise UnsupportedError(message(text, where=where, expected=error.expected, do=[KEEP])) from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        text = f"the quantization_config of method {method.name} is malformed"
        raise QuantizationError(message(text, where=where, found=f"{type(error).__name__}: {error}")) from error
    return method, schemes
