"""The plan of a conversion: which strided copies fill which target, as integers and strings.

A plan is made from names, dtypes and shapes alone, validated before any tensor data moves, and says everything the
executors need. Copies of equal geometry are kept as one ``StridedCopy`` with columns of offsets, and targets made by
the same rule from sources of the same shapes share their copies, so a plan for 45,000 tensors stays small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

from automodel_conv.dtypes import DECODED
from automodel_conv.errors import UnknownTarget, UnsupportedError, message
from automodel_conv.planning.composition import chained, inverted, table_of
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.plan_json import fields_of, text_of
from automodel_conv.planning.proof import prove
from automodel_conv.planning.regions import Part, Region, parts_of, whole


@dataclass(frozen=True)
class CopyPlan:
    """A validated conversion. ``missing``, ``unexpected`` and ``mismatched`` are what a non-strict plan left out.

    ``tied``, ``layout`` and ``source_layout`` are what loads by this plan know of its model and its checkpoint.
    """

    sources: SourceTable
    targets: tuple[Target, ...]
    rules: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of names of the model that are one tensor."""
    layout: str | None = None
    """Of the experts that are made, as the caller has asked for it; None: as the model has them."""
    source_layout: str | None = None
    """Of the experts that are read, as files or caller say; None: nobody has said it."""

    def target(self, name: str) -> Target:
        """The target of that name.

        Raises:
            UnknownTarget: (a KeyError) no such target; suggests names with the same ending.
        """
        row = self._rows.get(name)
        if row is None:
            ending = name.rsplit(".", 2)[-1]
            near = [t.name for t in self.targets if t.name.endswith(ending)][:5]
            raise UnknownTarget(
                message(
                    f"no target {name!r} in this plan",
                    found=f"targets with that ending: {near}",
                    do="a name that is tied to another is made under the other name",
                )
            )
        return self.targets[row]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {target.name: row for row, target in enumerate(self.targets)}

    @cached_property
    def used_sources(self) -> frozenset[int]:
        return frozenset(row for target in self.targets for row in target.sources)

    @cached_property
    def unused_sources(self) -> tuple[int, ...]:
        """Rows that nothing is made of; the scales of codes that are used are used too."""
        decodes = self.sources.decodes
        parts = {part for row in self.used_sources & decodes.keys() for part in decodes[row].parts}
        return tuple(row for row in range(len(self.sources.names)) if row not in self.used_sources and row not in parts)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the sources that nothing is made of."""
        return tuple(self.sources.names[row] for row in self.unused_sources)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Names of the targets that upstream's own code will make."""
        return tuple(target.name for target in self.targets if target.fallback is not None)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of the sources that take part, each counted once; gaps that are read with them not counted.

        The scales of a quantized source are counted whole.
        """
        wanted: Counter[int] = Counter()
        for target in self.targets:
            if target.fallback is not None:
                wanted.update({row: self.sources.nbytes(row) for row in target.sources})
            for copy in target.copies:
                for ordinal in copy.ordinals:
                    row = target.sources[ordinal]
                    wanted[row] += self.sources.nbytes(row, copy.box.numel)
        decodes = self.sources.decodes
        parts = {part for row in wanted if row in decodes for part in decodes[row].parts}
        sizes = [min(count, self.sources.nbytes(row)) for row, count in wanted.items()]
        return sum(sizes) + sum(map(self.sources.nbytes, parts))

    @cached_property
    def bytes_written(self) -> int:
        return sum(target.nbytes for target in self.targets)

    def execution_of(self, target: Target) -> str:
        """How a target is made: ``read`` (bytes land in place), ``upstream``, or what of ``strided``, ``cast`` and
        ``decode`` it takes.
        """
        if target.fallback is not None:
            return "upstream"
        ways = []
        if not all(copy.box.is_run for copy in target.copies):
            ways.append("strided")
        decoded = [row in self.sources.decodes for row in target.sources]
        if any(decoded):
            ways.append("decode")
        if any(self.sources.dtypes[row] != target.dtype for row in target.sources) and not all(decoded):
            ways.append("cast")
        return ", ".join(ways) or "read"

    def summary(self) -> str:
        """A table by rule: targets, source tensors, bytes and how each is executed."""
        rows: dict[tuple[int, str], list[int]] = {}
        for target in self.targets:
            row = rows.setdefault((target.rule, self.execution_of(target)), [0, 0, 0])
            row[0] += 1
            row[1] += len(target.sources)
            row[2] += target.nbytes
        lines = [f"{'targets':>8} {'sources':>8} {'GB':>9}  {'execution':<14} rule"]
        for (rule, way), (targets, sources, size) in sorted(rows.items(), key=lambda item: -item[1][2]):
            text = self.rules[rule] if rule >= 0 else "(name only)"
            lines.append(f"{targets:>8} {sources:>8} {size / 1e9:>9.3f}  {way:<14} {text}")
        lines.append(
            f"{len(self.targets):>8} {len(self.used_sources):>8} {self.bytes_written / 1e9:>9.3f}  "
            f"reads {self.bytes_read / 1e9:.3f} GB, {len(self.fallbacks)} targets by upstream's own code"
            + (f", {len(self.unused_sources)} sources left out" if self.unused_sources else "")
        )
        return "\n".join(lines)

    def explain(self, name: str) -> str:
        """Every source of one target with the region it fills.

        Raises:
            UnknownTarget: (a KeyError) no such target.
        """
        target = self.target(name)
        lines = [
            f"{target.name}  {target.dtype} {list(target.shape)}  {target.nbytes} bytes  ({self.execution_of(target)})",
            f"  rule: {self.rules[target.rule] if target.rule >= 0 else '(name only)'}",
        ]
        if target.fallback is not None:
            lines.append(f"  by upstream's own code, because {target.fallback.reason}")
            lines += [f"  {self._source_text(row)}" for row in target.sources]
        pieces = [piece for copy in target.copies for piece in copy.pieces()]
        for piece in sorted(pieces, key=lambda p: p.target_offset):
            box = piece.box
            read = _walk(piece.source_offset, box.shape, box.source_strides)
            written = _walk(piece.target_offset, box.shape, box.target_strides)
            lines.append(f"  {self._source_text(target.sources[piece.source])}{read} -> {written}")
        return "\n".join(lines)

    def _source_text(self, row: int) -> str:
        decode = self.sources.decodes.get(row)
        kind = self.sources.dtypes[row] if decode is None else decode.format
        return f"{self.sources.names[row]} {kind} {list(self.sources.shapes[row])}"

    def validate(self) -> None:
        """Prove that every element of every target is written exactly once and every read stays inside its source.

        Targets that share copies are proved once, so this costs microseconds a layer.

        Raises:
            CoverageError: names the target, the element and the two sources, or how many elements nobody writes.
            UnsupportedError: a quantized source is to become what codes are not decoded to.
        """
        self._check_decoded()
        prove(self.targets, self.sources)

    def _check_decoded(self) -> None:
        decodes = self.sources.decodes
        for target in self.targets if decodes else ():
            row = next((row for row in target.sources if row in decodes), None)
            if row is None:
                continue
            if target.fallback is not None:  # which would be given the codes alone
                raise UnsupportedError(
                    message(
                        f"{target.name} is made by upstream's own code, of a quantized tensor",
                        where=self.sources.names[row],
                        found=target.fallback.reason,
                        do="decode the checkpoint first: {convert_checkpoint(..., rules=[], dequantize=True)}",
                    )
                )
            if target.dtype not in DECODED:
                what = f"{self.sources.names[row]} is not decoded to the dtype of {target.name}"
                raise UnsupportedError(message(what, expected=sorted(DECODED), found=target.dtype))

    def inverse(self) -> CopyPlan:
        """The plan that makes this plan's sources from its targets, casting back where this one casts.

        Only sources that take part come back.

        Raises:
            UnsupportedError: a target is made by upstream's own code, or of quantized sources.
            CoverageError: part of a source is not in any target, so it cannot be brought back.
        """
        if self.fallbacks:
            raise UnsupportedError(
                message(
                    f"this plan cannot be inverted: {len(self.fallbacks)} targets are made by upstream's own code",
                    found=", ".join(self.fallbacks[:5]),
                )
            )
        decoded = [self.sources.names[row] for row in sorted(self.used_sources & self.sources.decodes.keys())]
        if decoded:
            found = f"{len(decoded)} quantized sources, {decoded[0]} the first"
            raise UnsupportedError(message("this plan cannot be inverted: nothing here quantizes", found=found))
        targets = inverted(self.targets, self.sources)
        plan = CopyPlan(
            table_of(self.targets),
            tuple(targets),
            tuple(f"inverse of {rule}" for rule in self.rules),
            layout=self.source_layout,
            source_layout=self.layout,
        )
        plan.validate()
        return plan

    def then(self, following: CopyPlan) -> CopyPlan:
        """One plan that goes from this plan's sources straight to ``following``'s targets.

        Raises:
            UnsupportedError: a target is upstream's work where it would be taken apart, would be cast twice, or its
                copies cannot be chained.
            CoverageError: ``following`` reads something this plan does not make.
        """
        first = {target.name: target for target in self.targets}
        texts = (self.rules, following.rules)
        targets, rules = chained(first, self.sources, following.targets, following.sources, texts)
        plan = CopyPlan(
            self.sources,
            tuple(targets),
            rules,
            (*self.missing, *following.missing),
            (*self.unexpected, *following.unexpected),
            (*self.mismatched, *following.mismatched),
            following.tied,
            following.layout,
            self.source_layout,
        )
        plan.validate()
        return plan

    def shard(self, regions: Mapping[str, Region]) -> CopyPlan:
        """The plan that fills parts of its targets, each a contiguous tensor of its own, and reads only what they take.

        Args:
            regions: by target name: ``planning.sharding.placed`` for a rank's coordinate in a mesh and
                placements, ``region_of`` there for a DTensor, ``planning.regions.box`` for offsets and lengths. Other
                targets stay whole.

        Raises:
            CoverageError: a region of a tensor of another shape.
            UnsupportedError: less than all of a target that upstream's own code makes.
        """
        if not any(target.name in regions for target in self.targets):
            return self
        parts = [Part(t.name, t.name, regions.get(t.name) or whole(t.shape)) for t in self.targets]
        return replace(plan_of_parts(self, parts), tied=self.tied, layout=self.layout)

    def to_json(self) -> str:
        """The whole plan as JSON; ``from_json`` gives an equal plan back.

        Raises:
            UnsupportedError: a target is made by upstream's own code, which is a live object.
        """
        if self.fallbacks:
            raise UnsupportedError(message("a plan with targets made by upstream's own code has no JSON form"))
        return text_of({field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def from_json(text: str) -> CopyPlan:
        """A plan from ``to_json``; validated again, since a file may have been edited.

        Raises:
            UnsupportedError: not a plan of this version.
            CoverageError: the plan does not write every element once.
        """
        plan = CopyPlan(**fields_of(text))
        plan.validate()
        return plan


def _walk(offset: int, shape: Sequence[int], strides: Sequence[int]) -> str:
    steps = " ".join(f"{size}x{stride}" for size, stride in zip(shape, strides, strict=True))
    return f"[{offset}{' + ' if steps else ''}{steps}]"


def plan_of_parts(plan: CopyPlan, parts: Iterable[Part]) -> CopyPlan:
    """The plan that makes parts of a plan's targets, each a contiguous tensor of its own.

    Raises:
        CoverageError: a region of a tensor of another shape.
        UnsupportedError: less than all of a target that upstream's own code makes, or a part that would be cast twice.
    """
    return plan.then(CopyPlan(table_of(plan.targets), tuple(parts_of(plan.targets, parts))))
