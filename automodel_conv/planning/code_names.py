"""Recognize the codes and scales of all quantization methods by their names and dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.methods.method import Method, Packing, part_name, weight_name
from automodel_conv.planning.methods.table import METHODS

NARROW = ("F8_", "F6_", "F4")
"""Prefixes of the dtypes that only codes and scales have."""


class CodeNames(NamedTuple):
    """The name suffixes of codes and scales, over all methods."""

    codes: tuple[str, ...]
    """Suffixes of codes."""
    scales: tuple[str, ...]
    """Suffixes of scales."""
    under_weights: frozenset[str]
    """Dtypes of codes that are stored under the name of the weight itself."""

    @classmethod
    def of_all_methods(cls) -> CodeNames:
        """Return the suffixes and dtypes of every method in ``METHODS``."""
        packings = _packings()
        return cls(
            tuple(dict.fromkeys(packing.suffix for packing in packings)),
            tuple(dict.fromkeys(scale for method in METHODS.values() for scale in method.scales)),
            frozenset(packing.dtype for packing in packings if not packing.suffix),
        )

    def scale_names(self, codes: str) -> list[str]:
        """Return the names that any method may give to the scales of these codes."""
        weights = [weight_name(codes, suffix) for suffix in self.codes if codes.endswith(suffix)]
        wholes = (method.whole_name(weight) for weight in weights for method in METHODS.values())
        weights += dict.fromkeys(whole for whole in wholes if whole is not None and whole not in weights)
        parts = (part_name(weight, scale) for weight in weights for scale in self.scales)
        return [part for part in parts if part is not None]

    def needs_scale(self, name: str, dtype: str) -> bool:
        """Return whether a tensor of a quantized checkpoint must be codes: a weight, and not itself a scale."""
        if name.endswith(self.scales) or dtype == "F8_E8M0":
            return False
        return dtype.startswith(NARROW) or (dtype in self.under_weights and name.endswith("weight"))


def has_codes(table: SourceTable) -> str | None:
    """Return the name of the first tensor that looks like codes with scales, or None."""
    return next((name for name, _ in _codes_with_parts(table)), None)


def names_of_codes(table: SourceTable) -> tuple[str, ...]:
    """Return the names of all tensors that look like codes with scales."""
    return tuple(dict.fromkeys(name for name, _ in _codes_with_parts(table)))


def parts_of_codes(table: SourceTable) -> frozenset[str]:
    """Return the names of all scales of codes, those of activations included.

    If codes are kept, their scales keep their dtype: a cast of a scale changes the value of each of its codes.
    """
    return frozenset(part for _, parts in _codes_with_parts(table) for part in parts)


def scales_of_codes(table: SourceTable) -> dict[str, str]:
    """Return the name of the scales of each tensor that looks like codes with scales, by its name."""
    return {name: parts[0] for name, parts in _codes_with_parts(table)}


def _codes_with_parts(table: SourceTable) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each tensor that looks like codes with scales, and the names of its parts, scales first."""
    methods_of: dict[str, list[tuple[str, Method]]] = {}
    for method in METHODS.values():
        for packing in method.codes:
            methods_of.setdefault(packing.dtype, []).append((packing.suffix, method))
    if methods_of.keys().isdisjoint(table.dtypes):
        return
    names = set(table.names)
    for name, dtype in zip(table.names, table.dtypes, strict=True):
        for suffix, method in methods_of.get(dtype, ()):
            if name.endswith(suffix):
                weight = weight_name(name, suffix)
                whole = method.whole_name(weight)
                owners = [weight] if whole in (None, weight) else [weight, whole]
                if any(part_name(owner, scale) in names for owner in owners for scale in method.scales):
                    suffixes = (*method.scales, *method.global_scale, method.global_divisor, *method.dropped)
                    parts = (part_name(owner, part) for part in suffixes if part for owner in owners)
                    yield name, [part for part in parts if part in names]


def packed_dtypes() -> frozenset[str]:
    """Return the dtypes whose elements may hold several codes."""
    return frozenset(packing.dtype for packing in _packings() if packing.codes_per_element > 1)


def _packings() -> list[Packing]:
    return [packing for method in METHODS.values() for packing in method.codes]
