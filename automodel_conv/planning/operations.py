"""The operations of transformers that can be lowered: one entry of ``OPERATIONS`` each.

An operation is plain data (a name and its options). Its function says in a line or two what the operation does to
values, which know the source element of each of their elements. Semantics: transformers 5.23.0,
``core_model_loading.py``, the ``convert`` method of the class of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, prod
from typing import Any, NamedTuple, cast

from automodel_conv.planning.values import LoweringError, Value, _dim, concatenate, narrow, reshape, stack, transpose


class NotLowerable(Exception):
    """A rule whose operations are not all stock; the text says which and why."""


class Operation(NamedTuple):
    """A conversion step as data. ``options`` are the constructor's, with everything a config decides filled in."""

    name: str
    options: tuple[tuple[str, object], ...] = ()

    def option(self, name: str) -> object:
        """The value of an option; None if it has none of that name."""
        return dict(self.options).get(name)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.options)})"


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
    return single(next(iter(inputs.values())))


def single(value: Value | list[Value]) -> Value:
    """The value, or the first of a list."""
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
        merged = single(value)
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
            value = _rope_halves(single(value), heads, inverse)
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
        value = single(inputs[pattern])
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


def _rope_heads(op: Any, config: Any) -> int:
    # 5.17 fails without permute_layer_names, 5.12 always; what upstream cannot run, we do not pretend to.
    if not hasattr(op, "_permute_for_rope") and getattr(op, "permute_layer_names", None) is None:
        raise NotLowerable("PermuteForRope of this transformers cannot run without permute_layer_names")
    if config is None:
        raise NotLowerable("PermuteForRope reads num_attention_heads from a config, and there is no model")

    def heads() -> object:
        part = config if op.subconfig_key is None else getattr(config, op.subconfig_key, config)
        return getattr(part, "num_attention_heads", 1)

    return _count("PermuteForRope", "num_attention_heads", heads)


def _count(operation: str, attribute: str, read: Callable[[], object]) -> int:
    """A number that an operation asks a config for.

    Raises:
        NotLowerable: it has none, or not one; what is raised then is up to transformers.
    """
    try:
        found = read()
    except (AttributeError, ValueError, RuntimeError) as error:  # absent; two text configs; another for each layer
        raise NotLowerable(f"{operation} reads {attribute} from the config: {error}") from error
    if not isinstance(found, int) or found < 1:
        raise NotLowerable(f"{operation} reads {attribute} from the config, which has {found!r}")
    return found


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def options_of(op: Any, spec: OperationSpec, config: Any) -> tuple[tuple[str, object], ...]:
    """The options of transformers' object, with everything that a config decides filled in.

    Raises:
        NotLowerable: the config does not say what ``convert`` would ask it for.
    """
    options = {key: _frozen(getattr(op, key)) for key in spec.attributes if hasattr(op, key)}
    if spec.from_config is not None:
        options |= spec.from_config(op, config)
    return tuple(sorted(options.items()))


def _of_rope(op: Any, config: Any) -> dict[str, object]:
    return {"heads": _rope_heads(op, config)}


def _of_vision(op: Any, config: Any) -> dict[str, object]:
    """The options of the rope operation that ``op`` holds."""
    return dict(options_of(op.permute_op, OPERATIONS["PermuteForRope"], config))


def _of_chunk(op: Any, config: Any) -> dict[str, object]:
    asked = getattr(op, "num_shards_attribute", None)
    if asked is None:
        return {}
    if config is None:
        raise NotLowerable(f"Chunk reads {asked} from a config, and there is no model")
    return {"num_shards": _count("Chunk", asked, lambda: getattr(config.get_text_config(), asked))}


class OperationSpec(NamedTuple):
    """How an operation is lowered, and what it depends on."""

    lower: Callable[..., Inputs]
    """Takes the values by pattern and the context, and its options by name."""
    attributes: tuple[str, ...] = ()
    """Of transformers' object, on which its ``convert`` depends; they are options under the same names."""
    from_config: Callable[[Any, Any], Mapping[str, object]] | None = None
    """Further options, of the object and the model's config."""
    merges: bool = False
    """Whether it makes one tensor of a list, in which a part may be absent."""
    needs_shapes: bool = False
    """Whether it cannot be lowered without the shapes of the model's parameters."""
    only_if: str | None = None
    """An option under which it does what it does only where the shapes of the model's parameters ask for it."""

    def asks_for_shapes(self, operation: Operation, told: bool = False) -> bool:
        """Whether an operation looks at the shapes of the model's parameters.

        Args:
            told: the caller knows already whether a matrix is to be transposed.
        """
        return self.needs_shapes or (not told and self.only_if is not None and bool(operation.option(self.only_if)))


OPERATIONS: Mapping[str, OperationSpec] = {
    "MergeModulelist": OperationSpec(_merge_modulelist, ("dim",), merges=True),
    "SplitModulelist": OperationSpec(_split_modulelist, ("dim",)),
    "Concatenate": OperationSpec(_concatenate, ("dim",)),
    "Chunk": OperationSpec(_chunk, ("dim",), _of_chunk),
    "Split": OperationSpec(_split, ("dim",), needs_shapes=True),
    "Transpose": OperationSpec(_transpose, ("dim0", "dim1", "check_dims"), only_if="check_dims"),
    "Interleave": OperationSpec(_interleave, ("dim", "inverse")),
    "PermuteForRope": OperationSpec(_permute_for_rope, ("inverse", "permute_layer_names"), _of_rope),
    "Conv3dToLinear": OperationSpec(_conv3d_to_linear),
    "LinearToConv3d": OperationSpec(_linear_to_conv3d, ("in_channels", "kernel_size")),
    "ErnieFuseAndSplitTextVisionExperts": OperationSpec(_ernie_fuse, ("stack_dim", "concat_dim")),
    "ErnieSplitAndDecoupleTextVisionExperts": OperationSpec(_ernie_split, ("stack_dim", "concat_dim")),
    "VisionFuseAndPermuteForRope": OperationSpec(_vision_fuse_and_permute, ("dim",), _of_vision),
    "VisionUnfuseAndPermuteForRope": OperationSpec(_vision_unfuse_and_permute, ("dim",), _of_vision),
    "_IdentityOp": OperationSpec(_identity),
}
"""What can be lowered, by the name of transformers' class."""
