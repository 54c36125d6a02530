"""Plans that rearrange grouped experts from one layout to another; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from automodel_conv.dtypes import FLOATING
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.axes import dims_of
from automodel_conv.planning.buffer_values import buffer_of, projections_in, rearrange, without_padding
from automodel_conv.planning.buffers import Buffer, Layout
from automodel_conv.planning.code_names import packed_dtypes
from automodel_conv.planning.copies import Fill, SourceTable, StridedCopy, Target
from automodel_conv.planning.layouts import (
    SCALES,
    holds_grouped_experts,
    is_experts,
    is_weight,
    layouts_that_pad,
    layouts_without_padding,
)
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import LoweringError, Value, leaf

_ADVICE = "{dequantize=True} decodes them to values"
_AXES = {"i": "intermediate size", "h": "hidden size"}
_Geometry = tuple[tuple[int, ...], tuple[StridedCopy, ...], tuple[Fill, ...]]  # shape, copies and fills of a target


class _Fill(NamedTuple):
    """A buffer of the new layout, and the buffers of the old layout that fill it."""

    sources: tuple[Buffer, ...]
    target: Buffer
    sizes: tuple[tuple[str, int], ...] = ()
    """Sizes of the axes that the sources pad, without padding."""

    @property
    def moves(self) -> bool:
        """Whether elements change their positions."""
        return self.sources[0].arrangement != self.target.arrangement

    @property
    def regroups_gate_and_up(self) -> bool:
        """Whether gate and up change their arrangement relative to each other."""
        before, after = self.sources[0], self.target
        if before.blocks != after.blocks or before.projections != after.projections:
            return True
        return _projection_dim(before) != _projection_dim(after)

    @property
    def is_permutation(self) -> bool:
        """Whether only the order of the axes changes, so that no size but that of g is needed."""
        before, after = self.sources[0], self.target
        is_plain = not any(buffer.blocks or buffer.padded for buffer in (before, after))
        return is_plain and before.projections == after.projections


def relayout(
    table: SourceTable,
    source: Callable[[str], Layout],
    target: Callable[[str], Layout],
    gated: Callable[[str], bool],
    sizes: Callable[[str], Mapping[str, int]] = lambda path: {},
) -> CopyPlan:
    """Return the plan that rearranges all grouped experts of ``table`` and passes all other tensors through.

    Hidden rows have no target.

    Args:
        table: sources of the plan.
        source: maps the name of an experts module to its layout in ``table``.
        target: maps the name of an experts module to its new layout.
        gated: whether the experts module with this name has a gate; it decides only if a buffer's name fits both.
        sizes: maps the name of an experts module to the sizes, without padding, of the axes that ``source`` pads.

    Raises:
        UnsupportedError: an experts tensor has a rank, size or dtype that its layout cannot have; gate comes without up
            and one buffer should hold both; rows that share a scale would be separated; packed codes would be
            rearranged; the new layout has no biases, and the experts do; or a size without padding is not known.
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
        shape, copies, fills = shared[fill, shapes]
        targets.append(Target(target_name, table.dtypes[sources[0]], shape, rule, sources, copies, fills=fills))

    for row, name in enumerate(table.names):
        if row in table.hidden:
            continue
        path, _, leaf_name = name.rpartition(".")
        fills: list[_Fill] = []
        suffix = ""
        if is_experts(path):
            suffix = next((suffix for suffix in SCALES if leaf_name.endswith(suffix)), "")
            before, after = source(path), target(path)
            _refuse_biases(name, before, after)
            read_sizes = tuple(sizes(path).items()) if before.is_padded else ()
            fills = _fills(leaf_name.removesuffix(suffix), before, after, gated(path), read_sizes)
        if not fills:
            add(name, [name], None)
        for fill in fills:
            names = [f"{path}.{buffer.name}{suffix}" for buffer in fill.sources]
            present = [source_name for source_name in names if source_name in rows]
            if name != present[0]:
                continue  # the first of these names adds the target
            if present != names or len({table.dtypes[rows[source_name]] for source_name in names}) > 1:
                raise _cannot_combine(names, table, rows)
            if fill.moves:
                _refuse_dtype(name, table.dtypes[row], fill)
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


def _fills(
    leaf_name: str, before: Layout, after: Layout, gated: bool, sizes: tuple[tuple[str, int], ...]
) -> list[_Fill]:
    """Return the fills that read the buffer with this name; none if the old layout has no such buffer."""
    for has_gate in (gated, not gated):
        old, new = before.buffers(has_gate), after.buffers(has_gate)
        read = next((buffer for buffer in old if buffer.name == leaf_name), None)
        if read is not None:
            return [
                _Fill(tuple(buffer for buffer in old if _overlaps(buffer, target)), target, sizes)
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
    action = f"{before.text} -> {after.text}" if fill.moves else "rename"
    if before.projections != after.projections:
        read = "; ".join(" ".join(buffer.projections) for buffer in fill.sources)
        action += f", g: {read} -> {' '.join(after.projections)}"
    return f"{names} -> experts.{after.name}{suffix}: {action}"


def _lower(name: str, fill: _Fill | None, shapes: Sequence[tuple[int, ...]]) -> _Geometry:
    values = [leaf(number, shape) for number, shape in enumerate(shapes)]
    if fill is None or not fill.moves:
        return values[0].shape, copies_of(values[0]), ()
    for buffer, shape in zip(fill.sources, shapes, strict=False):
        _refuse_sizes(name, buffer, fill, shape)
    try:
        value = _compute(fill, values)
    except LoweringError as error:
        raise UnsupportedError(
            message(
                f"{name} does not have a shape that its layout allows",
                found=f"{[*shapes[0]]}: {error}",
            )
        ) from None
    return value.shape, *without_padding(copies_of(value), len(values))


def _compute(fill: _Fill, values: Sequence[Value]) -> Value:
    """Return the new buffer as a symbolic tensor, computed from the old ones; padding is the source after them."""
    sources, target, sizes = fill
    if fill.is_permutation:
        return rearrange(values[0], sources[0].axes, target.axes, {"g": len(target.projections)})
    projections: dict[str, Value] = {}
    for source, value in zip(sources, values, strict=True):
        projections |= projections_in(source, value, dict(sizes))
    return buffer_of(target, projections, len(values))


def _refuse_biases(name: str, before: Layout, after: Layout) -> None:
    """Raise UnsupportedError for a bias of experts that the old or the new layout has no place for."""
    is_bias = holds_grouped_experts(name) and not is_weight(name)
    if is_bias and not (before.has_biases and after.has_biases):
        text, do = f"{name}: the kernel that reads this layout does not take it", "choose another layout"
        raise UnsupportedError(message(text, expected="experts without biases", do=do))


def _refuse_dtype(name: str, dtype: str, fill: _Fill) -> None:
    """Raise UnsupportedError for a dtype that the old or the new buffer cannot have."""
    for buffer in (*fill.sources, fill.target):
        if buffer.dtypes and dtype not in buffer.dtypes:
            text = f"{name}: the kernel that reads this layout does not take it"
            do = "pass {dtype=}" if dtype in FLOATING else _ADVICE
            raise UnsupportedError(message(text, expected=" or ".join(buffer.dtypes), found=dtype, do=do))


def _refuse_sizes(name: str, source: Buffer, fill: _Fill, shape: Sequence[int]) -> None:
    """Raise UnsupportedError for sizes that a layout does not divide into blocks, or that padding hides."""
    unknown = [_AXES[axis] for axis, _ in source.padded if axis not in dict(fill.sizes)]
    if unknown:
        text = f"{name}: the {unknown[0]} without padding is not known, because the layout pads it"
        do = ["pass {model=}, whose parameters have this size", "pass {reference=}, whose tensors have it"]
        do += [f'state the layout "{other}" if nothing is padded' for other in layouts_without_padding(source)[:1]]
        raise UnsupportedError(message(text, found=[*shape], do=do))
    sizes = (source.sizes(shape) or {}) | dict(fill.sizes)
    for buffer in (source, fill.target):
        for axis, multiple in buffer.multiples:
            if sizes.get(axis, 0) % multiple:
                do = [f'the layout "{other}" pads it' for other in layouts_that_pad(buffer, axis)]
                if buffer is source:
                    do = ["check that the experts are in this layout"]
                raise UnsupportedError(
                    message(
                        f"{name}: the {_AXES[axis]} does not fit the blocks of the layout",
                        expected=f"a multiple of {multiple}",
                        found=sizes[axis],
                        do=do or "choose another layout for experts of this size",
                    )
                )


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
