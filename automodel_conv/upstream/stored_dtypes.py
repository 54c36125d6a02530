"""Determine which tensors of a quantized checkpoint ``from_pretrained`` leaves in their stored dtype.

A quantizer that decodes while it loads collects every ``weight`` in its own operation, quantized or not. transformers
does not cast the tensors that such an operation collects. The norms of DeepSeek-V4 stay bfloat16 for that reason,
although the model wants them in float32. Since 5.24, the operation itself casts them. Older versions of transformers do
not cast tensors that are renamed.
Sources: ``core_model_loading.py`` of transformers 5.12.1, 5.17.0, 5.23.0 and 5.24.0,
``convert_and_load_state_dict_in_model``; ``quantizers/base.py`` of 5.24.0, ``get_new_dtype``;
``integrations/finegrained_fp8.py`` of 5.23.0 and 5.24.0, ``Fp8Dequantize``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from automodel_conv.dtypes import torch_dtype
from automodel_conv.planning.wanted import AsStored
from automodel_conv.upstream.registry import is_pretrained_model, model_rules, transformers_available
from automodel_conv.upstream.rules import RuleSet

_ANY_DTYPE = object()


def dequantizer(settings: Mapping[str, Any]) -> Any | None:
    """Return transformers' quantizer for these quantization settings, set to decode; None if it has none."""
    if not transformers_available():
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(dict(settings), pre_quantized=True)
    except (ValueError, TypeError, KeyError, ImportError):  # an unknown method, or its library is not installed
        return None
    quantizer.quantization_config.dequantize = True
    return quantizer


def left_as_stored(
    model: Any, quantizer: Any, key_mapping: Mapping[str, str] | None = None, decoded: Container[str] = ()
) -> AsStored | None:
    """Return the function that determines which sources keep their dtype.

    Args:
        model: the model.
        quantizer: transformers' quantizer, or None.
        key_mapping: ``{pattern: replacement}`` applied to names before the rules.
        decoded: names of the sources that are decoded. Decoding is not a cast.

    Returns:
        The function, or None if there is no quantizer or it cannot load this model.
    """
    if quantizer is None or not is_pretrained_model(model):
        return None
    try:
        rules = RuleSet(model_rules(model, key_mapping, quantizer), model)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ImportError,
    ):  # raised for unsupported schemes
        return None

    def keeps(source: str, dtype: str, target: str) -> bool:
        if source in decoded:
            return False
        if not hasattr(quantizer, "get_new_dtype"):
            return source != target or not dtype.startswith(("F", "BF"))
        renamed, row, pattern = rules.rename(source)
        # A rule does not apply to a name of the model if it would rename it to a name that the model lacks.
        applies = row >= 0 and rules.with_prefix(renamed, {target: None}) == target
        converter = rules.converters[row] if applies else None
        if quantizer.get_new_dtype(converter, SimpleNamespace(get_dtype=lambda: dtype), _ANY_DTYPE) is not None:
            return False
        return not applies or _output_dtype(rules, row, target, pattern, dtype) == torch_dtype(dtype)

    return keeps


def _output_dtype(rules: RuleSet, row: int, target: str, pattern: str, dtype: str) -> torch.dtype:
    """Return the dtype in which the operations of a rule return an unquantized tensor of this dtype."""
    tensor = torch.empty((1, 1), dtype=torch_dtype(dtype), device="meta")
    try:
        [output] = rules.upstream(row, target, {pattern: [0]}, {})({0: tensor}).values()
    except Exception:  # an operation may need values, or all sources of the rule, and raise anything
        return tensor.dtype
    return output.dtype
