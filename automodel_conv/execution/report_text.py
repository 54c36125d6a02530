"""The text of reports: a row for each fact, and below a count the first of the names that it counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from automodel_conv.errors import listing, printable, rate_text, size_text
from automodel_conv.pictures.page import table

if TYPE_CHECKING:
    from rich.table import Table

NAMES_SHOWN = 3
"""Number of names that a report prints of each kind."""
_MOST_IN_REPR = 130


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
    return [Row(action, size_text(nbytes)), Row("speed", rate_text(gb_per_s))]


def phase_rows(seconds: Mapping[str, float]) -> list[Row]:
    """Return a row for the seconds of each phase."""
    labels = {"plan": "plan, with imports"}
    return [Row(f"seconds: {labels.get(phase, phase)}", f"{value:.3f}") for phase, value in seconds.items()]


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


class Report:
    """The ways in which all reports are shown: ``print`` as lines, rich and notebooks as a table, ``repr`` in short."""

    def _rows(self) -> list[Row]:
        raise NotImplementedError

    def __str__(self) -> str:
        return text_of(self._rows())

    def __repr__(self) -> str:
        return short_text(type(self).__name__, self._rows())

    def __rich__(self) -> Table:
        """Return the table that ``rich.print`` shows."""
        from rich.table import Table
        from rich.text import Text

        shown = Table(show_header=False)
        shown.add_column(overflow="fold")
        shown.add_column(justify="right")
        for cells in cells_of(self._rows()):
            shown.add_row(*map(Text, cells))
        return shown

    def _repr_html_(self) -> str:
        """Return the table that a notebook shows."""
        return table(cells_of(self._rows()))


def short_text(name: str, rows: Iterable[Row]) -> str:
    """Return one line of at most 200 characters with a name and the first rows that fit."""
    facts: list[str] = []
    for row in rows:
        fact = f"{row.label}: {row.value}"
        if len(", ".join([*facts, fact])) > _MOST_IN_REPR:
            break
        facts.append(fact)
    return printable(f"<{name}{': ' if facts else ''}{', '.join(facts)}; print() shows all>")


def cells_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the label of each row, with its first names below it, and its value."""
    names = [f"\n{listing(row.names, NAMES_SHOWN)}" if row.names else "" for row in rows]
    return [(printable(row.label + below), printable(row.value)) for row, below in zip(rows, names, strict=True)]
