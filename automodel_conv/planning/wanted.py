"""What a target must be: its dtype and shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

AsStored = Callable[[str, str, str], bool]
"""Whether a source of a dtype keeps it on the way to a target: ``(source, dtype code, target)``."""


class TargetSpec(NamedTuple):
    """What a target must be."""

    dtype: str
    shape: tuple[int, ...]
    is_new: bool = False
    """No value is there yet: it takes the dtype that ``from_pretrained`` gives it, which is that of the sources after
    their cast, and they are cast to ``dtype`` of the first target of their rule."""
