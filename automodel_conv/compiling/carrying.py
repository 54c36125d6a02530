"""Select the tensors that a conversion carries over unchanged or drops.

No rule matches the layers of multi-token prediction or draft heads, because models do not have them. A conversion
copies these tensors to the new checkpoint byte for byte, under their own names. If it decodes quantized tensors, it
decodes these too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from automodel_conv.compiling.marks import layout_to_read
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.errors import NameProblems, UnsupportedError, listing, message
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode, SourceTable, Target
from automodel_conv.planning.quantization import arranged_plan
from automodel_conv.planning.wanted import TargetSpec

# Names of a checkpoint that are compared with a pattern, to suggest one; a comparison takes some 20 us.
_MOST_COMPARED = 100_000


def checked_patterns(patterns: str | Iterable[str]) -> list[str]:
    """Return the patterns of ``drop`` as a list.

    Raises:
        UnsupportedError: it is neither a text nor several texts.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else None
    if listed is None or not all(isinstance(pattern, str) for pattern in listed):
        expected = "a pattern such as 'model.layers.61.*', or several"
        raise UnsupportedError(message("not a pattern of names to drop", expected=expected, found=repr(patterns)))
    return listed


def dropped_rows(names: Sequence[str], patterns: str | Iterable[str]) -> frozenset[int]:
    """Return the rows of the names that match a pattern, or any of several.

    ``*`` in a pattern matches any text, ``?`` one character, and ``[abc]`` one of these characters.

    Raises:
        UnsupportedError: a pattern matches no name.
    """
    dropped: set[int] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        rows = [row for row, name in enumerate(names) if fnmatchcase(name, pattern)]
        if not rows:
            expected = "a whole name of the checkpoint, or a pattern such as 'model.layers.61.*'"
            found = f"{pattern!r}; names of the checkpoint:\n{listing(names, 3)}"
            similar = get_close_matches(pattern, names, 1, 0.8) if len(names) <= _MOST_COMPARED else []
            do = f"write {similar[0]!r}" if similar else None
            raise UnsupportedError(message("no tensor to drop has this name", expected=expected, found=found, do=do))
        dropped.update(rows)
    return frozenset(dropped)


def refuse_halves(names: Sequence[str], decodes: Mapping[int, Decode], dropped: Collection[int]) -> None:
    """Raise UnsupportedError if codes are dropped without their scales, or scales without their codes.

    Only a conversion that does not decode them has to check this.

    Raises:
        UnsupportedError: names the tensors whose other parts are dropped.
    """
    quantized = [{row, *decode.parts} for row, decode in decodes.items()]
    halves = [parts for parts in quantized if not parts.isdisjoint(dropped) and not parts.issubset(dropped)]
    if halves:
        left = sorted({names[row] for parts in halves for row in parts.difference(dropped)})
        text = f"{len(left)} tensors cannot be used without the tensors to drop"
        do = "drop codes and scales together: a pattern such as 'NAME.weight*' matches both"
        raise UnsupportedError(message(text, found="\n" + listing(left), do=do))


def carried_targets(
    table: SourceTable, rows: Collection[int], dtype: str | None, converted: Iterable[Target]
) -> list[Target]:
    """Return targets that copy whole sources under their own names.

    Args:
        rows: rows of the sources to carry over.
        dtype: dtype code of decoded values; None: the one in ``table``.
        converted: the targets of all other sources.

    Raises:
        NameProblems: a converted target has the name of a carried tensor.
    """
    others = frozenset(range(len(table.names))).difference(rows)
    carried = arranged_plan(replace(table, hidden=others)).targets
    names = {target.name for target in converted}
    both = [target.name for target in carried if target.name in names]
    if both:
        raise NameProblems(
            message(
                f"{len(both)} tensors to carry over have the names of converted tensors",
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
    """Return the rows of a checkpoint that no rule assigns to a model or state dict.

    Args:
        table: the checkpoint's tensors.
        layout: layout of the experts in the state dict.
        has: the tensors of the state dict; not used with a model.

    Returns:
        ``table`` with its names stripped of what torch's wrappers add, and the rows.

    Raises:
        UnsupportedError: the checkpoint has experts, but not those of the model or state dict. They are the experts of
            the same layers in another form.
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
    kv_cache_scales = plan.sources.hidden - table.hidden
    rows = kv_cache_scales.union(problems.unclaimed)
    absent = {_layer_of(name): name for name in problems.missing if ".experts." in name}
    others = [table.names[row] for row in sorted(rows) if ".experts." in table.names[row]]
    others = [name for name in others if _layer_of(name) in absent]
    if others:
        raise UnsupportedError(
            message(
                "the checkpoint to carry tensors from has other experts than the tensors to save",
                where=checkpoint.path,
                expected="\n" + listing(absent.values()),
                found="\n" + listing(others),
                do=["carry from the checkpoint that the tensors are from", "pass the {rules=} by which it is loaded"],
            )
        )
    return replace(table, names=plan.sources.names), rows


def _layer_of(name: str) -> str:
    """Return the path of the layer that holds a tensor of experts, without the name of the module in the layer."""
    return name.partition(".experts.")[0].rpartition(".")[0]
