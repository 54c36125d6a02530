"""The operations of transformers that can be lowered: one entry of ``OPERATIONS`` each.

An operation is plain data: a name and its options. Its function states in a line or two what the operation does to
symbolic tensors (``Value``), which record the source of each of their elements. Semantics: transformers 5.24.0,
``core_model_loading.py``, the ``convert`` method of the class with the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, prod
from typing import Any, NamedTuple, cast

from automodel_conv.planning.values import (
    LoweringError,
    Value,
    append_zeros,
    axis_of,
    concatenate,
    narrow,
    reshape,
    stack,
    transpose,
)


class NotLowerable(Exception):
    """The operations of a rule are not all stock; the text states which and why."""


class Operation(NamedTuple):
    """A conversion step as data."""

    name: str
    options: tuple[tuple[str, object], ...] = ()
    """Arguments of the constructor, with everything that a config decides filled in."""

    def option(self, name: str) -> object:
        """Return the value of an option, or None if the operation has no option with this name."""
        return dict(self.options).get(name)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.options)})"


class Context(NamedTuple):
    """The facts about its rule that an operation may use."""

    source_patterns: tuple[str, ...]
    target_patterns: tuple[str, ...]
    target_shapes: tuple[tuple[int, ...], ...]
    """Shape of the model's parameter for each target pattern; empty if no operation needs it."""
    transposed: bool | None = None
    """Whether ``Transpose(check_dims=True)`` transposes; None: the shapes decide."""


Inputs = dict[str, "Value | list[Value]"]


def _only(inputs: Inputs) -> Value:
    if len(inputs) != 1:
        raise LoweringError(f"needs one source pattern, got {len(inputs)}")
    return single(next(iter(inputs.values())))


def single(value: Value | list[Value]) -> Value:
    """Return the value, or the first value of a list."""
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
        axis = axis_of(merged, dim)
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
    """Split a value as ``torch.chunk`` does.

    All chunks have one rounded-up size, except a smaller last one, so the result may have fewer than ``count`` chunks.
    """
    axis = axis_of(value, dim)
    size = value.shape[axis]
    step = ceil(size / count)
    starts = range(0, size, step) if size else [0] * count
    return [narrow(value, axis, start, min(step, size - start)) for start in starts]


def _split(inputs: Inputs, context: Context, dim: int) -> Inputs:
    value = _only(inputs)
    axis = axis_of(value, dim)
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
        raise LoweringError("needs one source pattern or one target pattern")
    transposed = True
    if check_dims:
        decided = context.transposed
        transposed = value.shape != context.target_shapes[0] if decided is None else decided
    return {target: transpose(value, dim0, dim1) if transposed else value}


def _interleave(inputs: Inputs, context: Context, dim: int, inverse: bool = False) -> Inputs:
    value = _only(inputs)
    axis = axis_of(value, dim)
    size = value.shape[axis]
    pair = (2, size // 2) if inverse else (size // 2, 2)
    pairs = reshape(value, (*value.shape[:axis], *pair, *value.shape[axis + 1 :]))
    return {context.target_patterns[0]: reshape(transpose(pairs, axis, axis + 1), value.shape)}


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
            value = _permute_halves(single(value), heads, inverse)
        outputs[target] = value
    return outputs


def _permute_halves(value: Value, heads: int, inverse: bool) -> Value:
    if len(value.shape) not in (1, 2):
        return value
    half = value.shape[0] // heads // 2
    pair = (2, half) if inverse else (half, 2)
    by_head = reshape(value, (heads, *pair, *value.shape[1:]))
    return reshape(transpose(by_head, 1, 2), value.shape)


def _conv3d_to_linear(inputs: Inputs, context: Context, **_: object) -> Inputs:
    value = _only(inputs)
    if len(value.shape) not in (2, 5):
        raise LoweringError(f"needs a 5-D or 2-D tensor, got {value.shape}")
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
                raise LoweringError(f"{len(values)} tensors cannot be divided among {len(groups)} targets")
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
            raise LoweringError(f"{value.shape} cannot be divided among {fused} targets")
        split.append(chunks)
    for i, target in enumerate(context.target_patterns):
        parts: list[Value] = []
        for chunks in split:
            axis = axis_of(chunks[i], stack_dim)
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


def _unpad_vocab(inputs: Inputs, context: Context, rows: int, inverse: bool = False) -> Inputs:
    value = _only(inputs)
    axis_of(value, 0)
    stored = value.shape[0]
    value = append_zeros(value, rows - stored) if inverse else narrow(value, 0, 0, min(rows, stored))
    return {context.target_patterns[0]: value}


def _merge_message_queries(inputs: Inputs, context: Context, inverse: bool = False) -> Inputs:
    if inverse:
        return _split_message_queries(_only(inputs), context)
    pairs = []
    for pattern in context.source_patterns:
        if pattern not in inputs:
            raise LoweringError(f"no tensor for pattern {pattern}")
        value = single(inputs[pattern])
        axis_of(value, 0)
        pairs.append(reshape(value, (value.shape[0] // 2, 2, *value.shape[1:])))
    queries, kv_queries = pairs
    merged = concatenate([narrow(queries, 1, 0, 1), kv_queries, narrow(queries, 1, 1, 1)], 1)
    return {context.target_patterns[0]: merged}


def _split_message_queries(merged: Value, context: Context) -> Inputs:
    if merged.shape[1:2] != (4,):
        raise LoweringError(f"needs 4 queries for each layer, got {merged.shape}")
    shape = (2 * merged.shape[0], *merged.shape[2:])
    query, key, value, mlp = (narrow(merged, 1, position, 1) for position in range(4))
    queries, kv_queries = context.target_patterns
    return {
        queries: reshape(concatenate([query, mlp], 1), shape),
        kv_queries: reshape(concatenate([key, value], 1), shape),
    }


def _dequantize_experts(inputs: Inputs, context: Context) -> Inputs:
    if len(inputs) != 1:
        raise NotLowerable(f"Inkling2LoopDequantizeExperts computes values from {len(inputs)} tensors")
    return {context.target_patterns[0]: _only(inputs)}


def _identity(inputs: Inputs, context: Context) -> Inputs:
    return inputs


def _rope_heads(op: Any, config: Any) -> int:
    # transformers 5.17 fails without permute_layer_names, and 5.12 always fails; we do not lower what it cannot run.
    if not hasattr(op, "_permute_for_rope") and getattr(op, "permute_layer_names", None) is None:
        raise NotLowerable("PermuteForRope of this transformers version cannot run without permute_layer_names")
    if config is None:
        raise NotLowerable("PermuteForRope reads num_attention_heads from a config, and there is no model")

    def heads() -> object:
        part = config if op.subconfig_key is None else getattr(config, op.subconfig_key, config)
        return getattr(part, "num_attention_heads", 1)

    return _positive_int("PermuteForRope", "num_attention_heads", heads)


def _positive_int(operation: str, attribute: str, read: Callable[[], object]) -> int:
    """Return a number that an operation reads from a config.

    Raises:
        NotLowerable: the config has no such number or several, so that ``read`` raises an error of transformers.
    """
    try:
        value = read()
    except (
        AttributeError,
        ValueError,
        RuntimeError,
    ) as error:  # no number; two text configs; one number for each layer
        raise NotLowerable(f"{operation} reads {attribute} from the config: {error}") from error
    if not isinstance(value, int) or value < 1:
        raise NotLowerable(f"{operation} reads {attribute} from the config, which has {value!r}")
    return value


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def options_of(op: Any, spec: OperationSpec, config: Any) -> tuple[tuple[str, object], ...]:
    """Return the options of transformers' object, with everything that a config decides filled in.

    Raises:
        NotLowerable: the config lacks a number that ``convert`` would read from it.
    """
    options = {key: _frozen(getattr(op, key)) for key in spec.attributes if hasattr(op, key)}
    if spec.from_config is not None:
        options |= spec.from_config(op, config)
    return tuple(sorted(options.items()))


def _rope_options(op: Any, config: Any) -> dict[str, object]:
    return {"heads": _rope_heads(op, config)}


def _vision_options(op: Any, config: Any) -> dict[str, object]:
    """Return the options of the rope operation that ``op`` holds."""
    return dict(options_of(op.permute_op, OPERATIONS["PermuteForRope"], config))


def _chunk_options(op: Any, config: Any) -> dict[str, object]:
    attribute = getattr(op, "num_shards_attribute", None)
    if attribute is None:
        return {}
    if config is None:
        raise NotLowerable(f"Chunk reads {attribute} from a config, and there is no model")
    return {"num_shards": _positive_int("Chunk", attribute, lambda: getattr(config.get_text_config(), attribute))}


def _unpad_options(op: Any, config: Any) -> dict[str, object]:
    attribute = "vocab_size" if op.inverse else "unpadded_vocab_size"
    if config is None:
        raise NotLowerable(f"Inkling2UnpadVocab reads {attribute} from a config, and there is no model")
    return {
        "rows": _positive_int("Inkling2UnpadVocab", attribute, lambda: getattr(config.get_text_config(), attribute))
    }


class OperationSpec(NamedTuple):
    """The function that lowers an operation, and the inputs it depends on."""

    lower: Callable[..., Inputs]
    """Function of the values by pattern, the context, and the options by name."""
    attributes: tuple[str, ...] = ()
    """Attributes of transformers' object that its ``convert`` depends on; options have the same names."""
    from_config: Callable[[Any, Any], Mapping[str, object]] | None = None
    """Function from the object and the model's config to further options."""
    merges: bool = False
    """Whether it merges a list into one tensor, so that a part of the list may be absent."""
    needs_shapes: bool = False
    """Whether it cannot be lowered without the shapes of the model's parameters."""
    only_if: str | None = None
    """Name of an option that makes the operation conditional on the shapes of the model's parameters."""

    def reads_shapes(self, operation: Operation, is_decided: bool = False) -> bool:
        """Return whether an operation reads the shapes of the model's parameters.

        Args:
            operation: an operation of this kind.
            is_decided: whether the caller has decided already if a conditional operation runs.
        """
        return self.needs_shapes or (
            not is_decided and self.only_if is not None and bool(operation.option(self.only_if))
        )


OPERATIONS: Mapping[str, OperationSpec] = {
    "MergeModulelist": OperationSpec(_merge_modulelist, ("dim",), merges=True),
    "SplitModulelist": OperationSpec(_split_modulelist, ("dim",)),
    "Concatenate": OperationSpec(_concatenate, ("dim",)),
    "Chunk": OperationSpec(_chunk, ("dim",), _chunk_options),
    "Split": OperationSpec(_split, ("dim",), needs_shapes=True),
    "Transpose": OperationSpec(_transpose, ("dim0", "dim1", "check_dims"), only_if="check_dims"),
    "Interleave": OperationSpec(_interleave, ("dim", "inverse")),
    "PermuteForRope": OperationSpec(_permute_for_rope, ("inverse", "permute_layer_names"), _rope_options),
    "Conv3dToLinear": OperationSpec(_conv3d_to_linear),
    "LinearToConv3d": OperationSpec(_linear_to_conv3d, ("in_channels", "kernel_size")),
    "ErnieFuseAndSplitTextVisionExperts": OperationSpec(_ernie_fuse, ("stack_dim", "concat_dim")),
    "ErnieSplitAndDecoupleTextVisionExperts": OperationSpec(_ernie_split, ("stack_dim", "concat_dim")),
    "VisionFuseAndPermuteForRope": OperationSpec(_vision_fuse_and_permute, ("dim",), _vision_options),
    "VisionUnfuseAndPermuteForRope": OperationSpec(_vision_unfuse_and_permute, ("dim",), _vision_options),
    "Inkling2UnpadVocab": OperationSpec(_unpad_vocab, ("inverse",), _unpad_options),
    "Inkling2LoopMergeMessageQueries": OperationSpec(_merge_message_queries, ("inverse",)),
    "Inkling2LoopDequantizeExperts": OperationSpec(_dequantize_experts),
    "_IdentityOp": OperationSpec(_identity),
}
"""The operations that can be lowered, by the name of transformers' class."""
