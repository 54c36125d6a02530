"""The results of ``adapter convert`` and ``adapter inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from automodel_conv.cli.results.result import Result, filled

if TYPE_CHECKING:
    from automodel_conv.adapters import AdapterReport
    from automodel_conv.lora.inspecting import AdapterSummary


class AdapterConverted(Result, frozen=True):
    """The result of ``adapter convert``: the fields of an ``AdapterReport``."""

    files: tuple[str, ...]
    """Names of the weight files."""
    modules: tuple[str, ...]
    """Names of the modules in the new adapter."""
    zeros: tuple[str, ...]
    """Names of stacks, each with the number of a matrix that is zero because the adapter does not train all of it."""
    left_out: tuple[str, ...]
    """Tensors of the base whose matrices in a stack were zero, so that they have no module in the new adapter."""
    shared: tuple[str, ...]
    """Tensors of the base whose modules have all ranks of an old module."""
    bytes_written: int
    """Bytes of the weight files."""
    files_copied: tuple[str, ...]
    """Paths of the files next to the weights that were copied."""
    seconds: float
    """Duration of the call."""


class Modules(msgspec.Struct, frozen=True):
    """Modules of an adapter whose names differ only in the numbers of layers and experts."""

    name: str
    """Name of the weights that they change, with `*` for these numbers."""
    layers: tuple[int, ...]
    """Numbers of the layers."""
    experts: tuple[int, ...]
    """Numbers of the experts; empty if the weights belong to no expert."""
    base_layers: int
    """Number of layers with such weights in the base."""
    base_experts: int
    """Number of experts with such weights in a layer of the base."""
    rank: int | None
    """Rank of the matrices; null if the adapter replaces the weights."""
    scale: float | None
    """Factor of their products; null if the adapter replaces the weights."""
    problem: str | None
    """Why the modules would have no effect; null if they have one."""


class Inspected(Result, frozen=True):
    """The result of ``adapter inspect``: the fields of an ``AdapterSummary``."""

    path: str
    """Path of the adapter."""
    base: str
    """Path of the checkpoint of the base model."""
    form: str
    """Form of the adapter: `per_expert`, `transformers` or `vllm`."""
    modules: int
    """Number of modules."""
    problems: tuple[str, ...]
    """Each module that would have no effect, and why; the status is 1 if there is one."""
    why_no_model: str | None
    """Why the names of the model are not known, only those of the checkpoint; else null."""
    rows: tuple[Modules, ...]
    """The modules."""

    @property
    def status(self) -> int:
        return 1 if self.problems else 0


def adapter_converted(report: AdapterReport) -> AdapterConverted:
    """Return the result of a conversion of an adapter."""
    return filled(AdapterConverted, report)


def inspected(summary: AdapterSummary) -> Inspected:
    """Return the result of an inspection."""
    return filled(Inspected, summary, rows=tuple(filled(Modules, row) for row in summary.rows))
