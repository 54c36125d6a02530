"""transformers' quantizers, as far as what they do to a checkpoint on the way to plain parameters is planned here.

What a quantizer makes of a model's rules, and how that is undone: ``upstream/quantizer_rules.py``.
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
    """A load as it would be if its checkpoint were not quantized."""

    rules: list[Any | None]
    """In the order of the load's own; None for those of the quantizer alone."""
    config: Mapping[str, Any] | None = None
    """``quantization_config`` of the checkpoint."""
    why_not: str | None = None
    """Why it cannot be one."""


def plain_load(quantizer: Any, rules: list[Any]) -> PlainLoad:
    """The load without its quantizer, if there is one and all that it does is to dequantize."""
    if quantizer is None:
        return PlainLoad(rules)
    config = quantizer.quantization_config
    if not getattr(quantizer, "pre_quantized", False) or not getattr(config, "dequantize", False):
        return PlainLoad(rules, None, "a quantizer takes part that does not only dequantize")
    settings = config.to_dict()
    # Of compressed-tensors the class holds the config one level deeper.
    settings = settings.get("quantization_config") or settings
    method = settings.get("quant_method", getattr(config, "quant_method", None))
    settings = dict(settings) | {"quant_method": str(getattr(method, "value", method))}
    return PlainLoad([own_rule(rule) for rule in rules], settings)


def rounds_alike(decode: Decode, natural: str, wanted: str) -> bool:
    """Whether transformers gets the numbers of a source as we do, which for some schemes depends on their dtype.

    compressed-tensors computes in the dtype of the scales, and divides NVFP4's scales by the global one in it.
    """
    return decode.global_scale is None and (decode.format != "int4" or natural == wanted) and wanted in DECODED


def quantization_method(model: Any, quantizer: Any) -> str | None:
    """The method by which a checkpoint says that it is quantized, also where transformers has no quantizer for it."""
    if quantizer is not None and not getattr(quantizer, "pre_quantized", False):
        return None
    if quantizer is not None:
        found = quantizer.quantization_config
    else:
        found = getattr(model.config, "quantization_config", None)
        found = found or getattr(model.config.get_text_config(decoder=True), "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def quantizes(quantizer: Any, model: Any, target: str) -> bool:
    """Whether a parameter is quantized from numbers while it is loaded."""
    if quantizer is None or getattr(quantizer, "pre_quantized", False):
        return False
    return bool(quantizer.param_needs_quantization(model, target))


def only_moves(rules: RuleSet, row: int) -> bool:
    """Whether a rule leaves codes that come without their scale as they are; -1 is a name that no converter takes.

    An operation that neither moves nor dequantizes may do anything to them.
    """
    operations = rules.converters[row].operations if row >= 0 else ()
    return all(dequantizes(operation) or type(operation).__module__ == CORE_MODULE for operation in operations)
