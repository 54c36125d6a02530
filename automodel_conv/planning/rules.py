"""The protocol of a list of rules for planning; ``upstream/rules.py`` implements it with transformers' own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from automodel_conv.planning.operations import Operation


class Rules(Protocol):
    """An ordered list of rules that is ready for the names of one checkpoint.

    Rules that rename come first, then converters, which have rows. Reversed rules, for saving, start with converters.
    """

    reverse: bool
    """Whether the rules are reversed."""

    def __len__(self) -> int:
        """Return the number of rules, including those that only rename."""
        ...

    @property
    def converters(self) -> Sequence[Any]:
        """Rules that convert, by row."""
        ...

    def rename(self, name: str) -> tuple[str, int, str]:
        """Return ``(target name, converter row or -1, source pattern)``, without the model's prefix."""
        ...

    def rename_part(self, name: str) -> str:
        """Return the final name of an output of a reversed converter."""
        ...

    def with_prefix(self, name: str, targets: Mapping[str, object]) -> str:
        """Return the name with the model's base prefix added or removed, if that turns it into one of the targets."""
        ...

    def looks_at_digits(self, name: str) -> bool:
        """Return whether a rule could treat this name differently if its numbers were others."""
        ...

    def natural_key(self, name: str) -> Any:
        """Return the sort key that orders the parts of a merged target."""
        ...

    def patterns(self, row: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the source patterns and the target patterns of a converter."""
        ...

    def describe(self, row: int) -> str:
        """Return a text that describes a converter."""
        ...

    def operations(self, row: int) -> tuple[Operation, ...]:
        """Return a converter's chain of operations as data.

        Raises:
            NotLowerable: an operation cannot be expressed as data; the text states why.
        """
        ...

    def on_host(self, row: int) -> bool:
        """Return whether the operations of a converter run on the CPU wherever the target is."""
        ...

    def upstream(
        self, row: int, target: str, slots: Mapping[str, Sequence[int]], cast: Mapping[int, Any]
    ) -> Callable[..., dict[str, Any]]:
        """Return the rule's own code for one target, as a function from ``{source row: tensor}`` to ``{name: tensor}``.

        Args:
            row: row of the converter.
            target: first target of the rule.
            slots: source rows for each source pattern.
            cast: dtypes that sources are cast to first, by source row.
        """
        ...
