"""Compare a file with the bytes that its slabs make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import VerificationError, message
from automodel_conv.execution.writing import SlabProducer, first_different_byte
from automodel_conv.files.shards import Shard
from automodel_conv.files.source import ByteSource
from automodel_conv.schedule.writes import Slab


def compare_file(
    slabs: tuple[Sequence[Slab], Callable[[], SlabProducer]],
    source: ByteSource,
    shard: Shard,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Raise VerificationError for the first element of a file that is not what the slabs make."""
    at = first_different_byte(slabs[0], source, slabs[1], threads, advance)
    if at is None:
        return
    spec, begin = next(
        (spec, begin)
        for spec, begin in zip(shard.specs, shard.offsets, strict=True)
        if begin <= at < begin + spec.nbytes
    )
    element = (at - begin) // itemsize(spec.dtype)
    index = [int(i) for i in np.unravel_index(element, spec.shape or (1,))]
    raise VerificationError(
        message(
            f"{spec.name} is not what the source makes it",
            where=f"{source.describe()}, byte {at}",
            found=f"the first element that differs is {index} of {spec.dtype} {list(spec.shape)}",
            do="the file or the source was changed, or a disk or its memory is broken",
        )
    )
