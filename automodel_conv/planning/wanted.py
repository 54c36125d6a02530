"""The required dtype and shape of a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

AsStored = Callable[[str, str, str], bool]
"""Function of ``(source, dtype code, target)`` that returns whether the source keeps its dtype."""


class TargetSpec(NamedTuple):
    """The required dtype and shape of a target."""

    dtype: str
    """Dtype code, such as ``"BF16"``."""
    shape: tuple[int, ...]
    is_new: bool = False
    """Whether the tensor has no value yet. A new target has the dtype that ``from_pretrained`` produces.

    ``from_pretrained`` casts the sources to ``dtype`` of the first target of their rule, and the target has the dtype
    of the cast sources.
    """
