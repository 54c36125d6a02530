"""Tensors that a conversion copies unchanged because no rule takes them, and tensors that it is told to drop.

Models have no place for the layers of multi-token prediction and for draft heads. These tensors go to the new
checkpoint byte for byte, under their own names; quantized ones are decoded where the rest is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from automodel_conv.compiling.marks import layout_to_read
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.errors import NameProblems, UnsupportedError, listing, message
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode, SourceTable, Target
from automodel_conv.planning.quantization import untransposed_plan
from automodel_conv.planning.wanted import TargetSpec


def dropped_rows(names: Sequence[str], patterns: str | Iterable[str]) -> frozenset[int]:
    """The rows of the names that a pattern, or one of several, matches.

    In a pattern ``*`` is any text, ``?`` a character, and ``[abc]`` one of these.

    Raises:
        UnsupportedError: a pattern matches no name.
    """
    dropped: set[int] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [row for row, name in enumerate(names) if fnmatchcase(name, pattern)]
        if not found:
            expected = "a name, or a pattern such as 'mtp.*' or '*.layers.61.*'"
            raise UnsupportedError(
                message("no tensor has such a name to be dropped", expected=expected, found=repr(pattern))
            )
        dropped.update(found)
    return frozenset(dropped)


def refuse_halves(names: Sequence[str], decodes: Mapping[int, Decode], dropped: Collection[int]) -> None:
    """Refuse to drop codes without their scales, or scales without their codes, where both stay as they are.

    Raises:
        UnsupportedError: names what is left of them.
    """
    whole = [{row, *decode.parts} for row, decode in decodes.items()]
    halves = [parts for parts in whole if not parts.isdisjoint(dropped) and not parts.issubset(dropped)]
    if halves:
        left = sorted({names[row] for parts in halves for row in parts.difference(dropped)})
        text = f"{len(left)} tensors mean nothing without those that are to be dropped"
        do = "drop codes and scales together: a pattern such as 'NAME.weight*' matches both"
        raise UnsupportedError(message(text, found="\n" + listing(left), do=do))


def carried_targets(
    table: SourceTable, rows: Collection[int], dtype: str | None, made: Iterable[Target]
) -> list[Target]:
    """Targets that are sources, whole and under their own names.

    Args:
        dtype: of the numbers that codes become; None: as ``table`` has them.
        made: what is made of other sources.

    Raises:
        NameProblems: one of ``made`` has the name of a tensor that is carried.
    """
    others = frozenset(range(len(table.names))).difference(rows)
    carried = untransposed_plan(replace(table, hidden=others)).targets
    names = {target.name for target in made}
    both = [target.name for target in carried if target.name in names]
    if both:
        raise NameProblems(
            message(
                f"{len(both)} tensors that the model has no place for have names that other tensors are given",
                found="\n" + listing(both),
                do="leave them out with {drop=}",
            ),
            duplicated=[(name, (name,)) for name in both],
        )
    return [
        target._replace(dtype=dtype) if dtype is not None and target.sources[0] in table.decodes else target
        for target in carried
    ]


def unclaimed_rows(
    checkpoint: Checkpoint,
    table: SourceTable,
    model: nn.Module | None,
    rules: Iterable[Any] | None,
    layout: str | None,
    has: Mapping[str, TargetSpec],
) -> tuple[SourceTable, frozenset[int]]:
    """The rows of a checkpoint's tensors that no rule gives to a model, or to a state dict.

    Args:
        table: what the checkpoint offers.
        layout: of the experts in the state dict.
        has: what the state dict has; not asked where there is a model.

    Returns:
        ``table``, its names without what torch's wrappers add, and the rows.

    Raises:
        UnsupportedError: it has experts, but not those of the model or state dict: these are old ones in another form.
    """
    source_layout = layout_to_read(checkpoint, None, keeps_names=model is None and not rules and layout is None)
    plan, problems = loading_plan(
        table,
        model=model,
        rules=rules,
        layout=layout,
        source_layout=source_layout,
        targets=None if model is not None else has,
    )
    of_caches = plan.sources.hidden - table.hidden
    rows = of_caches.union(problems.unclaimed)
    absent = {_layer_of(name): name for name in problems.missing if ".experts." in name}
    others = [table.names[row] for row in sorted(rows) if ".experts." in table.names[row]]
    others = [name for name in others if _layer_of(name) in absent]
    if others:
        raise UnsupportedError(
            message(
                "the checkpoint to carry tensors from has other experts than what is to be saved",
                where=checkpoint.path,
                expected="\n" + listing(absent.values()),
                found="\n" + listing(others),
                do=["carry from the checkpoint that the tensors are from", "pass the {rules=} by which it is loaded"],
            )
        )
    return replace(table, names=plan.sources.names), rows


def _layer_of(name: str) -> str:
    """The layer that a tensor of experts is in, whatever its module is called there."""
    return name.partition(".experts.")[0].rpartition(".")[0]
