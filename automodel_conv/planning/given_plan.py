"""Check that a plan that a caller passes to a load fits the checkpoint and the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from automodel_conv.errors import ConversionError, Message, NameProblems, UnsupportedError, kind_of, listing, message
from automodel_conv.planning.arrangement import PLAIN
from automodel_conv.planning.copies import Decode, Fallback, SourceTable
from automodel_conv.planning.names import plain_names
from automodel_conv.planning.plan import CopyPlan

_RECOMPILE = "compile a plan for this checkpoint and this model: {compile_plan(...)}"


def as_plan(plan: object, decided: Mapping[str, object]) -> CopyPlan:
    """Return a plan as it is, or parse and validate the JSON text of one.

    Args:
        plan: a ``CopyPlan``, or the text that its ``to_json`` returns.
        decided: arguments that the plan already determines, by name; None if the caller did not pass one.

    Raises:
        ConversionError: the caller passed one of these arguments too.
        UnsupportedError: ``plan`` is neither a plan nor such a text.
        CoverageError: see ``CopyPlan.from_json``.
    """
    given = [f"{name}={value!r}" for name, value in decided.items() if value is not None]
    if given:
        raise ConversionError(
            message(
                "plan= already determines these arguments",
                found=", ".join(given),
                do=["leave them out", "leave {plan} out, or pass them to compile_plan()"],
            )
        )
    if isinstance(plan, CopyPlan):
        return plan
    if isinstance(plan, str) and plan.lstrip().startswith("{"):
        return CopyPlan.from_json(plan)
    raise UnsupportedError(
        message(
            "plan= is not a plan",
            expected="the plan that compile_plan() returns, or the text that its to_json() returns",
            found=kind_of(plan),
            do="if the plan is in a file, pass its text: Path(file).read_text()",
        )
    )


@dataclass
class Misfits:
    """All differences between a plan and the checkpoint and model that it is used with."""

    absent: list[str] = field(default_factory=list)
    """Names of the plan's sources that the checkpoint lacks."""
    unlike: list[tuple[str, str, str]] = field(default_factory=list)
    """``(source, description in the plan, description in the checkpoint)`` for each source that differs."""
    unknown: list[str] = field(default_factory=list)
    """Names of tensors in the checkpoint that the plan does not have."""
    unexpected: list[str] = field(default_factory=list)
    """Names of the plan's targets that the model lacks."""
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """``(target, shape in the plan, shape in the model)`` for each target that differs."""

    def raise_if_any(self, where: str, plan: CopyPlan, missing: list[str]) -> None:
        """Raise one NameProblems that lists all differences.

        Args:
            where: path of the checkpoint.
            missing: names that the plan does not produce, if that is an error; else an empty list.
        """
        parts = [
            ("the checkpoint lacks", self.absent),
            (
                "the checkpoint has them in another form",
                [f"{name}: the plan reads {planned}, found {stored}" for name, planned, stored in self.unlike],
            ),
            ("the plan does not have", self.unknown),
            ("the model lacks", self.unexpected),
            (
                "the model has other shapes",
                [
                    f"{name}: the plan produces {list(planned)}, expected {list(has)}"
                    for name, planned, has in self.mismatched
                ],
            ),
            ("missing: the plan does not produce", missing),
        ]
        sections = [f"  {title} ({len(items)}):\n{listing(items)}" for title, items in parts if items]
        if not sections:
            return
        do = [_RECOMPILE, "leave {plan} out"]
        if not (self.unexpected or self.mismatched or self._reads_misfits(plan)):
            do.append("{strict=False} loads what the plan produces")
        raise NameProblems(
            Message("\n".join([f"the plan does not fit this load: {where}", *sections]), do),
            missing=missing,
            unexpected=[*self.unexpected, *self.unknown],
            mismatched=self.mismatched,
            incomplete=self._incomplete(plan),
        )

    def _reads_misfits(self, plan: CopyPlan) -> bool:
        """Return whether the plan reads a source that is absent or differs."""
        wrong = {*self.absent, *(name for name, _, _ in self.unlike)}
        return any(plan.sources.names[row] in wrong for row in _rows_read(plan))

    def _incomplete(self, plan: CopyPlan) -> list[tuple[str, tuple[str, ...]]]:
        """Return ``(target, absent sources)`` for each target that lacks a source."""
        absent, names = set(self.absent), plan.sources.names
        lacking = ((t.name, tuple(names[row] for row in t.sources if names[row] in absent)) for t in plan.targets)
        return [(name, lacks) for name, lacks in lacking if lacks]


def fit_sources(plan: CopyPlan, table: SourceTable, misfits: Misfits, strict: bool) -> CopyPlan:
    """Return the plan with its sources renumbered to the rows of a checkpoint.

    The checkpoint may store its tensors in another order than the plan lists them.

    Args:
        table: the checkpoint's tensors. Quantized tensors are decoded if the plan decodes any.
        misfits: receives every difference. If it has any, the returned plan cannot be executed.
        strict: sources that the plan does not read must fit too, and the plan must have every tensor of the checkpoint.
    """
    planned = plan.sources
    columns = (table.names, table.dtypes, table.shapes)
    if (planned.names, planned.dtypes, planned.shapes) == columns and planned.decodes == table.decodes:
        return plan
    rows = _rows_of(planned.names, table.names, [target.name for target in plan.targets])
    table = table.read_as({at: planned.dtypes[row] for row in planned.stored if (at := rows[row]) is not None})
    read = _rows_read(plan)
    for row, name in enumerate(planned.names):
        new_row = rows[row]
        if new_row is None:
            if strict or row in read:
                misfits.absent.append(name)
            continue
        if strict or row in read:
            expected, stored = _Source.of(planned, row, rows), _Source.of(table, new_row)
            if expected != stored:
                misfits.unlike.append((name, str(expected), str(stored)))
    if strict:
        known = set(rows)
        misfits.unknown += [name for row, name in enumerate(table.names) if row not in known]
    if misfits.absent or misfits.unlike:
        return plan
    renumbered = _Renumbered(rows)
    targets = tuple(
        target._replace(
            sources=tuple([rows[row] for row in target.sources]),
            fallback=None if target.fallback is None else renumbered(target.fallback),
        )
        for target in plan.targets
    )
    return replace(plan, sources=table, targets=targets)


def fit_targets(plan: CopyPlan, shapes: Mapping[str, tuple[int, ...]], misfits: Misfits) -> list[str]:
    """Return the model's names that the plan does not produce.

    Args:
        shapes: shapes of all tensors of the model, by name.
        misfits: receives the targets that the model lacks or has in another shape.
    """
    for target in plan.targets:
        has = shapes.get(target.name)
        if has is None:
            misfits.unexpected.append(target.name)
        elif has != target.shape:
            misfits.mismatched.append((target.name, target.shape, has))
    produced = {target.name for target in plan.targets}
    return [name for name in shapes if name not in produced]


class _Source(NamedTuple):
    """The dtype, shape and decoding of one row of a source table."""

    dtype: str
    shape: tuple[int, ...]
    decode: Decode | None
    stored: tuple[str, tuple[int, ...]] | None
    """Dtype and shape in the checkpoint, if its bytes are read as another dtype."""

    @staticmethod
    def of(table: SourceTable, row: int, rows: list[int | None] | None = None) -> _Source:
        """Return the source in a row.

        Args:
            table: the table.
            row: row in the table.
            rows: rows of another table, by row; if given, the row of each scale and zero point is replaced by it.
        """
        decode = table.decodes.get(row)
        if decode is not None and rows is not None:
            decode = decode.with_part_rows([None if part is None else rows[part] for part in decode.part_rows])
        return _Source(table.dtypes[row], table.shapes[row], decode, table.stored.get(row))

    def __str__(self) -> str:
        text = f"{self.dtype} {list(self.shape)}"
        if self.stored is not None:
            code, shape = self.stored
            return f"{code} {list(shape)} as {text}"
        if self.decode is None:
            return text
        flags = [flag for flag in ("divides", "like_upstream") if getattr(self.decode, flag)]
        if self.decode.arrangement != PLAIN:
            flags.insert(0, f"arranged {self.decode.arrangement}")
        return ", ".join([f"{text} of {self.decode.format} codes in blocks of {list(self.decode.block)}", *flags])


def _rows_of(names: Sequence[str], stored: Sequence[str], known: Collection[str]) -> list[int | None]:
    """Return the row of each name among ``stored`` names, with or without wrapper prefixes; None if it is absent."""
    position = dict(zip(stored, range(len(stored)), strict=True))
    if any(name not in position for name in names):
        position = dict(zip(plain_names(stored, known), range(len(stored)), strict=True)) | position
    return [position.get(name) for name in names]


def _rows_read(plan: CopyPlan) -> frozenset[int]:
    """Return the rows that the plan reads, including scales and zero points of quantized tensors."""
    decodes = plan.sources.decodes
    return plan.used_sources.union(*(decodes[row].parts for row in plan.used_sources & decodes.keys()))


class _Renumbered:
    """Fallbacks that receive their sources by new rows.

    Targets that shared a fallback still share one.
    """

    def __init__(self, rows: list[int | None]):
        self._old_rows = {new: old for old, new in enumerate(rows) if new is not None}
        self._renumbered: dict[int, Fallback] = {}

    def __call__(self, fallback: Fallback) -> Fallback:
        if id(fallback) not in self._renumbered:
            self._renumbered[id(fallback)] = fallback._replace(convert=self._by_old_rows(fallback.convert))
        return self._renumbered[id(fallback)]

    def _by_old_rows(self, convert: Callable[[Mapping[int, Any]], dict[str, Any]]):
        return lambda sources: convert({self._old_rows[row]: tensor for row, tensor in sources.items()})
