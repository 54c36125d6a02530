"""From a chain of operations to strided copies: one small function per operation.

All sources of a rule lie in one long row here, ``SPAN`` elements apart: thousands of experts are one piece, and what an
operation does to them is computed once.

An operation is plain data here (a name and its options); the functions below say in a line or two what it does to
values that know, for every element, which source element it comes from. Semantics: transformers 5.23.0,
``core_model_loading.py``, the ``convert`` method of the class of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from typing import NamedTuple, cast

from automodel_conv.planning.boxes import Box, Piece, chain, contiguous_strides, run_of
from automodel_conv.planning.copies import SPAN, StridedCopy, by_source, group_copies


class LoweringError(Exception):
    """These sources cannot go through this operation (wrong number, ranks or sizes)."""


class Operation(NamedTuple):
    """A conversion step as data. ``options`` are the constructor's, with everything a config decides filled in."""

    name: str
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.options)})"


class Value(NamedTuple):
    """A tensor that is still only a description: its shape, and the pieces that would fill it.

    Their ``source`` is 0: they read the row of all sources, with element n of source k at ``k * SPAN + n``.
    """

    shape: tuple[int, ...]
    pieces: list[Piece]
    source: int = 0
    """Added to the sources that the pieces read, so that values of equal pieces can share them."""


def leaf(source: int, shape: tuple[int, ...]) -> Value:
    """A whole source tensor."""
    numel = prod(shape)
    return Value(shape, [Piece(0, run_of(numel), 0, 0)] if numel else [], source)


def leaves(first: int, shapes: Sequence[tuple[int, ...]]) -> list[Value]:
    """Whole source tensors, numbered from ``first``."""
    pieces = {shape: leaf(0, shape).pieces for shape in dict.fromkeys(shapes)}
    return [Value(shape, pieces[shape], source) for source, shape in enumerate(shapes, first)]


# --- values: the five things operations are made of -----------------------------------------------------------------


def _mapped(value: Value, shape: tuple[int, ...], sizes: Sequence[int], read: Sequence[int], start: int) -> Value:
    """Elements ``start + i . read`` of ``value``, for all i < sizes in order, laid out contiguously as ``shape``."""
    if not prod(sizes):
        return Value(shape, [])
    walk = Piece(0, Box(tuple(sizes), tuple(read), contiguous_strides(sizes)), start, 0)
    return Value(shape, chain(value.pieces, [walk], prod(value.shape)), value.source)


def reshape(value: Value, shape: Sequence[int]) -> Value:
    if prod(shape) != prod(value.shape):
        raise LoweringError(f"cannot reshape {value.shape} to {tuple(shape)}")
    return value._replace(shape=tuple(shape))


def transpose(value: Value, dim0: int, dim1: int) -> Value:
    order = list(range(len(value.shape)))
    dim0, dim1 = _dim(value, dim0), _dim(value, dim1)
    order[dim0], order[dim1] = dim1, dim0
    strides = contiguous_strides(value.shape)
    shape = tuple(value.shape[d] for d in order)
    return _mapped(value, shape, shape, [strides[d] for d in order], 0)


def narrow(value: Value, dim: int, start: int, length: int) -> Value:
    dim = _dim(value, dim)
    strides = contiguous_strides(value.shape)
    shape = (*value.shape[:dim], length, *value.shape[dim + 1 :])
    return _mapped(value, shape, shape, strides, start * strides[dim])


def concatenate(values: Sequence[Value], dim: int) -> Value:
    return _joined(_series(values), dim)


def stack(values: Sequence[Value], dim: int) -> Value:
    rank = len(values[0].shape) + 1
    if not -rank <= dim < rank:
        raise LoweringError(f"cannot stack tensors of shape {values[0].shape} along dimension {dim}")
    dim %= rank
    opened = [
        series._replace(first=reshape(series.first, (*series.first.shape[:dim], 1, *series.first.shape[dim:])))
        for series in _series(values)
    ]
    return _joined(opened, dim)


class _Series(NamedTuple):
    """Values that are equal but for their sources, of which each starts ``step`` after the one before."""

    first: Value
    count: int
    step: int


def _series(values: Sequence[Value]) -> list[_Series]:
    """The values in as few series as follow each other."""
    made: list[_Series] = []
    first, count, step = values[0], 0, 0
    for value in values:
        apart = value.source - first.source
        goes_on = apart == count * step if count > 1 else apart > 0
        if count == 0 or (goes_on and value[:2] == first[:2]):
            step = apart if count == 1 else step
            count += 1
            continue
        made.append(_Series(first, count, step))
        first, count, step = value, 1, 0
    return [*made, _Series(first, count, step)]


def _joined(all_series: Sequence[_Series], dim: int) -> Value:
    first = all_series[0].first
    dim = _dim(first, dim)
    rest = (*first.shape[:dim], *first.shape[dim + 1 :])
    for value, _, _ in all_series:
        if (*value.shape[:dim], *value.shape[dim + 1 :]) != rest or len(value.shape) != len(first.shape):
            raise LoweringError(f"cannot join shapes {first.shape} and {value.shape} along dimension {dim}")
    size = sum(series.count * series.first.shape[dim] for series in all_series)
    shape = (*first.shape[:dim], size, *first.shape[dim + 1 :])
    strides = contiguous_strides(shape)
    pieces: list[Piece] = []
    start = 0
    for series in all_series:
        value, length = series.first, series.first.shape[dim]
        whole, apart = (series.count, *value.shape), (length * strides[dim], *strides)
        if prod(whole):
            walk = Piece(0, Box(whole, contiguous_strides(whole), apart), 0, start * strides[dim])
            pieces += chain(_one_after_the_other(series), [walk], prod(whole))
        start += series.count * length
    return Value(shape, pieces)


def _one_after_the_other(series: _Series) -> list[Piece]:
    """The pieces of all values of a series, laid end to end."""
    (shape, pieces, source), count, step = series
    pieces = [piece._replace(source_offset=piece.source_offset + source * SPAN) for piece in pieces]
    if count == 1:
        return pieces
    return [
        piece._replace(
            box=Box(
                (count, *piece.box.shape),
                (step * SPAN, *piece.box.source_strides),
                (prod(shape), *piece.box.target_strides),
            )
        )
        for piece in pieces
    ]


def _dim(value: Value, dim: int) -> int:
    rank = len(value.shape)
    if not -rank <= dim < rank:
        raise LoweringError(f"a tensor of shape {value.shape} has no dimension {dim}")
    return dim % rank


# --- operations -----------------------------------------------------------------------------------------------------


class Context(NamedTuple):
    """What an operation may ask about the rule it belongs to."""

    source_patterns: tuple[str, ...]
    target_patterns: tuple[str, ...]
    target_shapes: tuple[tuple[int, ...], ...]  # of the model's parameters, per target pattern; () if not needed
    transposed: bool | None = None  # what Transpose(check_dims=True) does; None: what the shapes say


Inputs = dict[str, "Value | list[Value]"]


def _only(inputs: Inputs) -> Value:
    if len(inputs) != 1:
        raise LoweringError(f"takes one source pattern, got {len(inputs)}")
    return _single(next(iter(inputs.values())))


def _single(value: Value | list[Value]) -> Value:
    return value[0] if isinstance(value, list) else value


def _single_target(context: Context) -> str:
    if len(context.target_patterns) != 1:
        raise LoweringError(f"writes one target pattern, the rule has {len(context.target_patterns)}")
    return context.target_patterns[0]


def _merge_modulelist(inputs: Inputs, context: Context, dim: int) -> Inputs:
    key = {} if len(inputs) > 1 else {next(iter(inputs)): _single_target(context)}
    return {
        key.get(pattern, pattern): stack(value, dim) if isinstance(value, list) else value
        for pattern, value in inputs.items()
    }


def _split_modulelist(inputs: Inputs, context: Context, dim: int) -> Inputs:
    outputs: Inputs = {}
    for pattern, value in inputs.items():
        merged = _single(value)
        axis = _dim(merged, dim)
        name = pattern if len(inputs) > 1 else _single_target(context)
        for i in range(merged.shape[axis]):
            part = narrow(merged, axis, i, 1)
            outputs[name.replace("*", str(i))] = reshape(part, (*part.shape[:axis], *part.shape[axis + 1 :]))
    return outputs


def _concatenate(inputs: Inputs, context: Context, dim: int) -> Inputs:
    parts: list[Value] = []
    for pattern in context.source_patterns:
        value = inputs.get(pattern, [])
        parts += value if isinstance(value, list) else [value]
    if not parts:
        raise LoweringError("nothing to concatenate")
    return {_single_target(context): concatenate(parts, dim)}


def _chunk(inputs: Inputs, context: Context, dim: int, num_shards: int | None = None) -> Inputs:
    value = _only(inputs)
    targets = context.target_patterns
    if num_shards is not None:
        targets = tuple(_single_target(context).replace("*", str(i)) for i in range(num_shards))
    return dict(zip(targets, _chunks(value, dim, len(targets)), strict=False))


def _chunks(value: Value, dim: int, count: int) -> list[Value]:
    """As ``torch.chunk``: parts of one rounded-up size, the last smaller, so there may be fewer than ``count``."""
    axis = _dim(value, dim)
    size = value.shape[axis]
    step = ceil(size / count)
    starts = range(0, size, step) if size else [0] * count
    return [narrow(value, axis, start, min(step, size - start)) for start in starts]


def _split(inputs: Inputs, context: Context, dim: int) -> Inputs:
    value = _only(inputs)
    axis = _dim(value, dim)
    sizes = [shape[axis] for shape in context.target_shapes]
    if sum(sizes) != value.shape[axis]:
        raise LoweringError(f"cannot split size {value.shape[axis]} into {sizes}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {
        target: narrow(value, axis, start, size)
        for target, start, size in zip(context.target_patterns, starts, sizes, strict=True)
    }


def _transpose(inputs: Inputs, context: Context, dim0: int, dim1: int, check_dims: bool = False) -> Inputs:
    value = _only(inputs)
    if len(context.target_patterns) == 1:
        target = context.target_patterns[0]
    elif len(context.source_patterns) == 1:
        target = context.source_patterns[0]
    else:
        raise LoweringError("transposes one source")
    transposed = True
    if check_dims:
        told = context.transposed
        transposed = value.shape != context.target_shapes[0] if told is None else told
    return {target: transpose(value, dim0, dim1) if transposed else value}


def _interleave(inputs: Inputs, context: Context, dim: int, inverse: bool = False) -> Inputs:
    value = _only(inputs)
    axis = _dim(value, dim)
    size = value.shape[axis]
    pair = (2, size // 2) if inverse else (size // 2, 2)
    opened = reshape(value, (*value.shape[:axis], *pair, *value.shape[axis + 1 :]))
    return {context.target_patterns[0]: reshape(transpose(opened, axis, axis + 1), value.shape)}


def _permute_for_rope(
    inputs: Inputs,
    context: Context,
    heads: int,
    inverse: bool = False,
    permute_layer_names: tuple[str, ...] | None = None,
) -> Inputs:
    outputs: Inputs = {}
    one_to_one = len(context.source_patterns) == len(context.target_patterns) == 1
    for pattern, value in inputs.items():
        target = context.target_patterns[0] if one_to_one else pattern
        if permute_layer_names is None or any(name in pattern for name in permute_layer_names):
            value = _rope_halves(_single(value), heads, inverse)
        outputs[target] = value
    return outputs


def _rope_halves(value: Value, heads: int, inverse: bool) -> Value:
    if len(value.shape) not in (1, 2):
        return value
    half = value.shape[0] // heads // 2
    pair = (2, half) if inverse else (half, 2)
    opened = reshape(value, (heads, *pair, *value.shape[1:]))
    return reshape(transpose(opened, 1, 2), value.shape)


def _conv3d_to_linear(inputs: Inputs, context: Context, **_: object) -> Inputs:
    value = _only(inputs)
    if len(value.shape) not in (2, 5):
        raise LoweringError(f"takes a 5-D or 2-D tensor, got {value.shape}")
    return {_one_or_source(context): reshape(value, (value.shape[0], prod(value.shape[1:])))}


def _linear_to_conv3d(inputs: Inputs, context: Context, in_channels: int, kernel_size: tuple[int, ...]) -> Inputs:
    value = _only(inputs)
    return {_one_or_source(context): reshape(value, (value.shape[0], in_channels, *kernel_size))}


def _one_or_source(context: Context) -> str:
    return context.target_patterns[0] if len(context.target_patterns) == 1 else context.source_patterns[0]


def _ernie_fuse(inputs: Inputs, context: Context, stack_dim: int, concat_dim: int) -> Inputs:
    groups: dict[str, list[Value]] = {target: [] for target in context.target_patterns}
    for pattern in context.source_patterns:
        if pattern not in inputs:
            raise LoweringError(f"no tensor for pattern {pattern}")
        values = inputs[pattern]
        values = values if isinstance(values, list) else [values]
        size = ceil(len(values) / len(context.target_patterns))
        for i, target in enumerate(context.target_patterns):
            group = values[i * size : (i + 1) * size]
            if not group:
                raise LoweringError(f"{len(values)} tensors cannot be shared out to {len(groups)} targets")
            groups[target].append(stack(group, stack_dim))
    return {target: concatenate(parts, concat_dim) for target, parts in groups.items()}


def _ernie_split(inputs: Inputs, context: Context, stack_dim: int, concat_dim: int) -> Inputs:
    fused = len(context.target_patterns)
    outputs: Inputs = {}
    split: list[list[Value]] = []
    for pattern in context.source_patterns:
        if pattern not in inputs:
            raise LoweringError(f"no tensor for pattern {pattern}")
        value = _single(inputs[pattern])
        chunks = _chunks(value, concat_dim, fused)
        if len(chunks) < fused:
            raise LoweringError(f"{value.shape} cannot be shared out to {fused} targets")
        split.append(chunks)
    for i, target in enumerate(context.target_patterns):
        parts: list[Value] = []
        for chunks in split:
            axis = _dim(chunks[i], stack_dim)
            shape = chunks[i].shape
            parts += [
                reshape(narrow(chunks[i], axis, e, 1), (*shape[:axis], *shape[axis + 1 :])) for e in range(shape[axis])
            ]
        outputs |= {target.replace("*", str(e)): part for e, part in enumerate(parts)}
    return outputs


def _vision_fuse_and_permute(inputs: Inputs, context: Context, dim: int, **rope: object) -> Inputs:
    return _concatenate(cast("Callable[..., Inputs]", _permute_for_rope)(inputs, context, **rope), context, dim)


def _vision_unfuse_and_permute(inputs: Inputs, context: Context, dim: int, **rope: object) -> Inputs:
    return cast("Callable[..., Inputs]", _permute_for_rope)(_chunk(inputs, context, dim), context, **rope)


def _identity(inputs: Inputs, context: Context) -> Inputs:
    return inputs


OPERATIONS: Mapping[str, Callable[..., Inputs]] = {
    "MergeModulelist": _merge_modulelist,
    "SplitModulelist": _split_modulelist,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
    "Interleave": _interleave,
    "PermuteForRope": _permute_for_rope,
    "Conv3dToLinear": _conv3d_to_linear,
    "LinearToConv3d": _linear_to_conv3d,
    "ErnieFuseAndSplitTextVisionExperts": _ernie_fuse,
    "ErnieSplitAndDecoupleTextVisionExperts": _ernie_split,
    "VisionFuseAndPermuteForRope": _vision_fuse_and_permute,
    "VisionUnfuseAndPermuteForRope": _vision_unfuse_and_permute,
    "_IdentityOp": _identity,
}
"""What can be lowered, by the name of transformers' class."""


def needs_target_shapes(operations: Sequence[Operation], transposed: bool | None = None) -> bool:
    """True if the chain cannot be lowered without the shapes of the model's parameters.

    Args:
        transposed: see ``Context``.
    """
    return any(op.name == "Split" or (transposed is None and dict(op.options).get("check_dims")) for op in operations)


def lower(operations: Sequence[Operation], inputs: Mapping[str, list[Value]], context: Context) -> dict[str, Value]:
    """Run a chain of operations on values; the result is keyed as upstream's ``convert`` keys it.

    Raises:
        LoweringError: the sources do not fit an operation; the message names the operation.
        NotAffine: the copies are not boxes; the caller falls back to upstream's own ``convert``.
    """
    values: Inputs = dict(inputs)
    for operation in operations:
        try:
            values = OPERATIONS[operation.name](values, context, **dict(operation.options))
        except LoweringError as error:
            raise LoweringError(f"{operation}: {error}") from None
    return {name: _single(value) for name, value in values.items()}


def copies_of(value: Value) -> tuple[StridedCopy, ...]:
    """The copies that make a value; their ordinals are the numbers of the sources."""
    moved = [piece._replace(source_offset=piece.source_offset + value.source * SPAN) for piece in value.pieces]
    return group_copies([by_source(walk) for walk in moved])
