"""Calls of transformers' own code, for targets with operations that could not be lowered to copies."""

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

_COMPARE = "load the checkpoint with from_pretrained(); if that works, report this error"


class FallbackCall(NamedTuple):
    """One call of transformers' own code."""

    fallback: Fallback
    rows: tuple[int, ...]
    """Rows of the sources that the call reads."""
    targets: tuple[Target, ...]
    """Targets that the call computes."""


def fallback_calls(plan: CopyPlan) -> list[FallbackCall]:
    """Return the calls of transformers' own code that a plan needs; one call computes all targets of a fallback."""
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
    """Run one call of transformers' own code, and copy its results to the buffers of its targets.

    The call runs on the device of the buffers, as in transformers, unless the fallback asks for the host. The memory
    that it allocates has no bound. Floating-point results are cast to the dtype of floating-point targets.

    Args:
        call: the call to run.
        sources: whole sources by row.
        buffers: buffers by target name. Written in place.

    Raises:
        ConversionError: the call failed, did not return a target, or returned it with a wrong shape or dtype.
    """
    names = ", ".join(target.name for target in call.targets)
    device = torch.device("cpu") if call.fallback.on_host else buffers[call.targets[0].name].device
    try:
        with torch.no_grad():
            results = call.fallback.convert({row: tensor.to(device) for row, tensor in sources.items()})
    except Exception as error:  # operations of users or of transformers may raise anything
        raise ConversionError(
            message(f"transformers' own code failed on {names}", found=repr(error), do=_COMPARE)
        ) from error
    for target in call.targets:
        tensor = results.get(target.name)
        if not isinstance(tensor, Tensor):
            text = f"transformers' own code did not return {target.name}"
            raise ConversionError(message(text, found=", ".join(results), do=_COMPARE))
        castable = dtype_code(tensor.dtype) in FLOATING and target.dtype in FLOATING
        if tensor.shape != target.shape or not (castable or dtype_code(tensor.dtype) == target.dtype):
            raise ConversionError(
                message(
                    f"transformers' own code returned {target.name} with a wrong shape or dtype",
                    expected=f"{target.dtype} {list(target.shape)}",
                    found=f"{dtype_code(tensor.dtype)} {list(tensor.shape)}",
                    do=_COMPARE,
                )
            )
        checked_buffer(target, buffers).copy_(tensor)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
