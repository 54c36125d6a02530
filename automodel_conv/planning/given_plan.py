"""A plan that a caller hands to a load: whether it is one of this checkpoint and this model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from automodel_conv.errors import ConversionError, Message, NameProblems, UnsupportedError, kind_of, listing, message
from automodel_conv.planning.copies import Decode, Fallback, SourceTable
from automodel_conv.planning.names import plain_names
from automodel_conv.planning.plan import CopyPlan

_ANEW = "make the plan of this checkpoint and this model: {compile_plan(...)}"


def as_plan(plan: object, decided: Mapping[str, object]) -> CopyPlan:
    """The plan, or the one that a text is the JSON of; validated then.

    Args:
        decided: the arguments that a plan decides already, by name; None those that the caller has not given.

    Raises:
        ConversionError: one of them is given.
        UnsupportedError: it is neither a plan nor such a text.
        CoverageError: see ``CopyPlan.from_json``.
    """
    given = [f"{name}={value!r}" for name, value in decided.items() if value is not None]
    if given:
        raise ConversionError(
            message(
                "plan= decides already what these arguments say",
                found=", ".join(given),
                do=["leave them out", "leave {plan} out, or pass them to compile_plan(), which makes the plan"],
            )
        )
    if isinstance(plan, CopyPlan):
        return plan
    if isinstance(plan, str) and plan.lstrip().startswith("{"):
        return CopyPlan.from_json(plan)
    raise UnsupportedError(
        message(
            "plan= is no plan",
            expected="what compile_plan() returns, or the text that its to_json() gives",
            found=kind_of(plan),
            do="of a plan in a file, pass the text: Path(file).read_text()",
        )
    )


@dataclass
class Misfits:
    """Everything in which a plan differs from a checkpoint and a model."""

    absent: list[str] = field(default_factory=list)
    """Sources of the plan that the checkpoint lacks."""
    unlike: list[tuple[str, str, str]] = field(default_factory=list)
    """Sources with what the plan and the checkpoint say of them."""
    unknown: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that the plan does not know."""
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """As in ``NameProblems``, of targets."""

    def raise_if_any(self, where: str, plan: CopyPlan, missing: list[str]) -> None:
        """Raise NameProblems with all of them in one text.

        Args:
            missing: names that the plan does not make, where that is an error.
        """
        parts = [
            ("the checkpoint lacks", self.absent),
            (
                "the checkpoint has them otherwise",
                [f"{name}: the plan reads {ours}, found {found}" for name, ours, found in self.unlike],
            ),
            ("the plan does not know", self.unknown),
            ("the model lacks", self.unexpected),
            (
                "the model has other shapes",
                [f"{name}: the plan makes {list(ours)}, expected {list(has)}" for name, ours, has in self.mismatched],
            ),
            ("missing: the plan does not make", missing),
        ]
        found = [f"  {title} ({len(items)}):\n{listing(items)}" for title, items in parts if items]
        if not found:
            return
        do = [_ANEW, "leave {plan} out"]
        if not (self.unexpected or self.mismatched or self._used(plan)):
            do.append("{strict=False} loads what the plan makes")
        raise NameProblems(
            Message("\n".join([f"the plan does not fit this load: {where}", *found]), do),
            missing=missing,
            unexpected=[*self.unexpected, *self.unknown],
            mismatched=self.mismatched,
            incomplete=self._incomplete(plan),
        )

    def _used(self, plan: CopyPlan) -> bool:
        wrong = {*self.absent, *(name for name, _, _ in self.unlike)}
        return any(plan.sources.names[row] in wrong for row in _rows_read(plan))

    def _incomplete(self, plan: CopyPlan) -> list[tuple[str, tuple[str, ...]]]:
        absent, names = set(self.absent), plan.sources.names
        lacking = ((t.name, tuple(names[row] for row in t.sources if names[row] in absent)) for t in plan.targets)
        return [(name, lacks) for name, lacks in lacking if lacks]


def fit_sources(plan: CopyPlan, table: SourceTable, misfits: Misfits, strict: bool) -> CopyPlan:
    """The plan with the rows of a checkpoint, whose tensors may lie in another order than the plan's.

    Args:
        table: what the checkpoint offers; quantized tensors decoded, if any of the plan's are.
        misfits: takes what does not fit; the plan cannot be executed then.
        strict: sources that nothing is made of must fit too, and the plan must know all tensors.
    """
    ours = plan.sources
    columns = (table.names, table.dtypes, table.shapes)
    if (ours.names, ours.dtypes, ours.shapes) == columns and ours.decodes == table.decodes:
        return plan
    rows = _rows_of(ours.names, table.names, [target.name for target in plan.targets])
    read = _rows_read(plan)
    for row, name in enumerate(ours.names):
        at = rows[row]
        if at is None:
            if strict or row in read:
                misfits.absent.append(name)
            continue
        if strict or row in read:
            said, found = _Source.of(ours, row, rows), _Source.of(table, at)
            if said != found:
                misfits.unlike.append((name, str(said), str(found)))
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
    """Names that the plan does not make, of those that a model has.

    Args:
        shapes: of all that the model has, by name.
        misfits: takes what does not fit.
    """
    for target in plan.targets:
        has = shapes.get(target.name)
        if has is None:
            misfits.unexpected.append(target.name)
        elif has != target.shape:
            misfits.mismatched.append((target.name, target.shape, has))
    made = {target.name for target in plan.targets}
    return [name for name in shapes if name not in made]


class _Source(NamedTuple):
    """A tensor as a table has it."""

    dtype: str
    shape: tuple[int, ...]
    decode: Decode | None

    @staticmethod
    def of(table: SourceTable, row: int, rows: list[int | None] | None = None) -> _Source:
        """The tensor of a row. ``rows`` renumbers the parts of a quantized one: the rows that they have elsewhere."""
        decode = table.decodes.get(row)
        if decode is not None and rows is not None:
            scales, zero_points, global_scale = (
                None if part is None else rows[part]
                for part in (decode.scales, decode.zero_points, decode.global_scale)
            )
            decode = decode._replace(scales=scales, zero_points=zero_points, global_scale=global_scale)
        return _Source(table.dtypes[row], table.shapes[row], decode)

    def __str__(self) -> str:
        text = f"{self.dtype} {list(self.shape)}"
        if self.decode is None:
            return text
        flags = [flag for flag in ("divides", "stored_transposed", "like_upstream") if getattr(self.decode, flag)]
        return ", ".join([f"{text} of {self.decode.format} codes in blocks of {list(self.decode.block)}", *flags])


def _rows_of(names: Sequence[str], there: Sequence[str], known: Collection[str]) -> list[int | None]:
    """Of each name its row elsewhere, where wrappers may have put something into names; None if it is not there."""
    position = dict(zip(there, range(len(there)), strict=True))
    if any(name not in position for name in names):
        position = dict(zip(plain_names(there, known), range(len(there)), strict=True)) | position
    return [position.get(name) for name in names]


def _rows_read(plan: CopyPlan) -> frozenset[int]:
    """Rows that something is made of, parts of quantized tensors too."""
    decodes = plan.sources.decodes
    return plan.used_sources.union(*(decodes[row].parts for row in plan.used_sources & decodes.keys()))


class _Renumbered:
    """Fallbacks that take sources by other rows; targets that share one still do."""

    def __init__(self, rows: list[int | None]):
        self._old = {at: row for row, at in enumerate(rows) if at is not None}
        self._made: dict[int, Fallback] = {}

    def __call__(self, fallback: Fallback) -> Fallback:
        if id(fallback) not in self._made:
            self._made[id(fallback)] = fallback._replace(convert=self._by_old_rows(fallback.convert))
        return self._made[id(fallback)]

    def _by_old_rows(self, convert: Callable[[Mapping[int, Any]], dict[str, Any]]):
        return lambda sources: convert({self._old[row]: tensor for row, tensor in sources.items()})
