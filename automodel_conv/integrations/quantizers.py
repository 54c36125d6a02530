"""Queries of transformers' quantizers, by which a load that only dequantizes can be planned.

``upstream/quantizer_rules.py`` undoes the changes that a quantizer makes to a model's rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from automodel_conv.dtypes import DECODED
from automodel_conv.planning.copies import Decode
from automodel_conv.upstream.quantizer_rules import dequantizes, own_rule
from automodel_conv.upstream.registry import CORE_MODULE
from automodel_conv.upstream.rules import RuleSet


class PlainLoad(NamedTuple):
    """A load with the rules that it would have if its checkpoint were not quantized."""

    rules: list[Any | None]
    """Rules in the order of the load's rules; None for a rule that only the quantizer added."""
    config: Mapping[str, Any] | None = None
    """``quantization_config`` of the checkpoint; None if it is not quantized."""
    why_not: str | None = None
    """Reason why the load cannot be planned, if any."""


def plain_load(quantizer: Any, rules: list[Any]) -> PlainLoad:
    """Return the load without its quantizer, provided that the quantizer only dequantizes."""
    if quantizer is None:
        return PlainLoad(rules)
    config = quantizer.quantization_config
    if not getattr(quantizer, "pre_quantized", False) or not getattr(config, "dequantize", False):
        return PlainLoad(rules, None, "its quantizer does more than dequantize")
    settings = config.to_dict()
    # The class for compressed-tensors nests its settings one level deeper.
    settings = settings.get("quantization_config") or settings
    method = settings.get("quant_method", getattr(config, "quant_method", None))
    settings = dict(settings) | {"quant_method": str(getattr(method, "value", method))}
    return PlainLoad([own_rule(rule) for rule in rules], settings)


def rounds_the_same(decode: Decode, natural: str, wanted: str) -> bool:
    """Return whether transformers decodes a source to the same values as this package does.

    compressed-tensors computes in the dtype of the scales, and also divides NVFP4's scales by the global scale in it.

    Args:
        decode: how the source is decoded.
        natural: dtype code of the decoded values as the scales determine it.
        wanted: dtype code of the target.
    """
    has_own_rounding = decode.global_scale is not None and decode.global_divisor is None
    in_scale_dtype = decode.format in ("int4", "int8")
    return not has_own_rounding and (natural == wanted or not in_scale_dtype) and wanted in DECODED


def quantization_method(model: Any, quantizer: Any) -> str | None:
    """Return the quantization method that a checkpoint declares, even if transformers has no quantizer for it."""
    if quantizer is not None and not getattr(quantizer, "pre_quantized", False):
        return None
    if quantizer is not None:
        config = quantizer.quantization_config
    else:
        config = getattr(model.config, "quantization_config", None)
        config = config or getattr(model.config.get_text_config(decoder=True), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def quantizes(quantizer: Any, model: Any, target: str) -> bool:
    """Return whether a parameter is quantized from plain values while it is loaded."""
    if quantizer is None or getattr(quantizer, "pre_quantized", False):
        return False
    return bool(quantizer.param_needs_quantization(model, target))


def only_moves(rules: RuleSet, row: int) -> bool:
    """Return whether a rule leaves codes without scales unchanged.

    A rule does so if each of its operations only moves elements or dequantizes. Other operations may do anything.

    Args:
        rules: rules of the load.
        row: index of the rule; -1 for a source that no rule consumes.
    """
    operations = rules.converters[row].operations if row >= 0 else ()
    return all(dequantizes(operation) or type(operation).__module__ == CORE_MODULE for operation in operations)
