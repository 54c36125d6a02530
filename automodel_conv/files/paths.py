"""Read the paths that callers give."""

from __future__ import annotations

import os

from automodel_conv.errors import UnsupportedError, kind_of, message


def text_of_path(path: str | bytes | os.PathLike[str]) -> str:
    """Return a path or a URL as text.

    Raises:
        UnsupportedError: it is neither, or empty.
    """
    is_path = isinstance(path, str | bytes | os.PathLike)
    text = os.fsdecode(path) if is_path else ""
    if not text:
        found = "an empty text" if is_path else "None" if path is None else kind_of(path)
        raise UnsupportedError(message("not a path", expected="a str, or a pathlib.Path", found=found))
    return text
