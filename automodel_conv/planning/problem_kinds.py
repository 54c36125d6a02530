"""Report many problems of one kind once: the text of the first, two more names, and how many others there are.

A fault of a config or of a naming scheme affects every weight. Thousands of equal lines would hide other problems.
"""

from __future__ import annotations

_NAMED = 3


class ProblemKinds:
    """Problems in the order of their first occurrence, by kind."""

    def __init__(self) -> None:
        self._by_kind: dict[str, list[tuple[str, ...]]] = {}

    def add(self, kind: str, *names: str) -> None:
        """Add a problem.

        Args:
            kind: its text, with ``{}`` for each name.
            names: the names in its text. The first distinguishes the problem from others of its kind.
        """
        self._by_kind.setdefault(kind, []).append(names)

    def __len__(self) -> int:
        return sum(map(len, self._by_kind.values()))

    def texts(self, most: int = _NAMED) -> list[str]:
        """Return a text for each problem, or one for each kind that has more than ``most``.

        Args:
            most: at least 3.
        """
        return [text for kind, problems in self._by_kind.items() for text in _texts(kind, problems, most)]


def _texts(kind: str, problems: list[tuple[str, ...]], most: int) -> list[str]:
    if len(problems) <= most:
        return [kind.format(*names) for names in problems]
    named = ", ".join(first for first, *_ in problems[1:_NAMED])
    return [f"{kind.format(*problems[0])}; the same for {named} and {len(problems) - _NAMED} more"]
