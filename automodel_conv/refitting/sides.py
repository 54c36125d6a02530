"""The tensors that this rank sends and fills, as they are when a refit begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from automodel_conv.distributed.placements import local_of
from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.loading_code.calling import Load
from automodel_conv.publishing.saved import saved_tensors
from automodel_conv.refitting.engine import tensors_of_engine


class RankTensors(NamedTuple):
    """The memory of this rank's tensors by name: of the trainer's module, and of the engine's."""

    sent: Mapping[str, Tensor]
    filled: Mapping[str, Tensor]

    @property
    def specs(self) -> dict[tuple[int, str], tuple[Any, ...]]:
        """Dtype, shape and kind of device of each tensor, by its side and name."""
        return {
            (side, name): (tensor.dtype, tensor.shape, tensor.device.type)
            for side, tensors in enumerate(self)
            for name, tensor in tensors.items()
        }

    @property
    def places(self) -> list[Any]:
        """Addresses and strides of all tensors."""
        return [(tensor.data_ptr(), tensor.stride()) for tensors in self for tensor in tensors.values()]


@dataclass(frozen=True)
class Sides:
    """The modules of this rank, and the names of their tensors that take part."""

    trainer: nn.Module | None
    """Without the wrappers of torch."""
    engine: nn.Module | None
    """The same, unless there is a loader."""
    loader: Load | None
    sent: tuple[str, ...]
    """All tensors of the trainer's module."""
    held: tuple[str, ...]
    """All tensors of the engine's module."""
    filled: tuple[str, ...]
    """Those of the engine's module that are filled."""

    def tensors(self) -> RankTensors:
        """Return the tensors that the modules have now.

        Raises:
            UnsupportedError: a module has other tensors than before.
        """
        sent = {} if self.trainer is None else saved_tensors(self.trainer)
        filled = {} if self.engine is None else tensors_of_engine(self.engine, self.loader)
        lines = [*_differences(self.sent, sent), *_differences(self.held, filled)]
        if lines:
            raise _changed(lines)
        return RankTensors(
            {name: local_of(sent[name].detach()) for name in self.sent},
            {name: local_of(filled[name].detach()) for name in self.filled},
        )


def _differences(planned: Iterable[str], now: Iterable[str]) -> list[str]:
    """Return a line for each name that is gone or new."""
    before, after = dict.fromkeys(planned), dict.fromkeys(now)
    return [
        *(f"{name} is gone" for name in before if name not in after),
        *(f"{name} is new" for name in after if name not in before),
    ]


def refuse_changes(planned: Mapping[tuple[int, str], tuple[Any, ...]], now: RankTensors) -> None:
    """Raise UnsupportedError if tensors are not as they were when the refit was planned.

    Args:
        planned: their ``specs`` then.
        now: the tensors.
    """
    changed = [(key[1], spec, planned[key]) for key, spec in now.specs.items() if spec != planned[key]]
    if changed:
        raise _changed([f"{name}: {_text(*spec)} instead of {_text(*before)}" for name, spec, before in changed])


def _text(dtype: Any, shape: Sequence[int], device: str) -> str:
    return f"{dtype} {list(shape)} on {device}"


def _changed(lines: list[str]) -> UnsupportedError:
    return UnsupportedError(
        message(
            "the tensors of a module have changed since the refit was planned",
            found="\n" + listing(lines),
            do="construct a new Refit on all ranks",
        )
    )
