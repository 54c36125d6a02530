"""The JSON form of a plan: write its fields, and read them back with a check of every type, length and row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, TypeVar

import msgspec

from automodel_conv.dtypes import BITS, nbytes
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import CODE_BITS, Decode, Fill, SourceTable, StridedCopy, Target

_VERSION = 5
# Fields that JSON represents as they are.
_PLAIN_FIELDS = ("rules", "missing", "unexpected", "mismatched", "tied")

T = TypeVar("T")


def text_of(plan: Mapping[str, Any]) -> str:
    """Return the JSON form of the fields of a plan.

    Copies that targets share are written once.
    """
    group_of: dict[int, int] = {}
    copies: list[tuple[StridedCopy, ...]] = []
    targets: Sequence[Target] = plan["targets"]
    for target in targets:
        if id(target.copies) not in group_of:
            group_of[id(target.copies)] = len(copies)
            copies.append(target.copies)
    sources: SourceTable = plan["sources"]
    return json.dumps(
        {
            "version": _VERSION,
            "sources": [list(sources.names), list(sources.dtypes), list(sources.shapes)],
            "decodes": list(sources.decodes.items()),
            "hidden": sorted(sources.hidden),
            "copies": [[_row(copy) for copy in group] for group in copies],
            "stored": list(sources.stored.items()),
            "targets": [
                _Target(t.name, t.dtype, t.shape, t.rule, t.sources, group_of[id(t.copies)], _fill_rows(t.fills))
                for t in targets
            ],
            **{name: plan[name] for name in _PLAIN_FIELDS},
            "layouts": [plan["layout"], plan["source_layout"]],
        }
    )


def _fill_rows(fills: Sequence[Fill]) -> tuple[_Fill, ...]:
    return tuple(_Fill(f.json_value, f.shape, f.strides, f.offset) for f in fills)


def _row(copy: StridedCopy) -> _Copy:
    return _Copy(*copy.box, copy.ordinals, copy.source_offsets, copy.target_offsets)


def fields_of(text: str) -> dict[str, Any]:
    """Return the fields of a plan from its JSON form.

    The caller must validate the plan.

    Raises:
        UnsupportedError: the text is not the JSON form of a plan, or has another version.
    """
    version = _parse(text, _Versioned).version
    if version != _VERSION:
        raise _not_a_plan(f"version {version}")
    return _fields(_parse(text, _Form))


class _Versioned(msgspec.Struct):
    version: int


class _Copy(NamedTuple):
    """A ``StridedCopy`` as one row: the fields of its box, then its columns."""

    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    ordinals: tuple[int, ...]
    source_offsets: tuple[int, ...]
    target_offsets: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        """Whether every dimension has a stride on both sides, and all columns have the same length."""
        strides = len(self.source_strides), len(self.target_strides)
        columns = len(self.source_offsets), len(self.target_offsets)
        return strides == (len(self.shape),) * 2 and columns == (len(self.ordinals),) * 2

    def copy(self) -> StridedCopy:
        box = Box(self.shape, self.source_strides, self.target_strides)
        return StridedCopy(box, self.ordinals, self.source_offsets, self.target_offsets)


class _Fill(NamedTuple):
    """A ``Fill`` with its ``json_value``."""

    value: bool | int | float | str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class _Target(NamedTuple):
    """A ``Target`` as one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rule: int
    sources: tuple[int, ...]
    copies: int
    """Row of its copies in ``_Form.copies``."""
    fills: tuple[_Fill, ...]


class _Form(msgspec.Struct):
    """The JSON form that ``text_of`` writes."""

    sources: tuple[list[str], list[str], list[tuple[int, ...]]]
    decodes: list[tuple[int, Decode]]
    hidden: list[int]
    copies: list[list[_Copy]]
    stored: list[tuple[int, tuple[str, tuple[int, ...]]]]
    targets: list[_Target]
    rules: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    tied: tuple[tuple[str, ...], ...]
    layouts: tuple[str | None, str | None]


def _parse(text: str, form: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=form)
    except (ValueError, RecursionError) as error:
        raise _not_a_plan(error) from error


def _not_a_plan(found: object) -> UnsupportedError:
    expected = f"the output of to_json() of a plan, version {_VERSION}"
    do = "compile the plan again: {compile_plan(...)}"
    return UnsupportedError(message("not a plan in JSON form", expected=expected, found=found, do=do))


def _fields(form: _Form) -> dict[str, Any]:
    names, dtypes, shapes = form.sources
    if not len(names) == len(dtypes) == len(shapes):
        raise _not_a_plan("source columns that differ in length")
    stored = dict(form.stored)
    unknown = {*dtypes, *(t.dtype for t in form.targets), *(dtype for dtype, _ in stored.values())} - BITS.keys()
    if unknown:
        raise _not_a_plan(f"unknown dtypes {sorted(unknown)}")
    copies = [copy for group in form.copies for copy in group]
    fills = [fill for target in form.targets for fill in target.fills]
    sizes = [
        *shapes,
        *(part.shape for part in (*form.targets, *copies, *fills)),
        *(shape for _, shape in stored.values()),
    ]
    if any(min(shape, default=0) < 0 for shape in sizes):
        raise _not_a_plan("a negative size")
    if any(len(fill.shape) != len(fill.strides) for fill in fills):
        raise _not_a_plan("constants whose shape and strides differ in length")
    if any(isinstance(fill.value, str) and fill.value not in ("inf", "-inf", "nan") for fill in fills):
        raise _not_a_plan("constants that are no numbers")
    if any(
        nbytes(*has) != nbytes(dtypes[row], prod(shapes[row])) if 0 <= row < len(names) else True
        for row, has in _numel(stored)
    ):
        raise _not_a_plan("sources that are read as more or fewer bytes than they have")
    if not all(copy.is_even for copy in copies):
        raise _not_a_plan("copies whose shape and strides, or whose columns, differ in length")
    if any(not 0 <= target.copies < len(form.copies) for target in form.targets):
        raise _not_a_plan("targets with unknown copies")
    if any(not -1 <= target.rule < len(form.rules) for target in form.targets):
        raise _not_a_plan("targets with unknown rules")
    decodes = dict(form.decodes)
    rows = [*decodes, *form.hidden, *(part for decode in decodes.values() for part in decode.parts)]
    if any(not 0 <= row < len(names) for row in rows):
        raise _not_a_plan("parts of quantized sources that are not sources")
    for row, decode in decodes.items():
        if not _reads_inside(decode, row, shapes):
            raise _not_a_plan(f"the parts of {names[row]} do not fit: {decode}")
    groups = [tuple(copy.copy() for copy in group) for group in form.copies]
    targets = tuple(
        Target(t.name, t.dtype, t.shape, t.rule, t.sources, groups[t.copies], fills=tuple(map(_fill, t.fills)))
        for t in form.targets
    )
    layout, source_layout = form.layouts
    return {
        "sources": SourceTable(names, dtypes, shapes, decodes, frozenset(form.hidden), stored),
        "targets": targets,
        **{name: getattr(form, name) for name in _PLAIN_FIELDS},
        "layout": layout,
        "source_layout": source_layout,
    }


def _fill(row: _Fill) -> Fill:
    return Fill(float(row.value) if isinstance(row.value, str) else row.value, row.shape, row.strides, row.offset)


def _numel(stored: Mapping[int, tuple[str, tuple[int, ...]]]) -> Iterator[tuple[int, tuple[str, int]]]:
    """Yield dtype and number of elements of sources as they are stored, by row."""
    for row, (dtype, shape) in stored.items():
        yield row, (dtype, prod(shape))


def _reads_inside(decode: Decode, row: int, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Return whether the parts of a quantized source have the sizes that its blocks require."""
    if decode.format not in CODE_BITS or len(shapes[row]) < 2:
        return False
    *lead, rows, columns = shapes[row]
    if decode.matrix == (prod(lead) * rows, columns):
        lead, rows = [], decode.matrix[0]
    if decode.matrix != (rows, columns) or min(decode.block) < 1 or decode.arrangement.shape(decode.matrix) is None:
        return False
    if not prod(shapes[row]):
        return True  # nothing is read
    grid_rows, grid_columns = -(-rows // decode.block[0]), -(-columns // decode.block[1])
    if min(decode.scale_word, default=1) < 1 or grid_columns % prod(decode.scale_word):
        return False
    if not -(2**31) <= decode.zero_packing.added < 2**31:
        return False
    matrices = prod(lead)
    zero_rows, zero_columns = decode.zero_packing.rows(0, grid_rows)[1], decode.zero_packing.columns(grid_columns)
    of_zero_points = {zero_rows * zero_columns} if not lead else set()  # no stack has them
    sizes = {matrices * grid_rows * grid_columns}, of_zero_points, {1, matrices}
    if decode.global_divisor is not None:
        if decode.global_scale is None or prod(shapes[decode.global_divisor]) != prod(shapes[decode.global_scale]):
            return False
    parts = decode.scales, decode.zero_points, decode.global_scale
    return all(part is None or prod(shapes[part]) in fitting for part, fitting in zip(parts, sizes, strict=True))
