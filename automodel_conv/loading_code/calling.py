"""Call loading code with the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from automodel_conv.errors import UnsupportedError, kind_of, message
from automodel_conv.types import LoaderCalls

Load: TypeAlias = Callable[[Any], Any]
Targets: TypeAlias = nn.Module | Mapping[str, Tensor] | None
"""The module, or the tensors by name, that loading code fills; None if it returns tensors."""


def call(load: Load, given: Iterable[tuple[str, Tensor]], calls: LoaderCalls) -> Any:
    """Call loading code with sources by name; return its result, with everything that it yields."""
    result = load(iter(given) if calls == "pairs" else dict(given))
    return list(result) if isinstance(result, Iterator) else result


def returned(result: Any) -> dict[str, Tensor]:
    """Return the tensors that loading code returns, by name.

    Raises:
        UnsupportedError: it returns something else.
    """
    try:
        tensors = dict(result)
    except (TypeError, ValueError):
        tensors = {}
    if not tensors or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items()):
        raise UnsupportedError(
            message(
                "without targets=, the loading code must return its tensors",
                expected="a dict of tensors, or pairs of names and tensors",
                found=kind_of(result),
                do="pass targets=: the module or the tensors that it fills",
            )
        )
    return tensors
