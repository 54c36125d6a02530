"""A quantization method as data: the names and the packing of its tensors, and the schemes that its config allows.

Each method has a file in this folder and an entry in ``table.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from automodel_conv.dtypes import BITS
from automodel_conv.planning.copies import CODE_BITS


class Packing(NamedTuple):
    """The tensor that holds the codes of a weight.

    An element holds as many codes as fill it, columns that follow each other, the first in the lowest bits.
    """

    suffix: str
    """Of its name, see ``part_name``."""
    dtype: str
    format: str
    """Of a code, see ``Decode``."""
    group: int | None = None
    """Elements of the last dimension, where that holds a group of columns: ``[..., rows, groups, group]``."""
    stored_transposed: bool = False
    """The weight is meant as ``[..., columns, rows]``."""
    shape_suffix: str = ""
    """The suffix of a tensor that tells the shape of the weight, where a row may end in padding."""

    @property
    def codes_per_element(self) -> int:
        return max(8, BITS[self.dtype]) // CODE_BITS[self.format]  # F4 is stored two to an element

    @property
    def form(self) -> str:
        """The shapes that the tensor may have, in words."""
        return "[..., rows, columns]" if self.group is None else f"[..., rows, groups, {self.group}]"

    def unpacked(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the codes in a tensor of this shape, as stored; None where it is not of this form."""
        if self.group is not None:
            if len(shape) < 3 or shape[-1] != self.group:
                return None
            shape = (*shape[:-2], shape[-2] * self.group)
        if len(shape) < 2:
            return None
        each = self.codes_per_element
        return shape if each == 1 else (*shape[:-1], shape[-1] * each)


# Rows and columns that share a scale, None for all there are.
Block = tuple[int | None, int | None]


class Scheme(NamedTuple):
    """What a config allows a weight to be."""

    format: str
    """Of its codes."""
    block: Block
    scales: frozenset[str]
    """Dtypes that its scales may have."""
    zero_points: bool = False
    global_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method stores the weights that it quantizes; parts are suffixes, see ``part_name``."""

    name: str
    """The ``quant_method`` of configs."""
    schemes: Callable[[Mapping[str, Any]], list[Scheme]]
    """All that a config allows; none where it says that only the KV cache is quantized. Raises ``Undecoded`` of what is
    not decoded; a TypeError, ValueError, KeyError or AttributeError says that the config is malformed."""
    codes: tuple[Packing, ...]
    scales: tuple[str, ...]
    """A weight has exactly one of them."""
    zero_points: str = ""
    """I32, ``ZEROS_IN_I32`` to an element."""
    global_scale: str = ""
    """One F32 for the whole tensor."""
    divides: bool = False
    """The global scale divides the others; else it multiplies them."""
    dropped: tuple[str, ...] = ()
    """Only running the model quantized needs them."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """They change the numbers in a way that is not decoded: what then holds of the weight."""


class Undecoded(Exception):
    """A scheme that is not decoded, and what is."""

    def __init__(self, what: str, expected: str | Sequence[str]):
        super().__init__(what)
        self.what, self.expected = what, expected


def part_name(weight: str, suffix: str) -> str | None:
    """The name of a part of a weight; None if a weight of that name has no such part.

    A suffix follows the name of the weight, or takes the place of its last component if it starts with a dot.
    """
    if not suffix.startswith("."):
        return weight + suffix
    module, _, leaf = weight.rpartition(".")
    return module + suffix if leaf == "weight" else None


def weight_name(part: str, suffix: str) -> str:
    """The name of the weight that this part, whose name ends with the suffix, belongs to."""
    weight = part.removesuffix(suffix)
    return weight + ".weight" if suffix.startswith(".") else weight


# Several methods share what follows.
FP8_CODES = (Packing("", "F8_E4M3", "e4m3"), Packing("", "F8_E5M2", "e5m2"))

TENSOR: Block = (None, None)
CHANNEL: Block = (1, None)

NUMBERS = frozenset({"F32", "BF16", "F16"})
EXPONENTS = frozenset({"F8_E8M0", "U8"})
FP8_SCALES = frozenset({"F8_E4M3"})


def block_of(sizes: Sequence[Any]) -> Block:
    """Rows and columns that a config gives.

    Raises:
        ValueError, TypeError: they are no two sizes.
    """
    rows, columns = sizes
    for size in (rows, columns):
        if type(size) is not int or not 0 < size < 2**31:
            raise ValueError(f"{size!r} is no size of a block or group")
    return rows, columns
