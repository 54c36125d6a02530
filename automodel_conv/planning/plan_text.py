"""The texts of a plan for a terminal: its summary, and the explanation of one target; pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import wrap

from automodel_conv.errors import size_text
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.plan_rows import NAME_ONLY, RuleRow
from automodel_conv.planning.rule_text import rule_lines

TEXT_WIDTH = 100
"""Columns of a text if the caller states none."""
# A rule with fewer columns beside its row is written below the row.
_LEAST_COLUMNS = 32


def summary_text(rows: Sequence[RuleRow], totals: RuleRow, width: int) -> str:
    """Return a table with a row for each rule, and a last row with the totals.

    Args:
        rows: the rows.
        totals: the last row; its ``execution`` is a sentence that takes the place of the rule.
        width: number of columns.
    """
    way_width = max([14, *(len(row.execution) for row in rows)])
    lines = [f"{'targets':>8} {'sources':>8} {'size':>9}  {'execution':<{way_width}} rule"]
    for row in rows:
        start = f"{_counts(row)}  {row.execution:<{way_width}} "
        lines += _beside_or_below(start, rule_lines, row.rule or NAME_ONLY, width)
    return "\n".join([*lines, *_beside_or_below(f"{_counts(totals)}  ", wrap, totals.execution, width)])


def _counts(row: RuleRow) -> str:
    return f"{row.targets:>8} {row.sources:>8} {size_text(row.nbytes):>9}"


def explanation(target: Target, sources: SourceTable, rule: str, execution: str) -> str:
    """Return a text with every source of a target and the elements that it fills; see ``CopyPlan.explain``.

    Args:
        target: the target.
        sources: the tensors of the checkpoint.
        rule: text of the rule that fills the target.
        execution: how the target is filled; see ``CopyPlan.execution_of``.
    """
    kind = f"{target.dtype} {list(target.shape)}  {size_text(target.nbytes)}"
    lines = [
        f"{target.name}  {kind}  ({execution})",
        *_beside("  rule: ", rule_lines(rule, TEXT_WIDTH - len("  rule: "))),
    ]
    if target.fallback is not None:
        lines.append(f"  by transformers' own code, because {target.fallback.reason}")
        lines += [f"  {_source_text(sources, row)}" for row in target.sources]
    pieces = [piece for copy in target.copies for piece in copy.pieces()]
    for piece in sorted(pieces, key=lambda p: p.target_offset):
        box = piece.box
        read = _walk(piece.source_offset, box.shape, box.source_strides)
        written = _walk(piece.target_offset, box.shape, box.target_strides)
        lines.append(f"  {_source_text(sources, target.sources[piece.source])}{read} -> {written}")
    lines += [f"  constant {fill.value} -> {_walk(fill.offset, fill.shape, fill.strides)}" for fill in target.fills]
    return "\n".join(lines)


def _source_text(sources: SourceTable, row: int) -> str:
    decode = sources.decodes.get(row)
    kind = sources.dtypes[row] if decode is None else decode.format
    return f"{sources.names[row]} {kind} {list(sources.shapes[row])}"


def _walk(offset: int, shape: Sequence[int], strides: Sequence[int]) -> str:
    steps = " ".join(f"{size}x{stride}" for size, stride in zip(shape, strides, strict=True))
    return f"[{offset}{' + ' if steps else ''}{steps}]"


def _beside(start: str, lines: Sequence[str]) -> list[str]:
    """Return lines after ``start``, all in its column."""
    first, *others = lines
    return [start + first, *(" " * len(start) + line for line in others)]


def _beside_or_below(start: str, divide: Callable[[str, int], list[str]], text: str, width: int) -> list[str]:
    """Return lines with a text after ``start``, or below it if too few columns remain.

    Args:
        start: the first cells of a row.
        divide: divides a text into lines of at most a number of columns.
        text: the text.
        width: number of columns.
    """
    columns = width - len(start)
    if columns >= min(_LEAST_COLUMNS, len(text)):
        return _beside(start, divide(text, columns))
    return [start.rstrip(), *(f"    {line}" for line in divide(text, max(width - 4, 1)))]
