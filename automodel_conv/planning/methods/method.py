"""The description of a quantization method: names and packing of its tensors, and the schemes of its config.

Each method has a file in this folder and an entry in ``table.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any, NamedTuple

from automodel_conv.dtypes import BITS
from automodel_conv.planning.arrangement import PLAIN, Arrangement
from automodel_conv.planning.copies import CODE_BITS, ZeroPacking

_WILDCARDS = frozenset("*?[")


class Packing(NamedTuple):
    """How a tensor holds the codes of a weight.

    An element is filled with the codes of consecutive columns, the first in the lowest bits.
    """

    suffix: str
    """Suffix of the tensor's name; see ``part_name``."""
    dtype: str
    """Dtype code of the tensor."""
    format: str
    """Format of a code; see ``Decode``."""
    group: int | None = None
    """Size of the last dimension if the tensor is ``[..., rows, groups, group]``; None if it is ``[..., rows, n]``."""
    arrangement: Arrangement = PLAIN
    """How the matrix of the codes is viewed as the weight."""
    scale_word: tuple[int, ...] = ()
    """Order of the scales; see ``Decode``."""
    shape_suffix: str = ""
    """Suffix of the tensor that holds the weight's shape, for packings whose rows may end in padding."""

    @property
    def codes_per_element(self) -> int:
        """Number of codes in an element."""
        return max(8, BITS[self.dtype]) // CODE_BITS[self.format]  # F4 is stored two to an element

    @property
    def form(self) -> str:
        """The shape of the tensor in words, for errors."""
        return "[..., rows, columns]" if self.group is None else f"[..., rows, groups, {self.group}]"

    def unpacked(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of the codes in a tensor of the given shape, as stored; None if it is invalid."""
        if self.group is not None:
            if len(shape) < 3 or shape[-1] != self.group:
                return None
            shape = (*shape[:-2], shape[-2] * self.group)
        if len(shape) < 2:
            return None
        per_element = self.codes_per_element
        return shape if per_element == 1 else (*shape[:-1], shape[-1] * per_element)


Block = tuple[int | None, int | None]
"""Number of rows and of columns of the stored matrix that share a scale; None means all of them."""


class Modules(NamedTuple):
    """The modules that a scheme is stated for; see ``modules_of``."""

    names: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()
    """Patterns that whole names match."""


ANY_MODULE = Modules()
"""The modules of a scheme that is stated for no module in particular."""


def modules_of(names: Iterable[Any]) -> Modules:
    """Return the modules that a config lists by names and patterns.

    A name with ``*``, ``?`` or ``[`` is a pattern.

    Raises:
        TypeError: a name is not a text.
    """
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{name!r} is not the name of a module")
    patterns = [name for name in names if not _WILDCARDS.isdisjoint(name)]
    return Modules(frozenset(names).difference(patterns), tuple(re.compile(translate(name)) for name in patterns))


class Scheme(NamedTuple):
    """One way in which a config allows a weight to be stored."""

    format: str
    """Format of the codes; see ``Decode``."""
    block: Block
    scales: frozenset[str]
    """Dtypes that the scales may have."""
    zero_points: bool = False
    """Whether the weight has zero points."""
    global_scale: bool = False
    """Whether the weight has a global scale."""
    zero_packing: ZeroPacking = ZeroPacking()
    """How the zero points are stored, if there are any."""
    stack_arrangement: Arrangement | None = None
    """How each matrix of a stack is viewed as its weight, instead of as its ``Packing`` states.

    If it is not None, only stacks of matrices have the scheme.
    """
    modules: Modules = ANY_MODULE
    """Modules that the config states the scheme for. It decides between schemes that fit the parts of a weight, and a
    weight of these modules must fit one of their schemes. Any other weight may have the scheme too."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A quantization method and how it stores weights.

    The parts of a weight are given by suffixes; see ``part_name``.
    """

    name: str
    """The value of ``quant_method`` in configs."""
    aliases: tuple[str, ...] = ()
    """Further values of ``quant_method`` that mean the same."""
    model_types: tuple[str, ...] = ()
    """Model types whose checkpoints have the method if their config mentions none. They may also be unquantized."""
    schemes: Callable[[Mapping[str, Any]], list[Scheme]]
    """Function that returns all schemes that a config allows, or none if only the KV cache is quantized. It raises
    ``UnsupportedScheme`` for a scheme that is not supported. A TypeError, ValueError, KeyError or AttributeError means
    that the config is malformed."""
    codes: tuple[Packing, ...]
    """Packings of codes."""
    scales: tuple[str, ...]
    """Suffixes of scales. A weight has exactly one of them."""
    shared: re.Pattern[str] | None = None
    """Pattern of the names of weights that may have one scale for the whole tensor, whatever the config states for the
    others. Its first group matches the component that numbers the shards of such a weight, which share that scale."""
    zero_points: str = ""
    """Suffix of zero points, an I32 tensor with ``ZEROS_IN_I32`` in an element."""
    group_index: str = ""
    """Suffix of the I32 tensor with the group of each column of the weight. Groups must be in order."""
    global_scale: tuple[str, ...] = ()
    """Suffixes of global scales: one F32, or one for each matrix of a stack. A weight has at most one of them."""
    divides: bool = False
    """Whether the global scale divides the other scales. Otherwise it multiplies them."""
    global_divisor: str = ""
    """Suffix of a tensor like the global scale, which divides it; see ``Decode``."""
    like_upstream: bool = False
    """Whether values are always rounded as transformers rounds them, because its code alone defines the method."""
    dropped: tuple[str, ...] = ()
    """Suffixes of tensors that only a quantized forward pass needs."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Suffixes of tensors that change the values in a way that is not supported, with what they mean for the weight."""

    def whole_name(self, weight: str) -> str | None:
        """Return the name of the weight that ``weight`` is a shard of, or its own; None if it cannot share a scale."""
        match = None if self.shared is None else self.shared.search(weight)
        if match is None:
            return None
        return weight if match[1] is None else weight[: match.start(1)] + weight[match.end(1) :]


class UnsupportedScheme(Exception):
    """Raised for a scheme that is not supported."""

    def __init__(self, what: str, expected: str | Sequence[str]):
        """Create the exception.

        Args:
            what: the scheme.
            expected: schemes that are supported.
        """
        super().__init__(what)
        self.what, self.expected = what, expected


def part_name(weight: str, suffix: str) -> str | None:
    """Return the name of a part of a weight; None if a weight of that name cannot have the part.

    A suffix is appended to the name of the weight. If it starts with a dot, it replaces the last component, "weight".
    If it starts with "_weight", the last component is another one, such as that of "experts.down_proj".
    """
    if not suffix.startswith((".", "_weight")):
        return weight + suffix
    module, _, leaf = weight.rpartition(".")
    if suffix.startswith("."):
        return module + suffix if leaf == "weight" else None
    return None if leaf == "weight" else weight + suffix


def weight_name(part: str, suffix: str) -> str:
    """Return the name of the weight that a part belongs to, given the suffix of the part's name."""
    weight = part.removesuffix(suffix)
    return weight + ".weight" if suffix.startswith(".") else weight


FP8_CODES = (Packing("", "F8_E4M3", "e4m3"), Packing("", "F8_E5M2", "e5m2"))

TENSOR: Block = (None, None)
"""One scale per tensor."""
CHANNEL: Block = (1, None)
"""One scale per row."""

FLOAT_SCALES = frozenset({"F32", "BF16", "F16"})
"""Dtypes of floating scales."""
EXPONENT_SCALES = frozenset({"F8_E8M0", "U8"})
"""Dtypes of scales that are powers of two, stored as exponents."""
FP8_SCALES = frozenset({"F8_E4M3"})
"""Dtypes of FP8 scales."""


def block_of(sizes: Sequence[Any]) -> Block:
    """Return the block of two sizes in a config.

    Args:
        sizes: number of rows and of columns.

    Raises:
        ValueError, TypeError: ``sizes`` are not two positive integers.
    """
    rows, columns = sizes
    for size in (rows, columns):
        if type(size) is not int or not 0 < size < 2**31:
            raise ValueError(f"{size!r} is not the size of a block or group")
    return rows, columns
