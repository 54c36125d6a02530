"""Read the quantization method and schemes of a config, and recognize scales that belong to no weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from automodel_conv.errors import QuantizationError, UnsupportedError, message
from automodel_conv.planning.methods.method import Method, Scheme, UnsupportedScheme
from automodel_conv.planning.methods.table import METHODS, method_of

_KEEPS = "keeps codes and scales as they are"
KEEP = (
    "leave {carry} out, or carry from a checkpoint that is not quantized",
    f"{{dequantize=False}} {_KEEPS}, for a {{model}} that has both or with {{rules=[]}}",
    f"{{dequantize=False}} with {{rules=[]}} {_KEEPS}",
    f"{{dequantize=False}} {_KEEPS}",
    f"{{rules=[]}} without {{dequantize=True}} {_KEEPS}",
)
"""Advice for tensors that cannot be decoded. A model of plain values has no names for scales."""

# These names are under the attention module, its projections, or the module that holds the cache.
# Sources: vLLM 0.33.0, ``maybe_remap_kv_scale_name`` in ``model_executor/model_loader/weight_utils.py``,
# ``BaseKVCacheMethod``, and ``QuarkConfig.get_cache_scale_mapper``; amd-quark 0.13, ``torch/export/constants.py`` and
# ``kv_layers_name`` in ``torch/quantization/config/template.py``; NVIDIA Model Optimizer 0.47,
# ``_KV_CACHE_REPLACEMENTS`` in ``torch/export/quant_utils.py``.
_KV_CACHE_NAME = re.compile(
    r"(?:^|\.)(?:(?:q|k|v|kv|prob)_scale|[qkv]_zero_point|[kv]_cache\.scale|self_attn\.q\.scale|([kv])_proj\.\1_bias"
    r"|prob_output_scale"
    r"|(?:[qkv]_proj|kv_b_proj|kv_a_proj_with_mqa|qkv_proj|wkv|Wqkv|query_key_value)\.output(?:_scale|_quantizer\.scale)"
    r")$"
)

# A cheap test that rules out most names, those of scales of weights included.
_KV_CACHE_SUFFIXES = (
    *("q_scale", "k_scale", "v_scale", "prob_scale", "output_scale"),
    *("_zero_point", ".scale", "k_bias", "v_bias"),
)


def is_of_kv_cache(name: str) -> bool:
    """Return whether a tensor is a scale, zero point or bias of a quantized KV cache, or of quantized attention.

    Such a tensor belongs to no weight, and a model of plain values does not have it.
    """
    return bool(kv_cache_rows([name]))


def kv_cache_rows(names: Iterable[str]) -> list[int]:
    """Return the indices of the names for which ``is_of_kv_cache`` is true, without one call per name."""
    return [
        row
        for row, name in enumerate(names)
        if name.endswith(_KV_CACHE_SUFFIXES) and _KV_CACHE_NAME.search(name) is not None
    ]


def implied_config(model_type: str | None) -> dict[str, Any] | None:
    """Return the settings of checkpoints of a model type whose configs do not mention their quantization, or None."""
    return next(({"quant_method": name} for name, method in METHODS.items() if model_type in method.model_types), None)


def read_config(config: Mapping[str, Any], where: str | None = None) -> tuple[Method, list[Scheme]]:
    """Return the method of a ``quantization_config`` and all schemes that it allows.

    The list of schemes is empty if only the KV cache is quantized.

    Args:
        where: path of the file that holds the config, for errors.

    Raises:
        UnsupportedError: the method or a scheme is not supported; the error names it.
        QuantizationError: the config is malformed.
    """
    method = method_of(config)
    if method is None:
        name = config.get("quant_method")
        raise UnsupportedError(
            message(
                f"the quantization method {name!r} is not supported",
                where=where,
                expected=f"one of {sorted(name for name, method in METHODS.items() if not method.model_types)}",
                do=[KEEP],
            )
        )
    try:
        schemes = method.schemes(config)
    except UnsupportedScheme as error:
        text = f"this quantization scheme is not supported: {error.what}"
        raise UnsupportedError(message(text, where=where, expected=error.expected, do=[KEEP])) from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        text = f"the quantization_config of method {method.name} is malformed"
        raise QuantizationError(message(text, where=where, found=f"{type(error).__name__}: {error}")) from error
    return method, schemes
