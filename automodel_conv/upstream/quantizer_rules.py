"""Undo the changes that a dequantizing quantizer of transformers makes to a model's rules.

The quantizer inserts its own operation before those of the model's rules, which then also collect the scales, and adds
a rule for all other weights. Without these the rules are the model's own again: the rules of a checkpoint of plain
values. A decoded model is saved by them.
Source: transformers 5.24.0, ``HfQuantizer.update_weight_conversions`` and ``get_weight_conversions``.
"""

from __future__ import annotations

from typing import Any

_DEQUANTIZE = {"Fp8Dequantize", "Mxfp4Dequantize", "CompressedTensorsDequantize"}
_MODULES = "transformers.integrations."


def own_rule(rule: Any) -> Any | None:
    """Return a rule without the quantizer's operation; None if it has no other operation."""
    operations = list(getattr(rule, "operations", None) or ())
    if not operations or not dequantizes(operations[0]):
        return rule
    if len(operations) == 1:
        return None
    # The constructor changes patterns, so pass the original ones. Older versions of transformers anchor them.
    sources = [s for s in _original_patterns(rule, "source") if s.removesuffix("$").endswith(".weight")]
    targets = _original_patterns(rule, "target")
    create = getattr(rule, "copy", type(rule))
    return create(source_patterns=sources, target_patterns=targets, operations=operations[1:])


def dequantizes(operation: Any) -> bool:
    """Return whether an operation decodes codes and their scales to values."""
    cls = type(operation)
    return cls.__name__ in _DEQUANTIZE and cls.__module__.startswith(_MODULES)


def _original_patterns(rule: Any, side: str) -> list[str]:
    return list(getattr(rule, f"_original_{side}_patterns", getattr(rule, f"{side}_patterns")))
