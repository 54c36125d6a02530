"""Targets that upstream's own code makes, because their operations could not be lowered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.dtypes import FLOATING, dtype_code
from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.buffers import checked_buffer
from automodel_conv.planning.copies import Fallback, Target
from automodel_conv.planning.plan import CopyPlan


class FallbackCall(NamedTuple):
    """One call of upstream's code: the source rows it takes and the targets it makes."""

    fallback: Fallback
    rows: tuple[int, ...]
    targets: tuple[Target, ...]


def fallback_calls(plan: CopyPlan) -> list[FallbackCall]:
    """The calls of a plan; targets that carry the same fallback are made by one."""
    groups: dict[int, list[Target]] = {}
    for target in plan.targets:
        if target.fallback is not None:
            groups.setdefault(id(target.fallback), []).append(target)
    return [
        FallbackCall(fallback, tuple(dict.fromkeys(row for t in group for row in t.sources)), tuple(group))
        for group in groups.values()
        if (fallback := group[0].fallback) is not None
    ]


def run_fallback(call: FallbackCall, sources: Mapping[int, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Let upstream's code make its targets, allocating as it does, and copy them to their buffers.

    It runs where the buffers are, as upstream runs it, unless it asks for the host. Floating results are cast to the
    dtype of targets that have one already.

    Raises:
        ConversionError: a target was not made, or has the wrong shape or dtype.
    """
    names = ", ".join(target.name for target in call.targets)
    device = torch.device("cpu") if call.fallback.on_host else buffers[call.targets[0].name].device
    try:
        with torch.no_grad():
            made = call.fallback.convert({row: tensor.to(device) for row, tensor in sources.items()})
    except Exception as error:  # whatever a user's or upstream's operation raises
        raise ConversionError(message(f"upstream's own code failed on {names}", found=repr(error))) from error
    for target in call.targets:
        tensor = made.get(target.name)
        if not isinstance(tensor, Tensor):
            raise ConversionError(message(f"upstream's own code did not make {target.name}", found=", ".join(made)))
        castable = dtype_code(tensor.dtype) in FLOATING and target.dtype in FLOATING
        if tensor.shape != target.shape or not (castable or dtype_code(tensor.dtype) == target.dtype):
            raise ConversionError(
                message(
                    f"upstream's own code made {target.name} differently",
                    expected=f"{target.dtype} {list(target.shape)}",
                    found=f"{dtype_code(tensor.dtype)} {list(tensor.shape)}",
                )
            )
        checked_buffer(target, buffers).copy_(tensor)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
