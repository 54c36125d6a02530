"""Determine which tensors of a quantized checkpoint ``from_pretrained`` leaves in their stored dtype.

A quantizer that decodes while it loads collects every ``weight`` in its own operation, quantized or not. transformers
does not cast the tensors that such an operation collects. The norms of DeepSeek-V4 stay bfloat16 for that reason,
although the model wants them in float32. Older versions of transformers do not cast tensors that are renamed.
Sources: ``core_model_loading.py`` of transformers 5.12.1, 5.17.0 and 5.23.0, ``convert_and_load_state_dict_in_model``;
``quantizers/base.py`` of 5.23.0, ``get_new_dtype``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from types import SimpleNamespace
from typing import Any

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
        renamed, row, _ = rules.rename(source)
        # A rule does not apply to a name of the model if it would rename it to a name that the model lacks.
        applies = row >= 0 and rules.with_prefix(renamed, {target: None}) == target
        converter = rules.converters[row] if applies else None
        return quantizer.get_new_dtype(converter, SimpleNamespace(get_dtype=lambda: dtype), _ANY_DTYPE) is None

    return keeps
