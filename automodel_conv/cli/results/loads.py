"""The results of ``load`` and ``verify``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from automodel_conv.cli.results.result import Result, filled

if TYPE_CHECKING:
    from automodel_conv.execution.page_policy import PageUse
    from automodel_conv.execution.report import LoadReport


class Mismatch(msgspec.Struct, frozen=True):
    """A tensor whose shapes in the checkpoint and in the model differ."""

    name: str
    """Name of the tensor in the model."""
    checkpoint_shape: tuple[int, ...]
    """Shape in the checkpoint."""
    model_shape: tuple[int, ...]
    """Shape in the model."""


class Claims(msgspec.Struct, frozen=True):
    """A target and sources that belong to it."""

    name: str
    """Name of the target."""
    sources: tuple[str, ...]
    """Names of the sources."""


class Place(msgspec.Struct, frozen=True):
    """A tensor and the file that has it."""

    name: str
    """Name of the tensor."""
    file: str
    """Name of the file."""


class Pages(msgspec.Struct, frozen=True):
    """The new memory of a load by page size."""

    huge_bytes: int
    """Bytes for which the load asked for huge pages."""
    small_bytes: int
    """Bytes for which the load asked for small pages."""
    huge_gb_per_s: float | None
    """10^9 bytes that one thread writes per second to huge pages; null if not measured."""
    small_gb_per_s: float | None
    """The same for small pages."""


class LoadResult(Result, frozen=True):
    """The result of ``load``: the fields of a ``LoadReport``, except its timeline."""

    tensors: int
    """Number of tensors that were loaded."""
    bytes_read: int
    """Bytes of tensor data that were requested from the files, with small gaps between tensors."""
    bytes_mapped: int
    """Bytes of the targets that were mapped instead of read."""
    bytes_received: int
    """Bytes of all answers of servers; 0 for files on this machine."""
    gb_per_s: float
    """10^9 bytes read per second of the phase `read`."""
    seconds: Mapping[str, float]
    """Seconds by phase: `open`, `plan`, `read`, and `verify` if checksums were compared."""
    peak_extra_bytes: int
    """Upper bound of the memory used in addition to the tensors."""
    threads: int
    """Largest number of threads that read at the same time."""
    requests: int
    """Number of requests to servers."""
    retries: int
    """Number of requests that were repeated."""
    connections: int
    """Largest number of connections that were open at the same time."""
    pages: Pages | None
    """New memory by page size; null if no tensor was read to the host."""
    copied_by_kernels: int
    """Number of copies on a device by kernels."""
    copied_by_torch: int
    """Number of copies on a device by torch."""
    without_kernels: str | None
    """Why no kernel can run on the device; null if kernels can run or none is needed."""
    missing_keys: tuple[str, ...]
    """Names of targets that no source provides."""
    unexpected_keys: tuple[str, ...]
    """Names that the model does not have."""
    mismatched_keys: tuple[Mismatch, ...]
    """Targets that were left unchanged because shapes differ."""
    duplicated_keys: tuple[Claims, ...]
    """Targets that several sources claim; the first source was used."""
    fallbacks: tuple[str, ...]
    """Names of targets that transformers' own code computed."""
    left_out: tuple[str, ...]
    """Names of tensors of the checkpoint that no target uses."""
    unindexed: tuple[Place, ...]
    """Tensors that were not read because the index does not map them to that file."""
    carried: tuple[str, ...]
    """Always empty, because a load carries nothing over."""
    computed: Mapping[str, str]
    """Targets that loading code computed, and why."""
    rewritten: tuple[str, ...]
    """Names of targets that loading code wrote twice."""
    adapted: tuple[str, ...]
    """Names of targets that an adapter changed."""


def load_result(report: LoadReport, tensors: int) -> LoadResult:
    """Return the result of a load of so many tensors."""
    return filled(
        LoadResult,
        report,
        tensors=tensors,
        pages=None if report.pages is None else pages_of(report.pages),
        mismatched_keys=tuple(Mismatch(*mismatch) for mismatch in report.mismatched_keys),
        duplicated_keys=tuple(Claims(*claims) for claims in report.duplicated_keys),
        unindexed=tuple(Place(*place) for place in report.unindexed),
    )


def pages_of(pages: PageUse) -> Pages:
    """Return the new memory of a load."""
    return filled(Pages, pages)


class ComparedWithSource(Result, frozen=True, tag_field="kind", tag="conversion"):
    """The result of ``verify`` with a destination: it is bit-identical to a conversion of the source."""

    tensors: int
    """Number of tensors of the destination."""
    files: int
    """Number of files of the destination."""
    nbytes: int
    """Bytes of all tensors that were compared."""
    is_copy: bool
    """Whether each tensor is one of the source, unchanged."""


class ComparedWithChecksums(Result, frozen=True, tag_field="kind", tag="checksums"):
    """The result of ``verify`` without a destination: all tensors match their checksums."""

    tensors: int
    """Number of tensors."""
    nbytes: int
    """Bytes of all tensors that were compared."""
