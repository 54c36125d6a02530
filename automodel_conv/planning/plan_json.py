"""The JSON form of a plan: write its fields, and read them back with a check of every type, length and row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, TypeVar

import msgspec

from automodel_conv.dtypes import BITS
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import CODE_BITS, Decode, SourceTable, StridedCopy, Target

_VERSION = 4
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
            "targets": [
                [t.name, t.dtype, t.shape, t.rule, t.sources, group_of[id(t.copies)], t.zero_rows] for t in targets
            ],
            **{name: plan[name] for name in _PLAIN_FIELDS},
            "layouts": [plan["layout"], plan["source_layout"]],
        }
    )


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


class _Form(msgspec.Struct):
    """The JSON form that ``text_of`` writes."""

    sources: tuple[list[str], list[str], list[tuple[int, ...]]]
    decodes: list[tuple[int, Decode]]
    hidden: list[int]
    copies: list[list[_Copy]]
    targets: list[tuple[str, str, tuple[int, ...], int, tuple[int, ...], int, int]]
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
    unknown = {*dtypes, *(dtype for _, dtype, *_ in form.targets)} - BITS.keys()
    if unknown:
        raise _not_a_plan(f"unknown dtypes {sorted(unknown)}")
    copies = [copy for group in form.copies for copy in group]
    sizes = [*shapes, *(shape for _, _, shape, *_ in form.targets), *(copy.shape for copy in copies)]
    if any(min(shape, default=0) < 0 for shape in sizes):
        raise _not_a_plan("a negative size")
    if not all(copy.is_even for copy in copies):
        raise _not_a_plan("copies whose shape and strides, or whose columns, differ in length")
    if any(not 0 <= group < len(form.copies) for *_, group, _ in form.targets):
        raise _not_a_plan("targets with unknown copies")
    if any(not -1 <= rule < len(form.rules) for _, _, _, rule, *_ in form.targets):
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
        Target(name, dtype, shape, rule, sources, groups[group], zero_rows=zero_rows)
        for name, dtype, shape, rule, sources, group, zero_rows in form.targets
    )
    layout, source_layout = form.layouts
    return {
        "sources": SourceTable(names, dtypes, shapes, decodes, frozenset(form.hidden)),
        "targets": targets,
        **{name: getattr(form, name) for name in _PLAIN_FIELDS},
        "layout": layout,
        "source_layout": source_layout,
    }


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
