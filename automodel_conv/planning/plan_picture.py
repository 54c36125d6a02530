"""The page that shows a plan: files on one side, buffers on the other, and which elements fill which; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from math import prod
from typing import Any, Protocol

from automodel_conv.dtypes import nbytes
from automodel_conv.errors import CoverageError, message
from automodel_conv.pictures.page import page
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target
from automodel_conv.planning.regions import Region, whole

_SCRIPTS = ("geometry.js", "elements.js", "rows.js", "matrix.js", "plan.js")

RankRegions = Mapping[str, Mapping[str, Region]]
"""Regions of targets by name, for each rank by its label, as ``CopyPlan.shard`` takes them."""


class Shown(Protocol):
    """The parts of a ``CopyPlan`` that its page shows."""

    @property
    def sources(self) -> SourceTable: ...
    @property
    def targets(self) -> tuple[Target, ...]: ...
    @property
    def rules(self) -> tuple[str, ...]: ...
    @property
    def missing(self) -> tuple[str, ...]: ...
    def execution_of(self, target: Target) -> str: ...


def plan_page(plan: Shown, left_out: Sequence[int], title: str, ranks: RankRegions) -> str:
    """Return the page that shows a plan.

    Args:
        plan: the plan.
        left_out: rows of the sources that no target needs.
        title: title of the page.
        ranks: the part of each target that each rank holds; a rank holds all of the targets that it does not name.

    Raises:
        CoverageError: a region belongs to a tensor of another shape.
    """
    return page(title, "plan.html", ["plan.css"], _SCRIPTS, plan_data(plan, left_out, title, ranks))


def plan_data(plan: Shown, left_out: Sequence[int], title: str, ranks: RankRegions) -> dict[str, Any]:
    """Return what the page shows, as values of JSON; see ``plan_page``.

    Texts, shapes and copies that repeat are written once, and referred to by their number.
    """
    sources = plan.sources
    shapes, ways = _Numbers(), _Numbers()
    groups: list[tuple[StridedCopy, ...]] = []
    group_of: dict[int, int] = {}
    targets = []
    for target in plan.targets:
        if id(target.copies) not in group_of:
            group_of[id(target.copies)] = len(groups)
            groups.append(target.copies)
        row: list[Any] = [target.name, target.dtype, shapes.number(target.shape), target.rule, target.sources]
        row += [group_of[id(target.copies)], ways.number(plan.execution_of(target)), target.nbytes]
        row += [[[f.json_value, f.shape, f.strides, f.offset] for f in target.fills]]
        row += [None if target.fallback is None else target.fallback.reason]
        targets.append(row)
    return {
        "title": title,
        "names": list(sources.names),
        "kinds": [_kind(sources, row) for row in range(len(sources.names))],
        "shapeOf": [shapes.number(tuple(shape)) for shape in sources.shapes],
        "bytesOf": [sources.nbytes(row) for row in range(len(sources.names))],
        "places": _places(sources),
        "viewed": {row: sources.dtypes[row] for row in sources.stored},
        "decodes": {row: [d.matrix, d.block, d.parts, not d.scale_word] for row, d in sources.decodes.items()},
        "copies": [[_copy(copy) for copy in group] for group in groups],
        "targets": targets,
        "rules": list(plan.rules),
        "ways": list(ways.values),
        "leftOut": list(left_out),
        "missing": list(plan.missing),
        "ranks": _ranks(plan.targets, ranks),
        "shapes": list(shapes.values),
    }


class _Numbers:
    """Values that repeat, each with its number."""

    def __init__(self) -> None:
        self.values: dict[Any, int] = {}

    def number(self, value: Any) -> int:
        return self.values.setdefault(value, len(self.values))


def _copy(copy: StridedCopy) -> list[Any]:
    return [*copy.box, copy.ordinals, copy.source_offsets, copy.target_offsets]


def _kind(sources: SourceTable, row: int) -> str:
    """Return the dtype of a source, or the format of its codes."""
    if row in sources.decodes:
        return sources.decodes[row].format
    stored = f"{sources.stored[row][0]} as " if row in sources.stored else ""
    return f"{stored}{sources.dtypes[row]}"


def _places(sources: SourceTable) -> dict[str, Any] | None:
    places = sources.places
    if places is None:
        return None
    return {"files": _below_folder(places.files), "file": list(places.file_ids), "offset": list(places.offsets)}


def _below_folder(paths: Sequence[str]) -> list[str]:
    """Return paths or URLs without the folder that they share, which belongs to the machine of the reader."""
    folders = [path.split("/")[:-1] for path in paths]
    depth = len([*takewhile(lambda names: len({*names}) == 1, zip(*folders, strict=False))])
    return ["/".join(path.split("/")[depth:]) for path in paths]


def _ranks(targets: Sequence[Target], ranks: RankRegions) -> dict[str, Any] | None:
    """Return the regions of all ranks: which regions there are, and for each target the number of each rank's."""
    if not ranks:
        return None
    regions, combinations = _Numbers(), _Numbers()
    held = [0] * len(ranks)
    of_target = []
    for target in targets:
        numbers = []
        for rank, (label, named) in enumerate(ranks.items()):
            region = named.get(target.name) or whole(target.shape)
            if region.shape != target.shape:
                found = f"a region of {list(region.shape)}"
                text = f"{target.name} has another shape"
                raise CoverageError(message(text, where=label, expected=list(target.shape), found=found))
            numbers.append(regions.number(region.runs))
            held[rank] += nbytes(target.dtype, prod(region.local_shape))
        of_target.append(combinations.number(tuple(numbers)))
    return {
        "labels": list(ranks),
        "held": held,
        "regions": list(regions.values),
        "combinations": list(combinations.values),
        "of": of_target,
    }
