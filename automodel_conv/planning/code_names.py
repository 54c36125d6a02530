"""Recognize codes and scales by their names and dtypes, whatever the method."""

from __future__ import annotations

from typing import NamedTuple

from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.methods.method import Packing, part_name, weight_name
from automodel_conv.planning.methods.table import METHODS

NARROW = ("F8_", "F6_", "F4")
"""How dtypes begin that are of codes, or of scales, and of nothing else."""


class CodeNames(NamedTuple):
    """The suffixes of all methods."""

    codes: tuple[str, ...]
    scales: tuple[str, ...]
    under_weights: frozenset[str]
    """Dtypes of codes that have the name of the weight itself."""

    @classmethod
    def of_all_methods(cls) -> CodeNames:
        packings = _packings()
        return cls(
            tuple(dict.fromkeys(packing.suffix for packing in packings)),
            tuple(dict.fromkeys(scale for method in METHODS.values() for scale in method.scales)),
            frozenset(packing.dtype for packing in packings if not packing.suffix),
        )

    def scale_names(self, codes: str) -> list[str]:
        """The names that a scale of these codes can have, by any method."""
        weights = [weight_name(codes, suffix) for suffix in self.codes if codes.endswith(suffix)]
        return [part for weight in weights for scale in self.scales if (part := part_name(weight, scale)) is not None]

    def needs_scale(self, name: str, dtype: str) -> bool:
        """Whether a tensor of a quantized checkpoint can be nothing but codes: it is a weight, and no scale itself."""
        if name.endswith(self.scales) or dtype == "F8_E8M0":
            return False
        return dtype.startswith(NARROW) or (dtype in self.under_weights and name.endswith("weight"))


def has_codes(table: SourceTable) -> str | None:
    """The name of a tensor of ``table`` that has the form of codes with scales, if there is one."""
    forms: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for method in METHODS.values():
        for packing in method.codes:
            forms.setdefault(packing.dtype, []).append((packing.suffix, method.scales))
    if forms.keys().isdisjoint(table.dtypes):
        return None
    names = set(table.names)
    for name, dtype in zip(table.names, table.dtypes, strict=True):
        for suffix, scales in forms.get(dtype, ()):
            if name.endswith(suffix):
                weight = weight_name(name, suffix)
                if any(part_name(weight, scale) in names for scale in scales):
                    return name
    return None


def packed_dtypes() -> frozenset[str]:
    """The dtypes of tensors whose elements may hold several codes."""
    return frozenset(packing.dtype for packing in _packings() if packing.codes_per_element > 1)


def _packings() -> list[Packing]:
    return [packing for method in METHODS.values() for packing in method.codes]
