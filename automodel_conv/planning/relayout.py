"""Plan the way of grouped experts from one layout to another; pure."""

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

_DO = "{dequantize=True} gives the numbers that they stand for"
_Made = tuple[tuple[int, ...], tuple[StridedCopy, ...]]  # a target's shape and its copies


class _Step(NamedTuple):
    """A buffer of the new layout, and those of the old one that it is made of."""

    sources: tuple[Buffer, ...]
    target: Buffer

    @property
    def moves(self) -> bool:
        """Whether elements change their places."""
        source = self.sources[0]
        return (source.axes, source.projections) != (self.target.axes, self.target.projections)

    @property
    def parts_gate_and_up(self) -> bool:
        """Whether gate and up change how they lie relative to each other."""
        before, after = self.sources[0], self.target
        return before.projections != after.projections or _dim_of_g(before) != _dim_of_g(after)


def relayout(
    table: SourceTable,
    source: Callable[[str], Layout],
    target: Callable[[str], Layout],
    gated: Callable[[str], bool],
) -> CopyPlan:
    """The plan that lays all grouped experts of ``table`` out anew and passes everything else through, unless hidden.

    Args:
        source, target: the layout of an experts module, by the module's name.
        gated: whether such a module has a gate; asked only where a name leaves it open.

    Raises:
        UnsupportedError: an experts tensor of a rank that the layout cannot have, gate without up where one buffer
            takes both, scales of blocks whose rows would have to be moved apart, or packed codes that would have to be.
    """
    rows = {name: row for row, name in enumerate(table.names) if row not in table.hidden}
    scaled = {name[: name.rfind("experts") + len("experts")] for name in table.names if name.endswith(SCALES)}
    packed = packed_dtypes()
    rules: dict[str, int] = {}
    shared: dict[tuple[_Step | None, tuple[tuple[int, ...], ...]], _Made] = {}
    targets: list[Target] = []

    def add(made: str, names: Sequence[str], step: _Step | None, rule: int = -1) -> None:
        sources = tuple(rows[name] for name in names)
        shapes = tuple(table.shapes[row] for row in sources)
        if (step, shapes) not in shared:
            shared[step, shapes] = _lowered(names[0], step, shapes)
        shape, copies = shared[step, shapes]
        targets.append(Target(made, table.dtypes[sources[0]], shape, rule, sources, copies))

    for row, name in enumerate(table.names):
        if row in table.hidden:
            continue
        path, _, leaf_name = name.rpartition(".")
        steps: list[_Step] = []
        suffix = ""
        if is_experts(path):
            suffix = next((suffix for suffix in SCALES if leaf_name.endswith(suffix)), "")
            steps = _steps(leaf_name.removesuffix(suffix), source(path), target(path), gated(path))
        if not steps:
            add(name, [name], None)
        for step in steps:
            names = [f"{path}.{buffer.name}{suffix}" for buffer in step.sources]
            present = [each for each in names if each in rows]
            if name != present[0]:
                continue  # made together with the first of them
            if present != names or len({table.dtypes[rows[each]] for each in names}) > 1:
                raise _not_together(names, table, rows)
            if step.moves and suffix and step.parts_gate_and_up:
                raise UnsupportedError(message(f"{name}: gate and up that share a scale cannot be moved apart", do=_DO))
            if step.moves and not suffix and table.dtypes[row] in packed and path in scaled:
                text = f"{name}: packed codes cannot be laid out anew"
                raise UnsupportedError(message(text, found=table.dtypes[row], do=_DO))
            made = f"{path}.{step.target.name}{suffix}"
            changes = step.moves or made != name
            add(made, names, step, rules.setdefault(_rule(step, suffix), len(rules)) if changes else -1)
    plan = CopyPlan(table, tuple(targets), tuple(rules))
    plan.validate()
    return plan


def _steps(leaf_name: str, before: Layout, after: Layout, gated: bool) -> list[_Step]:
    """The steps that use the buffer of that name; none if the old layout has no such buffer."""
    for has_gate in (gated, not gated):
        old, new = before.of(has_gate), after.of(has_gate)
        found = next((buffer for buffer in old if buffer.name == leaf_name), None)
        if found is not None:
            return [
                _Step(tuple(each for each in old if _overlap(each, target)), target)
                for target in new
                if _overlap(found, target)
            ]
    return []


def _overlap(one: Buffer, other: Buffer) -> bool:
    """Whether both hold something of the same weight or bias."""
    return one.is_weight == other.is_weight and not set(one.projections).isdisjoint(other.projections)


def _dim_of_g(buffer: Buffer) -> tuple[str, ...] | None:
    return next((dim for dim in dims_of(buffer.axes) if "g" in dim), None)


def _rule(step: _Step, suffix: str) -> str:
    """The text of the rule that a plan names for a step.

    >>> from automodel_conv.planning.layouts import LAYOUTS
    >>> print(_rule(_Step(LAYOUTS["transformers"].first[:1], LAYOUTS["nemo"].first[0]), ""))
    experts.gate_up_proj -> experts.gate_and_up_projs: E (g i) h -> E h (g i)
    """
    before, after = step.sources[0], step.target
    names = ", ".join(f"experts.{buffer.name}{suffix}" for buffer in step.sources)
    what = f"{before.axes} -> {after.axes}" if step.moves else "rename"
    if before.projections != after.projections:
        read = "; ".join(" ".join(buffer.projections) for buffer in step.sources)
        what += f", g: {read} -> {' '.join(after.projections)}"
    return f"{names} -> experts.{after.name}{suffix}: {what}"


def _lowered(name: str, step: _Step | None, shapes: Sequence[tuple[int, ...]]) -> _Made:
    values = [leaf(number, shape) for number, shape in enumerate(shapes)]
    if step is None or not step.moves:
        return values[0].shape, copies_of(values[0])
    try:
        value = _made(step, values)
    except LoweringError as error:
        raise UnsupportedError(
            message(
                f"{name} does not have the shape that its layout says",
                found=f"{[*shapes[0]]}: {error}",
            )
        ) from None
    return value.shape, copies_of(value)


def _made(step: _Step, values: Sequence[Value]) -> Value:
    sources, target = step
    if sources[0].projections == target.projections:
        return _rearranged(values[0], sources[0].axes, target.axes, {"g": len(target.projections)})
    plain = " ".join(axis for dim in dims_of(target.axes) for axis in dim if axis != "g")
    apart: dict[str, Value] = {}
    for source, value in zip(sources, values, strict=True):
        apart |= _projections(source, value, plain)
    if len(target.projections) == 1:
        return _rearranged(apart[target.projections[0]], plain, target.axes, {})
    return _rearranged(stack([apart[each] for each in target.projections], 0), f"g {plain}", target.axes, {})


def _rearranged(value: Value, before: str, after: str, known: Mapping[str, int]) -> Value:
    """A buffer with its axes in another order, as ``einops.rearrange``.

    Args:
        known: sizes of axes that share a dimension with another one, where they part.

    Raises:
        LoweringError: the value has another rank, or a size that the known ones do not divide.
    """
    dims, wanted = dims_of(before), dims_of(after)
    together = {dim for dim in dims if dim in wanted}  # one axis each: what stays together is not taken apart
    opened, made = _opened(dims, together), _opened(wanted, together)
    try:
        sizes = sizes_of(tuple(opened), value.shape, known)
    except ValueError as error:
        raise LoweringError(str(error)) from None
    axes = [axis for dim in opened for axis in dim]
    order = [axes.index(axis) for dim in made for axis in dim]
    rearranged = permute(reshape(value, [sizes[axis] for axis in axes]), order)
    return reshape(rearranged, [prod(sizes[axis] for axis in dim) for dim in made])


def _opened(dims: Dims, together: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [(" ".join(dim),) if dim in together else dim for dim in dims]


def _projections(buffer: Buffer, value: Value, plain: str) -> Mapping[str, Value]:
    """Each projection of a buffer by itself, its axes in the order of ``plain``."""
    if len(buffer.projections) == 1:
        return {buffer.projections[0]: _rearranged(value, buffer.axes, plain, {})}
    opened = _rearranged(value, buffer.axes, f"g {plain}", {"g": len(buffer.projections)})
    return {
        projection: reshape(narrow(opened, 0, number, 1), opened.shape[1:])
        for number, projection in enumerate(buffer.projections)
    }


def _not_together(names: Sequence[str], table: SourceTable, rows: Mapping[str, int]) -> UnsupportedError:
    """The error for gate and up that one buffer should hold, where one is missing or their dtypes differ."""
    return UnsupportedError(
        message(
            "gate and up of experts cannot be laid out together",
            expected=f"{' and '.join(names)}, of one dtype",
            found=[f"{name}: {table.dtypes[rows[name]] if name in rows else 'not there'}" for name in names],
        )
    )
