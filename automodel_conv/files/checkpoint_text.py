"""Describe a checkpoint as one line and as rows, for shells and notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from automodel_conv.errors import count_of, printable, size_text

_LONGEST_PATH = 100


def line_of(path: str, files: Sequence[str], nbytes: Sequence[int]) -> str:
    """Return the size and the path of a checkpoint as one line of at most 200 characters.

    Args:
        path: path of the checkpoint.
        files: its files.
        nbytes: size of each tensor in bytes.
    """
    path = printable(path).replace("\n", " ")
    end = f"...{path[-_LONGEST_PATH:]}" if len(path) > _LONGEST_PATH else path
    tensors, held = count_of(len(nbytes), "tensor"), count_of(len(files), "file")
    return f"<Checkpoint: {tensors}, {size_text(sum(nbytes))} in {held}, {end}>"


def rows_of(
    path: str, files: Sequence[str], dtypes: Sequence[str], nbytes: Sequence[int], layouts: Sequence[str], others: int
) -> list[tuple[str, str]]:
    """Return labels and values of a checkpoint.

    Args:
        path, files, nbytes: see ``line_of``.
        dtypes: dtype code of each tensor.
        layouts: layouts of experts that the files state.
        others: number of tensors in the files that the index does not name.
    """
    counts, sizes = Counter(dtypes), Counter[str]()
    for dtype, size in zip(dtypes, nbytes, strict=True):
        sizes[dtype] += size
    return [
        ("path", printable(path)),
        ("files", str(len(files))),
        ("tensors", str(len(nbytes))),
        ("size", size_text(sum(nbytes))),
        *((f"tensors of {dtype}", f"{counts[dtype]}, {size_text(size)}") for dtype, size in sizes.most_common()),
        *([("layout of experts", printable(", ".join(layouts)))] if layouts else []),
        *([("tensors that the index leaves out", str(others))] if others else []),
    ]
