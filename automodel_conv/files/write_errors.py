"""Raise what the system refuses during a write as a WriteError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from automodel_conv.errors import WriteError, message


@contextmanager
def write_errors(path: str, what: str = "to a directory", expected: str | None = None) -> Iterator[None]:
    """Raise an OSError of the block as a WriteError.

    Args:
        path: that is written to, for an error that names no file.
        what: cannot be written, for the error.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(
            message(
                f"cannot write {what}",
                where=error.filename or path,
                expected=expected,
                found=error,
                do="look at the disk, its quota and the permissions",
            )
        ) from error
