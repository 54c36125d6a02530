"""What a quantizer of transformers that dequantizes while it loads has made of a model's rules, undone.

It has put an operation of its own before those of the model's rules, which then also collect the scales, and has added
a rule for all other weights. Without them the rules are the model's own again: those of a checkpoint of plain numbers,
by which the model that has been decoded is saved.
Source: transformers 5.23.0, ``HfQuantizer.update_weight_conversions`` and ``get_weight_conversions``.
"""

from __future__ import annotations

from typing import Any

_DEQUANTIZE = {"Fp8Dequantize", "Mxfp4Dequantize", "CompressedTensorsDequantize"}
_MODULES = "transformers.integrations."


def own_rule(rule: Any) -> Any | None:
    """The model's own rule in what a quantizer has made of it; None if nothing is left."""
    operations = list(getattr(rule, "operations", None) or ())
    if not operations or not dequantizes(operations[0]):
        return rule
    if len(operations) == 1:
        return None
    # As they were given: the constructor changes them. Older transformers anchor those of weights.
    sources = [s for s in _given(rule, "source") if s.removesuffix("$").endswith(".weight")]
    make = getattr(rule, "copy", type(rule))
    return make(source_patterns=sources, target_patterns=_given(rule, "target"), operations=operations[1:])


def dequantizes(operation: Any) -> bool:
    """Whether an operation makes numbers of codes and their scales."""
    cls = type(operation)
    return cls.__name__ in _DEQUANTIZE and cls.__module__.startswith(_MODULES)


def _given(rule: Any, side: str) -> list[str]:
    return list(getattr(rule, f"_original_{side}_patterns", getattr(rule, f"{side}_patterns")))
