"""The comparison of a file with the bytes that its slabs should contain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import VerificationError, message
from automodel_conv.execution.writing import SlabGroup, first_different_byte
from automodel_conv.files.shards import Shard
from automodel_conv.files.source import ByteSource


def compare_file(
    group: SlabGroup,
    source: ByteSource,
    shard: Shard,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Compare a file with its slabs, and raise VerificationError for the first element that differs.

    Args:
        group: slabs of the file.
        source: the file to compare.
        shard: names, shapes, dtypes and offsets of the tensors in the file.
        threads: number of threads that compare.
        advance: function that is called with each number of bytes compared.
    """
    offset = first_different_byte(group, source, threads, advance)
    if offset is None:
        return
    spec, start = next(
        (spec, start)
        for spec, start in zip(shard.specs, shard.offsets, strict=True)
        if start <= offset < start + spec.nbytes
    )
    element = (offset - start) // itemsize(spec.dtype)
    index = [int(i) for i in np.unravel_index(element, spec.shape or (1,))]
    raise VerificationError(
        message(
            f"{spec.name} does not match its source",
            where=f"{source.describe()}, byte {offset}",
            found=f"the first element that differs is {index} of {spec.dtype} {list(spec.shape)}",
            do="the file or the source was changed, or a disk or its memory is broken",
        )
    )
