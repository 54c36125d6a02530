"""The plan of a conversion: which strided copies fill which target, as integers and strings.

A plan is compiled from names, dtypes and shapes only. It is validated before any tensor data moves, and it contains
everything that executors need. Copies of equal geometry are one ``StridedCopy`` with columns of offsets. Targets that
the same rule fills from sources of the same shapes share their copies. Therefore a plan for 45,000 tensors stays small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from heapq import nlargest
from html import escape
from itertools import takewhile
from operator import eq

from automodel_conv.dtypes import DECODED
from automodel_conv.errors import UnknownTarget, UnsupportedError, listing, message, size_text
from automodel_conv.pictures.page import FilePath, in_frame, write_page
from automodel_conv.planning.composition import chained, inverted, table_of
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.plan_json import fields_of, text_of
from automodel_conv.planning.plan_picture import plan_page
from automodel_conv.planning.plan_rows import NAME_ONLY, RuleRow, rows_by_rule
from automodel_conv.planning.plan_text import TEXT_WIDTH, explanation, summary_text
from automodel_conv.planning.proof import prove
from automodel_conv.planning.regions import Part, Region, parts_of, whole

# A page of 50,000 tensors has about 500 kB; larger outputs make notebooks slow.
_MOST_IN_NOTEBOOK = 50_000


@dataclass(frozen=True)
class CopyPlan:
    """The plan of a conversion: the targets, and the strided copies of sources that fill them.

    ``compile_plan`` returns validated plans. Plans are immutable; ``inverse``, ``then`` and ``shard`` return new ones.

    Attributes:
        sources: the tensors of the checkpoint.
        targets: the tensors to fill, each with its copies.
        rules: texts of the rules; each target has the row of its rule.
        missing: names in the model that a non-strict plan does not fill, as no source provides them.
        unexpected: names that a non-strict plan leaves out, as the model does not have them.
        mismatched: targets that a non-strict plan leaves out: ``(name, shape in the checkpoint, shape in the model)``.
        tied: groups of names in the model that are one tensor.
        layout: layout of the experts in the targets, as the caller requested it; None: the model's own.
        source_layout: layout of the experts in the sources, as the files or the caller state it; None: not stated.

    Example:

        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> from automodel_conv import compile_plan
        >>> with TemporaryDirectory() as directory:
        ...     tensors = {"experts.down_proj": torch.zeros(2, 3, 4), "norm": torch.zeros(3)}
        ...     save_file(tensors, f"{directory}/model.safetensors")
        ...     plan = compile_plan(directory, rules=[], source_layout="transformers", layout="nemo")
        >>> [(target.name, plan.execution_of(target)) for target in plan.targets]
        [('experts.down_projs', 'strided'), ('norm', 'read')]
        >>> plan.bytes_read, plan.left_out, plan.fallbacks
        (108, (), ())
    """

    sources: SourceTable
    targets: tuple[Target, ...]
    rules: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    layout: str | None = None
    source_layout: str | None = None

    def __repr__(self) -> str:
        """Return the size of the plan, because its fields have tens of thousands of entries."""
        size = f"{len(self.targets)} targets from {len(self.used_sources)} sources, {size_text(self.bytes_written)}"
        return f"<{type(self).__name__}: {size}; summary() and explain(name) show more>"

    def _repr_html_(self) -> str:
        """Return the page of the plan for a notebook; above ``_MOST_IN_NOTEBOOK`` targets and sources, a table."""
        title = f"{len(self.targets)} tensors, {size_text(self.bytes_written)}"
        # Style sheets of notebooks give text in HTML a font of their own.
        summary = f'<pre style="font-family: monospace">{escape(self.summary())}</pre>'
        if len(self.targets) + len(self.sources.names) > _MOST_IN_NOTEBOOK:
            return f"{summary}<p><code>plan.to_html(file)</code> draws it.</p>"
        return summary + in_frame(plan_page(self, self.unused_sources, title, {}), 640, f"plan of {title}")

    def target(self, name: str) -> Target:
        """Return the target with this name.

        Raises:
            UnknownTarget: (a KeyError) there is no such target; the message suggests names with the same ending.

        Example:

            >>> import torch
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"weight": torch.zeros(4, 6)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[])
            >>> plan.target("weight").shape
            (4, 6)
        """
        row = self._rows.get(name)
        if row is None:
            similar = nlargest(5, self._rows, key=lambda target: _common_ends(target, name))
            raise UnknownTarget(
                message(
                    f"no target {name!r} in this plan",
                    found="similar names\n" + listing(similar) if similar else "a plan without targets",
                    do="ask for a name of the model, not of the checkpoint; if two names are tied, ask for the other",
                )
            )
        return self.targets[row]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {target.name: row for row, target in enumerate(self.targets)}

    @cached_property
    def used_sources(self) -> frozenset[int]:
        """Rows of the sources that a target reads."""
        return frozenset(row for target in self.targets for row in target.sources)

    @cached_property
    def unused_sources(self) -> tuple[int, ...]:
        """Rows of the sources that no target needs.

        The scales of codes that a target reads count as needed.
        """
        decodes = self.sources.decodes
        parts = {part for row in self.used_sources & decodes.keys() for part in decodes[row].parts}
        return tuple(row for row in range(len(self.sources.names)) if row not in self.used_sources and row not in parts)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the sources that no target needs."""
        return tuple(self.sources.names[row] for row in self.unused_sources)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Names of the targets that transformers' own code fills."""
        return tuple(target.name for target in self.targets if target.fallback is not None)

    @cached_property
    def bytes_read(self) -> int:
        """Number of source bytes that targets need.

        Each byte counts once. The scales of a quantized source count as a whole. A load may read more: it reads gaps of
        at most 64 KiB between these bytes, and ``LoadReport.bytes_read`` includes them.
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
        """Number of bytes of all targets."""
        return sum(target.nbytes for target in self.targets)

    def execution_of(self, target: Target) -> str:
        """Return how a target is filled.

        Returns:
            ``read`` if bytes are read straight into place, ``upstream`` if transformers' own code fills the target, or
            those of ``strided``, ``decode``, ``cast`` and ``zeros`` that apply, joined by commas.

        Example:

            >>> import torch
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"weight": torch.zeros(4, 6)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[], dtype=torch.bfloat16)
            >>> plan.execution_of(plan.target("weight"))
            'cast'
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
        if target.fills:
            ways.append("zeros" if all(fill.value == 0 for fill in target.fills) else "constants")
        return ", ".join(ways) or "read"

    def summary(self, width: int = TEXT_WIDTH) -> str:
        """Return a table with a row for each rule: its targets, source tensors, bytes and execution.

        Args:
            width: number of columns. Rules have several lines to fit; names are never cut.

        Example:

            >>> import torch
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"weight": torch.zeros(4, 6)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[], dtype=torch.bfloat16)
            >>> print(plan.summary())
             targets  sources      size  execution      rule
                   1        1  48 bytes  cast           (name only)
                   1        1  48 bytes  reads 96 bytes, 0 targets by transformers' own code
        """
        reads = f"reads {size_text(self.bytes_read)}, {len(self.fallbacks)} targets by transformers' own code"
        reads += f", {len(self.unused_sources)} sources left out" if self.unused_sources else ""
        totals = RuleRow(None, reads, len(self.targets), len(self.used_sources), self.bytes_written)
        return summary_text(rows_by_rule(self.targets, self.rules, self.execution_of), totals, width)

    def explain(self, name: str) -> str:
        """Return a text with every source of one target and the elements that it fills.

        ``[1 + 2x12 4x3]`` are the elements 1 + 12i + 3j, for i < 2 and j < 4, of a flat tensor: of the source to the
        left of the arrow, and of the target to its right.

        Raises:
            UnknownTarget: (a KeyError) there is no such target.

        Example:

            >>> import torch
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"experts.down_proj": torch.zeros(2, 3, 4)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[], source_layout="transformers", layout="nemo")
            >>> print(plan.explain("experts.down_projs"))
            experts.down_projs  F32 [2, 4, 3]  96 bytes  (strided)
              rule: experts.down_proj -> experts.down_projs: E h i -> E i h
              experts.down_proj F32 [2, 3, 4][0 + 2x12 4x1 3x4] -> [0 + 2x12 4x3 3x1]
        """
        target = self.target(name)
        rule = self.rules[target.rule] if target.rule >= 0 else NAME_ONLY
        return explanation(target, self.sources, rule, self.execution_of(target))

    def to_html(
        self,
        file: FilePath,
        *,
        title: str | None = None,
        ranks: Mapping[str, Mapping[str, Region]] | None = None,
    ) -> None:
        """Write a page that shows the plan: files on one side, final tensors on the other, and what fills what.

        The page is one file, which loads nothing from anywhere. A click on an element names the file, the tensor and
        the index that it comes from. The search takes parts of names.

        Args:
            file: path of the page; an existing file is replaced.
            title: title of the page. None: the number of tensors.
            ranks: the regions of targets that each rank holds, by the label of the rank, to show ranks side by side.
                The regions are by name, as ``shard`` takes them.

        Raises:
            CoverageError: a region belongs to a tensor of another shape.
            OSError: the file cannot be written.

        Example:

            >>> import torch
            >>> from pathlib import Path
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"experts.down_proj": torch.zeros(2, 3, 4)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[], source_layout="transformers", layout="nemo")
            ...     plan.to_html(f"{directory}/plan.html", title="experts for NeMo")
            ...     text = Path(directory, "plan.html").read_text()
            >>> "<title>experts for NeMo</title>" in text
            True
        """
        title = f"{len(self.targets)} tensors" if title is None else title
        write_page(file, plan_page(self, self.unused_sources, title, ranks or {}))

    def validate(self) -> None:
        """Prove that every element of every target is written exactly once and every read stays inside its source.

        Targets that share copies are proved once, so this costs microseconds a layer.

        Raises:
            CoverageError: the proof fails. The message names the target, and the element and its two sources or the
                number of written elements.
            UnsupportedError: a quantized source would fill a target whose dtype codes cannot be decoded to, or a target
                that transformers' own code computes.

        Example:

            >>> import torch
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"weight": torch.zeros(4, 6)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[])
            >>> plan.validate()
            >>> larger = plan.target("weight")._replace(shape=(4, 7))
            >>> CopyPlan(plan.sources, (larger,)).validate()
            Traceback (most recent call last):
            ...
            automodel_conv.errors.CoverageError: weight would be left partly unwritten
              expected: 28 elements, shape [4, 7]
              found:    24 elements from 1 sources
              help:     https://automodel-conv.github.io/automodel_conv/errors/#coverageerror
        """
        self._check_decoded()
        prove(self.targets, self.sources)

    def _check_decoded(self) -> None:
        decodes = self.sources.decodes
        for target in self.targets if decodes else ():
            row = next((row for row in target.sources if row in decodes), None)
            if row is None:
                continue
            if target.fallback is not None:  # it would receive the codes without their scales
                raise UnsupportedError(
                    message(
                        f"{target.name} would be filled by transformers' own code from a quantized tensor",
                        where=self.sources.names[row],
                        found=target.fallback.reason,
                        do="decode the checkpoint first: {convert_checkpoint(..., rules=[], dequantize=True)}",
                    )
                )
            if target.dtype not in DECODED:
                text = f"{self.sources.names[row]} cannot be decoded to the dtype of {target.name}"
                raise UnsupportedError(message(text, expected=sorted(DECODED), found=target.dtype))

    def inverse(self) -> CopyPlan:
        """Return the plan that restores this plan's sources from its targets.

        It casts back what this plan casts. Sources that no target reads are not restored.

        Raises:
            UnsupportedError: transformers' own code fills a target, or a source is quantized.
            CoverageError: part of a source is not in any target, so it cannot be restored.

        Example:

            >>> import torch
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"weight": torch.zeros(4, 6)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[], dtype=torch.bfloat16)
            >>> plan.target("weight").dtype, plan.inverse().target("weight").dtype
            ('BF16', 'F32')
        """
        if self.fallbacks:
            raise UnsupportedError(
                message(
                    f"this plan cannot be inverted: {len(self.fallbacks)} targets are filled by transformers' own code",
                    found=", ".join(self.fallbacks[:5]),
                )
            )
        decoded = [self.sources.names[row] for row in sorted(self.used_sources & self.sources.decodes.keys())]
        if decoded:
            found = f"{len(decoded)} quantized sources; the first is {decoded[0]}"
            raise UnsupportedError(message("this plan cannot be inverted, because it cannot quantize", found=found))
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
        """Return the plan that fills the targets of ``following`` straight from this plan's sources.

        Args:
            following: a plan that reads this plan's targets.

        Raises:
            UnsupportedError: a target that transformers' own code fills would be changed further, a target would be
                cast twice, or its copies cannot be chained.
            CoverageError: ``following`` reads a tensor that this plan does not fill.

        Example:

            >>> import torch
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"experts.down_proj": torch.zeros(2, 3, 4)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[], source_layout="transformers", layout="nemo")
            >>> plan.execution_of(plan.targets[0])
            'strided'
            >>> there_and_back = plan.then(plan.inverse())
            >>> there_and_back.execution_of(there_and_back.targets[0])
            'read'
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
        """Return the plan that fills a region of each target as a contiguous tensor, and reads only the regions' bytes.

        Args:
            regions: region of each target by name; other targets stay whole. ``planning.sharding.placed`` returns the
                region for a rank's coordinate in a mesh and placements, ``planning.sharding.region_of`` the region of a
                DTensor, and ``planning.regions.box`` the region with given offsets and lengths.

        Raises:
            CoverageError: a region belongs to a tensor of another shape.
            UnsupportedError: a region is less than all of a target that transformers' own code fills.

        Example:

            >>> import torch
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"weight": torch.zeros(4, 6)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[])
            >>> from automodel_conv.planning.regions import box
            >>> last_rows = plan.shard({"weight": box((4, 6), offsets=(3, 0), lengths=(1, 6))})
            >>> last_rows.target("weight").shape, last_rows.bytes_read
            ((1, 6), 24)
        """
        if not any(target.name in regions for target in self.targets):
            return self
        parts = [Part(t.name, t.name, regions.get(t.name) or whole(t.shape)) for t in self.targets]
        return replace(plan_of_parts(self, parts), tied=self.tied, layout=self.layout)

    def to_json(self) -> str:
        """Return the whole plan as JSON, from which ``from_json`` builds an equal plan.

        Raises:
            UnsupportedError: transformers' own code fills a target, and code has no JSON form.

        Example:

            >>> import torch
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"weight": torch.zeros(4, 6)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[])
            >>> text = plan.to_json()
            >>> CopyPlan.from_json(text) == plan
            True
        """
        if self.fallbacks:
            raise UnsupportedError(message("a plan with targets that transformers' own code fills has no JSON form"))
        return text_of({field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def from_json(text: str) -> CopyPlan:
        """Return the plan that ``to_json`` wrote, and validate it, as the text may have been edited.

        Raises:
            UnsupportedError: the text is not a plan of this version.
            CoverageError: the plan does not write every element once.

        Example:

            >>> import torch
            >>> from safetensors.torch import save_file
            >>> from tempfile import TemporaryDirectory
            >>> from automodel_conv import compile_plan
            >>> with TemporaryDirectory() as directory:
            ...     save_file({"weight": torch.zeros(4, 6)}, f"{directory}/model.safetensors")
            ...     plan = compile_plan(directory, rules=[])
            >>> CopyPlan.from_json(plan.to_json()).target("weight").shape
            (4, 6)
        """
        plan = CopyPlan(**fields_of(text))
        plan.validate()
        return plan


def plan_of_parts(plan: CopyPlan, parts: Iterable[Part]) -> CopyPlan:
    """Return the plan that fills parts of a plan's targets, each as a contiguous tensor of its own.

    Raises:
        CoverageError: a region belongs to a tensor of another shape.
        UnsupportedError: a part is less than all of a target that transformers' own code fills, or would be cast twice.
    """
    return plan.then(CopyPlan(table_of(plan.targets), tuple(parts_of(plan.targets, parts))))


def _common_ends(first: str, second: str) -> int:
    """Return the number of characters that two names have in common, at their beginning and at their end."""
    return sum(sum(takewhile(bool, map(eq, *names))) for names in ((first, second), (first[::-1], second[::-1])))
