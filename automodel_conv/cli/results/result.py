"""The base of all results, and a function that fills one from a report.

The text below each field is its description in ``docs/cli-schema.json`` and on the page about JSON.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec


class Result(msgspec.Struct, frozen=True):
    """The result of a command."""

    @property
    def status(self) -> int:
        """Exit status of the command: 1 if the result shows a problem."""
        return 0


_Filled = TypeVar("_Filled", bound=msgspec.Struct)


def filled(kind: type[_Filled], report: object, **others: Any) -> _Filled:
    """Return a result whose fields are the attributes of a report with the same names.

    Args:
        kind: class of the result.
        report: the report.
        **others: fields that the report lacks, or has in another form.
    """
    names = [name for name in kind.__struct_fields__ if name not in others]
    return kind(**{name: getattr(report, name) for name in names}, **others)
