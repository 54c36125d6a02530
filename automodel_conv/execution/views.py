"""Targets as views of tensors in memory, and copies of targets that are no views."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from automodel_conv.dtypes import dtype_code
from automodel_conv.execution.buffers import allocate, strided
from automodel_conv.execution.fallbacks import FallbackCall, run_fallback
from automodel_conv.execution.memory import convert_tensors, with_source_strides
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.views import View, view_of


class ViewOrCopy:
    """Computes one target at a time: as a view of its source if it is one, else as a new tensor.

    What is found for a target applies to all that share its copies, as targets of equal layers do, so only the first
    call plans.
    """

    def __init__(self) -> None:
        self._views: dict[tuple[object, ...], View | None] = {}

    def __call__(self, target: Target, sources: Sequence[Tensor]) -> Tensor:
        """Return a target, of its shape and dtype and with any strides, on the device of its sources.

        Args:
            target: the target. It must live as long as this object.
            sources: its sources, with any strides.

        Raises:
            UnsupportedError: torch does not have the dtype of the target.
            ConversionError: transformers' own code, which computes the target, failed.
        """
        view = self._view(target, sources)
        if view is not None:
            return strided(sources[0].detach(), *view)
        buffers = allocate([target], sources[0].device)
        if target.fallback is not None:
            call = FallbackCall(target.fallback, target.sources, (target,))
            run_fallback(call, dict(zip(target.sources, sources, strict=True)), buffers)
            return buffers[target.name]
        table = SourceTable(
            [f"source {number} of {target.name}" for number in range(len(sources))],
            [dtype_code(source.dtype) or "" for source in sources],
            [tuple(source.shape) for source in sources],
        )
        own = target._replace(sources=tuple(range(len(sources))))
        convert_tensors(CopyPlan(table, (own,)), sources, buffers, backend="auto")
        return buffers[target.name]

    def _view(self, target: Target, sources: Sequence[Tensor]) -> View | None:
        if len(sources) != 1 or target.fallback is not None or target.fills:
            return None
        [source] = sources
        if dtype_code(source.dtype) != target.dtype:
            return None
        key = id(target.copies), target.shape, source.stride()
        if key not in self._views:
            copies, read = with_source_strides(target.copies, [source])
            self._views[key] = view_of(target.shape, copies) if read[0] is source else None
        return self._views[key]
