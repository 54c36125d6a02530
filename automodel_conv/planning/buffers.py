"""Buffers of grouped experts, and the layouts that they make up: names, axes, and the order of the elements; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from automodel_conv.planning.axes import dims_of, sizes_of


class Blocks(NamedTuple):
    """The order in which a kernel reads the elements of a buffer, if its shape does not show it."""

    axes: str
    """The axes of the buffer in their order, each split into its parts: ``"E (m a b) (n k)"``."""
    order: str
    """The parts in the order of the elements in memory, outermost first: ``"E n m b a k"``."""
    sizes: tuple[tuple[str, int], ...]
    """The sizes of all parts except the first of each axis."""


class Buffer(NamedTuple):
    """A tensor that holds one or two projections of all experts of a module.

    The axes are E (experts), g (projections), i (intermediate size) and h (hidden size).
    """

    name: str
    axes: str
    """Axes in einops notation. Parentheses merge g and another axis into one dimension."""
    projections: tuple[str, ...]
    """Names of the projections, in their order along g."""
    blocks: Blocks | None = None
    """The order of the elements in memory; None: that of ``axes``. The shape is always that of ``axes``."""
    multiples: tuple[tuple[str, int], ...] = ()
    """Axes whose size must be a multiple of a number, with the number."""
    padded: tuple[tuple[str, int], ...] = ()
    """Axes that are filled with zeros up to a multiple of a number, with the number."""
    dtypes: tuple[str, ...] = ()
    """Codes of the only dtypes that the buffer can have; empty: any."""

    @property
    def flat_axes(self) -> tuple[str, ...]:
        """The axes without their dimensions."""
        return tuple(axis for dim in dims_of(self.axes) for axis in dim)

    @property
    def is_weight(self) -> bool:
        """Whether the buffer holds weights and not biases."""
        return {"i", "h"} <= set(self.flat_axes)

    @property
    def arrangement(self) -> tuple[object, ...]:
        """Everything but the name; elements keep their positions between buffers of equal arrangement."""
        return self[1:]

    @property
    def text(self) -> str:
        """The arrangement of the elements as plans print it, without the projections."""
        blocks = "" if self.blocks is None else f" in blocks {self.blocks.order}"
        padding = [f", {axis} padded to {multiple}" for axis, multiple in self.padded]
        return self.axes + blocks + "".join(padding)

    def sizes(self, shape: Sequence[int]) -> dict[str, int] | None:
        """Return the size of each axis, or None for a shape that the buffer cannot have."""
        try:
            return sizes_of(dims_of(self.axes), shape, {"g": len(self.projections)})
        except ValueError:
            return None


@dataclass(frozen=True)
class Layout:
    """The names of the tensors of grouped experts, and their arrangement in memory.

    A weight comes before its bias.
    """

    first: tuple[Buffer, ...]
    """Buffers of gate and up: one for both, or one for each."""
    ungated: tuple[Buffer, ...]
    """Buffers of up, for experts without a gate."""
    down: tuple[Buffer, ...]
    """Buffers of down."""

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of weights and biases, with and without a gate."""
        return frozenset(buffer.name for buffer in (*self.first, *self.ungated, *self.down))

    @cached_property
    def weights(self) -> frozenset[str]:
        """Names of the weights."""
        return frozenset(buffer.name for buffer in (*self.first, *self.ungated, *self.down) if buffer.is_weight)

    @cached_property
    def arrangement(self) -> tuple[tuple[object, ...], ...]:
        """The arrangement of each buffer, without its name."""
        return tuple(buffer.arrangement for buffer in (*self.first, *self.ungated, *self.down))

    @property
    def transposed(self) -> bool:
        """Whether weights are ``[E, in, out]`` and not ``[E, out, in]``."""
        axes = self.down[0].flat_axes
        return axes.index("i") < axes.index("h")

    @property
    def has_biases(self) -> bool:
        """Whether the experts can have biases."""
        return self.weights != self.names

    @property
    def is_padded(self) -> bool:
        """Whether sizes are padded, so that shapes do not show the sizes of the experts."""
        return any(buffer.padded for buffer in self.down)

    def buffers(self, gated: bool) -> tuple[Buffer, ...]:
        """Return the buffers of experts with or without a gate."""
        return (*(self.first if gated else self.ungated), *self.down)

    def expected(self) -> list[str]:
        """Return the names of the weights of experts with a gate, in order, for error messages."""
        return [buffer.name for buffer in self.buffers(gated=True) if buffer.is_weight]

    def fits(self, shapes: Mapping[str, Sequence[int]], gated: bool = True) -> bool:
        """Return whether the shapes can be those of all weights of one module.

        Args:
            shapes: shape of each tensor by its name in the module.
            gated: whether the experts have a gate.
        """
        known: dict[str, int] = {}
        for buffer in self.buffers(gated):
            if buffer.is_weight:
                sizes = buffer.sizes(shapes.get(buffer.name, ()))
                if sizes is None or any(known.setdefault(axis, sizes[axis]) != sizes[axis] for axis in ("i", "h")):
                    return False
        return True
