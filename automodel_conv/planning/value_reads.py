"""Functions of torch that no dispatch mode sees: they read values of tensors, or ask whether they have data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from automodel_conv.planning.hidden_data import DEVICES, SET_DATA
from automodel_conv.planning.loader_trace import LoaderTrace
from automodel_conv.planning.loader_writes import NeedsValues
from automodel_conv.planning.own_values import TAKING_VALUES, keeping_values

_TO_OTHERS = frozenset(
    {
        *(Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.__dlpack_device__),
        *(Tensor.untyped_storage, Tensor.storage),  # also of pickle and torch.save
    }
)
"""Functions after which others than torch have the elements."""
_SETTERS = (SET_DATA, Tensor.set_)
_WATCHED = frozenset({*_TO_OTHERS, *DEVICES, Tensor.data_ptr, *_SETTERS, *TAKING_VALUES})


class ValueReads(TorchFunctionMode):
    """Answers for tensors without data what no dispatch mode is asked.

    It raises NeedsValues where they would become Python values or arrays, and hides that they have no data: loading
    code may do something else on the meta device, such as to compute shapes only. What the code makes itself keeps its
    values, see ``own_values.py``.
    """

    def __init__(self, trace: LoaderTrace):
        super().__init__()
        self._trace = trace

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _WATCHED:
            return func(*args, **(kwargs or {}))
        if func in _TO_OTHERS:
            if not self._trace.has_data(args[0]):
                raise NeedsValues(f"Tensor.{func.__name__}", [self._trace.keep(args[0])])
            if func is not Tensor.tolist:
                self._trace.escapes(args[0])
        elif func in DEVICES:
            return DEVICES[func](self._trace.device_of(args[0]))
        elif func == Tensor.data_ptr:
            if args[0].is_meta:
                return self._trace.address(args[0])
            self._trace.escapes(args[0])
        elif func in _SETTERS and isinstance(args[1], Tensor) and args[0].is_meta != args[1].is_meta:
            if args[1].is_meta:
                raise NeedsValues("Tensor.data", [self._trace.keep(args[1])])
            args = args[0], args[1].to("meta")
        args, kwargs = keeping_values(func, args, kwargs or {}, self._trace.has_data)
        return func(*args, **kwargs)
