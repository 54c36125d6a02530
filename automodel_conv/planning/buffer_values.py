"""Symbolic tensors of buffers: the projections in a buffer, and the buffer that holds projections; pure.

A projection has the axes E, i and h, or those of them that its bias has, in this order. Padding is a source of its own,
whose number the caller chooses; ``without_padding`` turns the copies that read it into fills with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from automodel_conv.planning.axes import Dims, dims_of, sizes_of
from automodel_conv.planning.boxes import Box, Piece
from automodel_conv.planning.buffers import Buffer
from automodel_conv.planning.copies import Fill, StridedCopy, group_pieces
from automodel_conv.planning.values import LoweringError, Value, concatenate, leaf, narrow, permute, reshape, stack


def projections_in(buffer: Buffer, value: Value, sizes: Mapping[str, int]) -> dict[str, Value]:
    """Return each projection of a buffer, without padding.

    Args:
        buffer: the buffer.
        value: its symbolic tensor.
        sizes: sizes of the padded axes without padding.

    Raises:
        LoweringError: the tensor has another rank, or a size that blocks or padding do not allow.
    """
    plain, axes = _plain(buffer), buffer.axes
    known = {"g": len(buffer.projections)}
    if buffer.blocks is not None:
        shape = _sizes(dims_of(axes), value.shape, known)
        split = dims_of(buffer.blocks.axes)
        parts = _sizes(split, [shape[axis] for axis in buffer.flat_axes], dict(buffer.blocks.sizes) | known)
        in_order = reshape(value, [parts[part] for (part,) in dims_of(buffer.blocks.order)])
        value, axes = rearrange(in_order, buffer.blocks.order, buffer.blocks.axes, {}), " ".join(buffer.flat_axes)
    if "g" in buffer.flat_axes:
        stacked = rearrange(value, axes, f"g {' '.join(plain)}", known)
        one_by_one = [narrow(stacked, 0, number, 1) for number in range(len(buffer.projections))]
        values = [reshape(part, stacked.shape[1:]) for part in one_by_one]
    else:
        values = [rearrange(value, axes, " ".join(plain), {})]
    return {name: _cut(buffer, part, plain, sizes) for name, part in zip(buffer.projections, values, strict=True)}


def buffer_of(buffer: Buffer, projections: Mapping[str, Value], padding: int) -> Value:
    """Return the buffer that holds projections, of shape ``buffer.axes``.

    Args:
        buffer: the buffer.
        projections: the projections by name.
        padding: the number of the source that padding reads.

    Raises:
        LoweringError: the projections have different shapes, or sizes that blocks do not divide.
    """
    plain = _plain(buffer)
    values = [_pad(buffer, projections[name], plain, padding) for name in buffer.projections]
    value, axes = values[0], " ".join(plain)
    if "g" in buffer.flat_axes:
        value, axes = stack(values, 0), f"g {axes}"
    if buffer.blocks is None:
        return rearrange(value, axes, buffer.axes, {})
    value = rearrange(value, axes, " ".join(buffer.flat_axes), {})
    sizes = dict(zip(buffer.flat_axes, value.shape, strict=True))
    value = rearrange(value, buffer.blocks.axes, buffer.blocks.order, dict(buffer.blocks.sizes))
    return reshape(value, [prod(sizes[axis] for axis in dim) for dim in dims_of(buffer.axes)])


def without_padding(copies: Sequence[StridedCopy], padding: int) -> tuple[tuple[StridedCopy, ...], tuple[Fill, ...]]:
    """Return the copies that do not read the source ``padding``, and fills with zeros in place of those that do."""
    pieces = [piece for copy in copies for piece in copy.pieces()]
    fills = tuple(_zeros(piece) for piece in pieces if piece.source == padding)
    if not fills:
        return tuple(copies), ()
    return group_pieces(piece for piece in pieces if piece.source != padding), fills


def _zeros(piece: Piece) -> Fill:
    """Return the fill with zeros of what a piece writes."""
    shape, _, strides = piece.box
    return Fill.of_piece(piece._replace(box=Box(shape, (0,) * len(shape), strides)), 0)


def rearrange(value: Value, before: str, after: str, known: Mapping[str, int]) -> Value:
    """Return a tensor with its axes in another order, as ``einops.rearrange`` does.

    Args:
        value: the tensor.
        before: its axes in einops notation.
        after: its axes in the new order.
        known: sizes of axes that share a dimension with another axis before and do not after.

    Raises:
        LoweringError: the value has another rank, or a size that the known sizes do not divide.
    """
    old_dims, new_dims = dims_of(before), dims_of(after)
    unsplit = {dim for dim in old_dims if dim in new_dims}  # each counts as one axis, so that its sizes are not needed
    old_dims, new_dims = _as_axes(old_dims, unsplit), _as_axes(new_dims, unsplit)
    sizes = _sizes(old_dims, value.shape, known)
    axes = [axis for dim in old_dims for axis in dim]
    order = [axes.index(axis) for dim in new_dims for axis in dim]
    rearranged = permute(reshape(value, [sizes[axis] for axis in axes]), order)
    return reshape(rearranged, [prod(sizes[axis] for axis in dim) for dim in new_dims])


def _as_axes(dims: Dims, unsplit: set[tuple[str, ...]]) -> Dims:
    """Return the dimensions, with each of ``unsplit`` as one axis."""
    return tuple((" ".join(dim),) if dim in unsplit else dim for dim in dims)


def _plain(buffer: Buffer) -> list[str]:
    """Return the axes of a projection in the buffer."""
    return [axis for axis in ("E", "i", "h") if axis in buffer.flat_axes]


def _sizes(dims: Dims, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
    try:
        return sizes_of(dims, shape, known)
    except ValueError as error:
        raise LoweringError(str(error)) from None


def _pad(buffer: Buffer, value: Value, axes: Sequence[str], padding: int) -> Value:
    """Return a projection with zeros up to the multiples of the padded axes."""
    for axis, multiple in buffer.padded:
        dim = axes.index(axis)
        lacking = -value.shape[dim] % multiple
        if lacking:
            zeros = leaf(padding, (*value.shape[:dim], lacking, *value.shape[dim + 1 :]))
            value = concatenate([value, zeros], dim)
    return value


def _cut(buffer: Buffer, value: Value, axes: Sequence[str], sizes: Mapping[str, int]) -> Value:
    """Return a projection without the zeros of the padded axes."""
    for axis, multiple in buffer.padded:
        dim, size = axes.index(axis), sizes[axis]
        expected = size + -size % multiple
        if value.shape[dim] != expected:
            raise LoweringError(f"{axis} has size {value.shape[dim]}, not {expected}, as {size} with padding")
        value = narrow(value, dim, 0, size)
    return value
