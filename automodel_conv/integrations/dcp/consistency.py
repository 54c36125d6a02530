"""Checks that ranks agree on the checkpoint that they save together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from math import prod

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from automodel_conv.distributed.holders import MAKE_REPLICAS_EQUAL, unlike_replicas
from automodel_conv.errors import CoverageError, RankError, listing, message


def shared_items(items: Sequence[Sequence[WriteItem]]) -> list[list[WriteItem]]:
    """Return the items of each rank that other ranks hold too.

    Args:
        items: all items of each rank.

    Raises:
        RankError: tensors of one name have different shapes or dtypes.
        CoverageError: parts with the same offsets have different sizes.
    """
    specs: dict[str, tuple[object, ...]] = {}
    sizes: dict[MetadataIndex, tuple[int, ...]] = {}
    held: Counter[MetadataIndex] = Counter()
    for item in chain.from_iterable(items):
        if item.tensor_data is None or not prod(item.tensor_data.chunk.sizes):
            continue
        name, data = item.index.fqn, item.tensor_data
        spec = tuple(data.size), data.properties.dtype
        first = specs.setdefault(name, spec)
        if spec != first:
            found = f"{first} and {spec}"
            raise RankError(message(f"{name} differs from rank to rank", found=found, do=MAKE_REPLICAS_EQUAL))
        size = sizes.setdefault(item.index, tuple(data.chunk.sizes))
        if size != tuple(data.chunk.sizes):
            found = f"parts of {list(size)} and {list(data.chunk.sizes)} at {list(data.chunk.offsets)}"
            raise CoverageError(message(f"ranks divide {name} in different ways", found=found, do=MAKE_REPLICAS_EQUAL))
        held[item.index] += 1
    return [[item for item in rank_items if held[item.index] > 1] for rank_items in items]


def refuse_failures(results: Sequence[Sequence[WriteResult]]) -> None:
    """Raise the errors in the results of ``write_data``: the error itself with one rank, RankError with several."""
    errors = {
        rank: result.storage_data
        for rank, rank_results in enumerate(results)
        for result in rank_results
        if isinstance(result.storage_data, Exception)
    }
    if errors and len(results) == 1:
        raise errors[0]
    if errors:
        listed = listing(f"rank {rank}: {type(error).__name__}: {error}" for rank, error in errors.items())
        text = f"saving failed on {len(errors)} of the participating ranks"
        raise RankError(message(text, found="\n" + listed))


def refuse_unlike(results: Sequence[Sequence[WriteResult]]) -> None:
    """Compare the checksums that all ranks have added to the results of ``write_data``.

    Raises:
        RankError: ranks that hold the same part of a tensor hold different bytes.
    """
    first: dict[MetadataIndex, tuple[int, int]] = {}
    unlike: dict[str, str] = {}
    for rank, rank_results in enumerate(results):
        for result in rank_results:
            if result.storage_data is not None:
                first_rank, checksum = first.setdefault(result.index, (rank, result.storage_data))
                if checksum != result.storage_data:
                    unlike.setdefault(result.index.fqn, f"rank {rank} and rank {first_rank}")
    if unlike:
        raise unlike_replicas(sorted(unlike.items()))
