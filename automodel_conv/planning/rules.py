"""What planning asks of a list of rules; ``upstream/rules.py`` answers with transformers' own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from automodel_conv.planning.operations import Operation


class Rules(Protocol):
    """An ordered list of rules, ready to be asked about the names of one checkpoint.

    Rules that rename come first, then converters, which have rows; reversed, for saving, it is the other way round.
    """

    reverse: bool

    def __len__(self) -> int:
        """All rules, those that only rename too."""
        ...

    @property
    def converters(self) -> Sequence[Any]:
        """The rules that convert, by row."""
        ...

    def rename(self, name: str) -> tuple[str, int, str]:
        """``(target name, converter row or -1, source pattern)``, without the model's prefix."""
        ...

    def rename_part(self, name: str) -> str:
        """The final name of something a reversed converter made."""
        ...

    def with_prefix(self, name: str, targets: Mapping[str, object]) -> str:
        """The name with the model's base prefix added or removed, where that makes it one of the targets."""
        ...

    def looks_at_digits(self, name: str) -> bool:
        """True if some rule could treat this name differently with other numbers in it."""
        ...

    def natural_key(self, name: str) -> Any:
        """The order in which the parts of a merged target are collected."""
        ...

    def patterns(self, row: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The source and the target patterns of a converter."""
        ...

    def describe(self, row: int) -> str:
        """A converter in words."""
        ...

    def operations(self, row: int) -> tuple[Operation, ...]:
        """A converter's chain as data.

        Raises:
            NotLowerable: it cannot be had as data; the text says why.
        """
        ...

    def on_host(self, row: int) -> bool:
        """Whether the operations of a converter run on the CPU, wherever the target goes."""
        ...

    def upstream(
        self, row: int, target: str, slots: Mapping[str, Sequence[int]], cast: Mapping[int, Any]
    ) -> Callable[..., dict[str, Any]]:
        """The conversion of one target by the rule's own code, from ``{source row: tensor}`` to ``{name: tensor}``."""
        ...
