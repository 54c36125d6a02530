"""Plans that rearrange grouped experts from one layout to another; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.axes import Dims, dims_of, sizes_of
from automodel_conv.planning.code_names import packed_dtypes
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target
from automodel_conv.planning.layouts import SCALES, Buffer, Layout, is_experts
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import LoweringError, Value, leaf, narrow, permute, reshape, stack

_ADVICE = "{dequantize=True} decodes them to values"
_Geometry = tuple[tuple[int, ...], tuple[StridedCopy, ...]]  # shape and copies of a target


class _Fill(NamedTuple):
    """A buffer of the new layout, and the buffers of the old layout that fill it."""

    sources: tuple[Buffer, ...]
    target: Buffer

    @property
    def moves(self) -> bool:
        """Whether elements change their positions."""
        source = self.sources[0]
        return (source.axes, source.projections) != (self.target.axes, self.target.projections)

    @property
    def regroups_gate_and_up(self) -> bool:
        """Whether gate and up change their arrangement relative to each other."""
        before, after = self.sources[0], self.target
        return before.projections != after.projections or _projection_dim(before) != _projection_dim(after)


def relayout(
    table: SourceTable,
    source: Callable[[str], Layout],
    target: Callable[[str], Layout],
    gated: Callable[[str], bool],
) -> CopyPlan:
    """Return the plan that rearranges all grouped experts of ``table`` and passes all other tensors through.

    Hidden rows have no target.

    Args:
        table: sources of the plan.
        source: maps the name of an experts module to its layout in ``table``.
        target: maps the name of an experts module to its new layout.
        gated: whether the experts module with this name has a gate; it decides only if a buffer's name fits both.

    Raises:
        UnsupportedError: an experts tensor has a rank that its layout cannot have; gate comes without up and one buffer
            should hold both; rows that share a scale would be separated; or packed codes would be rearranged.
    """
    rows = {name: row for row, name in enumerate(table.names) if row not in table.hidden}
    scaled = {name[: name.rfind("experts") + len("experts")] for name in table.names if name.endswith(SCALES)}
    packed = packed_dtypes()
    rules: dict[str, int] = {}
    shared: dict[tuple[_Fill | None, tuple[tuple[int, ...], ...]], _Geometry] = {}
    targets: list[Target] = []

    def add(target_name: str, names: Sequence[str], fill: _Fill | None, rule: int = -1) -> None:
        sources = tuple(rows[name] for name in names)
        shapes = tuple(table.shapes[row] for row in sources)
        if (fill, shapes) not in shared:
            shared[fill, shapes] = _lower(names[0], fill, shapes)
        shape, copies = shared[fill, shapes]
        targets.append(Target(target_name, table.dtypes[sources[0]], shape, rule, sources, copies))

    for row, name in enumerate(table.names):
        if row in table.hidden:
            continue
        path, _, leaf_name = name.rpartition(".")
        fills: list[_Fill] = []
        suffix = ""
        if is_experts(path):
            suffix = next((suffix for suffix in SCALES if leaf_name.endswith(suffix)), "")
            fills = _fills(leaf_name.removesuffix(suffix), source(path), target(path), gated(path))
        if not fills:
            add(name, [name], None)
        for fill in fills:
            names = [f"{path}.{buffer.name}{suffix}" for buffer in fill.sources]
            present = [source_name for source_name in names if source_name in rows]
            if name != present[0]:
                continue  # the first of these names adds the target
            if present != names or len({table.dtypes[rows[source_name]] for source_name in names}) > 1:
                raise _cannot_combine(names, table, rows)
            if fill.moves and suffix and fill.regroups_gate_and_up:
                raise UnsupportedError(
                    message(f"{name}: gate and up share a scale and cannot be separated", do=_ADVICE)
                )
            if fill.moves and not suffix and table.dtypes[row] in packed and path in scaled:
                text = f"{name}: packed codes cannot be rearranged"
                raise UnsupportedError(message(text, found=table.dtypes[row], do=_ADVICE))
            target_name = f"{path}.{fill.target.name}{suffix}"
            changes = fill.moves or target_name != name
            add(target_name, names, fill, rules.setdefault(_rule(fill, suffix), len(rules)) if changes else -1)
    plan = CopyPlan(table, tuple(targets), tuple(rules))
    plan.validate()
    return plan


def _fills(leaf_name: str, before: Layout, after: Layout, gated: bool) -> list[_Fill]:
    """Return the fills that read the buffer with this name; none if the old layout has no such buffer."""
    for has_gate in (gated, not gated):
        old, new = before.buffers(has_gate), after.buffers(has_gate)
        read = next((buffer for buffer in old if buffer.name == leaf_name), None)
        if read is not None:
            return [
                _Fill(tuple(buffer for buffer in old if _overlaps(buffer, target)), target)
                for target in new
                if _overlaps(read, target)
            ]
    return []


def _overlaps(one: Buffer, other: Buffer) -> bool:
    """Return whether both hold a part of the same weight or bias."""
    return one.is_weight == other.is_weight and not set(one.projections).isdisjoint(other.projections)


def _projection_dim(buffer: Buffer) -> tuple[str, ...] | None:
    return next((dim for dim in dims_of(buffer.axes) if "g" in dim), None)


def _rule(fill: _Fill, suffix: str) -> str:
    """Return the text of the rule that a plan shows for a fill.

    >>> from automodel_conv.planning.layouts import LAYOUTS
    >>> print(_rule(_Fill(LAYOUTS["transformers"].first[:1], LAYOUTS["nemo"].first[0]), ""))
    experts.gate_up_proj -> experts.gate_and_up_projs: E (g i) h -> E h (g i)
    """
    before, after = fill.sources[0], fill.target
    names = ", ".join(f"experts.{buffer.name}{suffix}" for buffer in fill.sources)
    action = f"{before.axes} -> {after.axes}" if fill.moves else "rename"
    if before.projections != after.projections:
        read = "; ".join(" ".join(buffer.projections) for buffer in fill.sources)
        action += f", g: {read} -> {' '.join(after.projections)}"
    return f"{names} -> experts.{after.name}{suffix}: {action}"


def _lower(name: str, fill: _Fill | None, shapes: Sequence[tuple[int, ...]]) -> _Geometry:
    values = [leaf(number, shape) for number, shape in enumerate(shapes)]
    if fill is None or not fill.moves:
        return values[0].shape, copies_of(values[0])
    try:
        value = _compute(fill, values)
    except LoweringError as error:
        raise UnsupportedError(
            message(
                f"{name} does not have a shape that its layout allows",
                found=f"{[*shapes[0]]}: {error}",
            )
        ) from None
    return value.shape, copies_of(value)


def _compute(fill: _Fill, values: Sequence[Value]) -> Value:
    """Return the new buffer as a symbolic tensor, computed from the old ones."""
    sources, target = fill
    if sources[0].projections == target.projections:
        return _rearrange(values[0], sources[0].axes, target.axes, {"g": len(target.projections)})
    plain = " ".join(axis for dim in dims_of(target.axes) for axis in dim if axis != "g")
    projections: dict[str, Value] = {}
    for source, value in zip(sources, values, strict=True):
        projections |= _projections(source, value, plain)
    if len(target.projections) == 1:
        return _rearrange(projections[target.projections[0]], plain, target.axes, {})
    return _rearrange(stack([projections[name] for name in target.projections], 0), f"g {plain}", target.axes, {})


def _rearrange(value: Value, before: str, after: str, known: Mapping[str, int]) -> Value:
    """Return a buffer with its axes in another order, as ``einops.rearrange`` does.

    Args:
        value: the buffer.
        before: its axes in einops notation.
        after: its axes in the new order.
        known: sizes of axes that share a dimension with another axis before and do not after.

    Raises:
        LoweringError: the value has another rank, or a size that the known sizes do not divide.
    """
    old_dims, new_dims = dims_of(before), dims_of(after)
    unsplit = {dim for dim in old_dims if dim in new_dims}  # each counts as one axis, so that its sizes are not needed
    old_dims, new_dims = _as_axes(old_dims, unsplit), _as_axes(new_dims, unsplit)
    try:
        sizes = sizes_of(old_dims, value.shape, known)
    except ValueError as error:
        raise LoweringError(str(error)) from None
    axes = [axis for dim in old_dims for axis in dim]
    order = [axes.index(axis) for dim in new_dims for axis in dim]
    rearranged = permute(reshape(value, [sizes[axis] for axis in axes]), order)
    return reshape(rearranged, [prod(sizes[axis] for axis in dim) for dim in new_dims])


def _as_axes(dims: Dims, unsplit: set[tuple[str, ...]]) -> Dims:
    """Return the dimensions, with each of ``unsplit`` as one axis."""
    return tuple((" ".join(dim),) if dim in unsplit else dim for dim in dims)


def _projections(buffer: Buffer, value: Value, plain: str) -> Mapping[str, Value]:
    """Return each projection of a buffer separately, with its axes in the order of ``plain``."""
    if len(buffer.projections) == 1:
        return {buffer.projections[0]: _rearrange(value, buffer.axes, plain, {})}
    stacked = _rearrange(value, buffer.axes, f"g {plain}", {"g": len(buffer.projections)})
    return {
        projection: reshape(narrow(stacked, 0, number, 1), stacked.shape[1:])
        for number, projection in enumerate(buffer.projections)
    }


def _cannot_combine(names: Sequence[str], table: SourceTable, rows: Mapping[str, int]) -> UnsupportedError:
    """Return the error for gate and up of one buffer if either is missing or their dtypes differ."""
    return UnsupportedError(
        message(
            "gate and up of experts cannot be stored in one buffer",
            expected=f"{' and '.join(names)}, of one dtype",
            found=", ".join(f"{name}: {table.dtypes[rows[name]] if name in rows else 'missing'}" for name in names),
            do="check that the source has both, in one dtype",
        )
    )
