"""The text of reports: a row for each fact, and below a count the first of the names that it counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from automodel_conv.errors import listing, printable, size_text

NAMES_SHOWN = 3
"""Number of names that a report prints of each kind."""


class Row(NamedTuple):
    """A row of a report."""

    label: str
    """Name of the fact."""
    value: str
    """The fact as text, with its unit."""
    names: tuple[str, ...] = ()
    """Names that the value counts."""


def count_row(label: str, names: Iterable[object]) -> Row:
    """Return the row that counts names."""
    texts = tuple(map(str, names))
    return Row(label, str(len(texts)), texts)


def cost_rows(action: str, nbytes: int, gb_per_s: float) -> list[Row]:
    """Return the rows of the bytes that were read or written, and of the speed."""
    return [Row(action, size_text(nbytes)), Row("speed", f"{gb_per_s:.2f} GB/s")]


def memory_row(nbytes: int) -> Row:
    """Return the row of the memory used in addition to the tensors."""
    return Row("peak extra memory, at most", size_text(nbytes))


def text_of(rows: Iterable[Row]) -> str:
    """Return rows as lines with aligned values and, below a row, its first names.

    The text is safe to print, whatever the names contain.
    """
    rows = list(rows)
    width = max(len(row.label) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.label:<{width}}  {row.value}")
        if row.names:
            lines.append(listing(row.names, NAMES_SHOWN))
    return printable("\n".join(lines))
