"""What ranks that save together must agree on, and the errors where they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from math import prod

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from automodel_conv.distributed.holders import ALIKE, unlike_replicas
from automodel_conv.errors import CoverageError, RankError, listing, message


def shared_items(items: Sequence[Sequence[WriteItem]]) -> list[list[WriteItem]]:
    """The items of each rank that other ranks hold too.

    Raises:
        RankError: tensors of one name have different shapes or dtypes.
        CoverageError: parts that begin in the same place have different sizes.
    """
    like: dict[str, tuple[object, ...]] = {}
    sizes: dict[MetadataIndex, tuple[int, ...]] = {}
    held: Counter[MetadataIndex] = Counter()
    for item in chain.from_iterable(items):
        if item.tensor_data is None or not prod(item.tensor_data.chunk.sizes):
            continue
        name, data = item.index.fqn, item.tensor_data
        found = tuple(data.size), data.properties.dtype
        first = like.setdefault(name, found)
        if found != first:
            raise RankError(message(f"{name} differs from rank to rank", found=f"{first} and {found}", do=ALIKE))
        size = sizes.setdefault(item.index, tuple(data.chunk.sizes))
        if size != tuple(data.chunk.sizes):
            found = f"parts of {list(size)} and {list(data.chunk.sizes)} at {list(data.chunk.offsets)}"
            raise CoverageError(message(f"ranks divide {name} in different ways", found=found, do=ALIKE))
        held[item.index] += 1
    return [[item for item in each if held[item.index] > 1] for each in items]


def refuse_failures(results: Sequence[Sequence[WriteResult]]) -> None:
    """Raise what ``write_data`` has met: the error itself where there is one rank, RankError where there are more."""
    errors = {
        rank: result.storage_data
        for rank, each in enumerate(results)
        for result in each
        if isinstance(result.storage_data, Exception)
    }
    if errors and len(results) == 1:
        raise errors[0]
    if errors:
        found = listing(f"rank {rank}: {type(error).__name__}: {error}" for rank, error in errors.items())
        raise RankError(message(f"saving failed on {len(errors)} of the ranks that do it together", found="\n" + found))


def refuse_unlike(results: Sequence[Sequence[WriteResult]]) -> None:
    """Compare the checksums of all ranks, which ``write_data`` adds to its results.

    Raises:
        RankError: ranks that hold the same part of a tensor hold different bytes.
    """
    first: dict[MetadataIndex, tuple[int, int]] = {}
    unlike: dict[str, str] = {}
    for rank, each in enumerate(results):
        for result in each:
            if result.storage_data is not None:
                of, checksum = first.setdefault(result.index, (rank, result.storage_data))
                if checksum != result.storage_data:
                    unlike.setdefault(result.index.fqn, f"rank {rank} and rank {of}")
    if unlike:
        raise unlike_replicas(sorted(unlike.items()))
