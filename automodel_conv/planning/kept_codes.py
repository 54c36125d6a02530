"""Plans that keep codes and scales while weights are grouped, split or moved to another layout.

Eight-bit codes move exactly as their decoded values would. Scales are copied as a matrix with one element per
block: the rules and layouts of a weight are applied again to tensors with the weights' names and the scales' shapes.
The result must decode to the same values under the same config. To check that, it is read as if it were a checkpoint.
Each of its blocks must be a block of the source (see ``block_moves.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod

from automodel_conv.errors import Advice, ConversionError, QuantizationError, UnsupportedError, message
from automodel_conv.planning.arrangement import PLAIN
from automodel_conv.planning.block_moves import has_same_blocks
from automodel_conv.planning.code_names import scales_of_codes
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import leaf

_DECODE: Advice = (
    "{dequantize=True} decodes them to values",
    "load_state_dict() and load_model() decode them while they read them",
)


def codes_without_scales(plan: CopyPlan) -> str | None:
    """Return the name of the first target of codes that has no scales next to it; None if all have them.

    The plan copies tensors as stored. The scales of a target must be copied from the scales of all its sources.
    """
    names = plan.sources.names
    scale_of = scales_of_codes(plan.sources)
    if not scale_of:
        return None
    new_scale_of = scales_of_codes(table_of(plan.targets))
    sources_of = {target.name: {names[row] for row in target.sources} for target in plan.targets}
    for name, sources in sources_of.items():
        scales = {scale_of[source] for source in sources & scale_of.keys()}
        read = sources_of[new_scale_of[name]] if name in new_scale_of else set()
        if not scales.issubset(sources | read):
            return name
    return None


def refuse_codes_without_scales(plan: CopyPlan) -> None:
    """Raise UnsupportedError if a target has codes and no scales next to it; see ``codes_without_scales``."""
    name = codes_without_scales(plan)
    if name is not None:
        raise _refused(name, "the model or the rules have no place for its scales")


def keep_codes(
    stored: SourceTable,
    decoded: SourceTable,
    values: CopyPlan,
    plan_of: Callable[[SourceTable], CopyPlan],
    read: Callable[[SourceTable], SourceTable],
    whole_name: Callable[[str], str | None] = lambda name: None,
) -> CopyPlan:
    """Return the plan that produces codes and scales where ``values`` produces decoded values.

    Args:
        stored: all tensors as stored.
        decoded: the same tensors with decoded values in place of codes.
        values: a plan whose sources are ``decoded``.
        plan_of: plans the scales by the same rules and layouts, from a table that has them under their weights' names.
        read: decodes a table by the config of the checkpoint.
        whole_name: see ``Method.whole_name``.

    Raises:
        UnsupportedError: codes do not have eight bits, or no arrangement of the scales keeps their meaning. The error
            names the first target.
    """
    coded = [target for target in values.targets if not decoded.decodes.keys().isdisjoint(target.sources)]
    if not coded:
        return replace(values, sources=stored)
    coded.sort(key=lambda target: _is_as_stored(target, decoded))  # errors name the first: one that changes shape
    for target in coded:
        _refuse_unmovable(target, stored, decoded)
    shared = _shared_scales(coded, stored, decoded, whole_name)
    shared_rows = frozenset(row for scale in shared.values() for row in scale.sources)
    suffixes = {target.name: _suffix(target, stored, decoded) for target in coded if target.name not in shared}
    try:
        scales = plan_of(_scales_as_weights(stored, decoded, shared_rows))
    except ConversionError as error:
        raise _refused(coded[0].name, f"its scales cannot be combined; {_blocks(coded[0], decoded)}") from error
    unused = {target.name: target for target in scales.targets}
    kept = {target.name: target._replace(dtype=stored.dtypes[target.sources[0]]) for target in coded}
    targets: list[Target] = []
    for target in values.targets:
        targets.append(kept.get(target.name, target))
        if target.name in suffixes:
            scale = unused.pop(target.name, None)
            if scale is None or scale.fallback is not None:
                raise _refused(target.name, f"its scales cannot be combined; {_blocks(target, decoded)}")
            targets.append(scale._replace(name=target.name + suffixes[target.name], rule=target.rule))
    targets += {scale.name: scale for scale in shared.values()}.values()
    targets += _other_parts(unused, decoded)
    plan = replace(values, sources=stored, targets=tuple(targets))
    plan.validate()
    _check_blocks(plan, kept, shared, decoded, read)
    return plan


def _other_parts(unused: Mapping[str, Target], decoded: SourceTable) -> Iterator[Target]:
    """Yield the targets of hidden tensors that are not scales of weights, such as scales of activations.

    Args:
        unused: targets of the plan of the scales that belong to no target of codes, by name.
        decoded: see ``keep_codes``.
    """
    scale_rows = {decode.scales for decode in decoded.decodes.values()}
    for name, other in unused.items():
        if not scale_rows.isdisjoint(other.sources):
            continue  # the weight of this scale is left out
        if name.rpartition("experts.")[2].partition(".")[0].isdecimal():
            raise _refused(name, "it belongs to one expert, and the others are grouped")
        yield other._replace(rule=-1)


def _scales_as_weights(stored: SourceTable, decoded: SourceTable, shared: frozenset[int]) -> SourceTable:
    """Return the scales under the names of their weights, and the other hidden tensors under their own names.

    Args:
        stored, decoded: see ``keep_codes``.
        shared: rows of scales to leave out.
    """
    names = list(stored.names)
    for row, decode in decoded.decodes.items():
        if decode.scales not in shared:
            names[decode.scales], names[row] = decoded.names[row], stored.names[decode.scales]
    weights = frozenset(range(len(names))) - decoded.hidden
    return replace(stored, names=names, hidden=stored.hidden | weights | shared)


def _shared_scales(
    coded: Iterable[Target], stored: SourceTable, decoded: SourceTable, whole_name: Callable[[str], str | None]
) -> dict[str, Target]:
    """Return the scales of targets that are shards with one scale, or are joined from such shards, by target.

    Args:
        coded: the targets of codes.
        stored, decoded, whole_name: see ``keep_codes``.
    """
    scales: dict[str, Target] = {}
    for target in coded:
        decodes = [decoded.decodes[row] for row in target.sources]
        row, shape = decodes[0].scales, stored.shapes[decodes[0].scales]
        wholes = {whole_name(decoded.names[source]) for source in target.sources}
        whole = whole_name(target.name)
        if None in (*wholes, whole) or {decode.scales for decode in decodes} != {row} or prod(shape) != 1:
            continue
        name = f"{whole}{stored.names[row].rpartition('weight')[2]}"
        scales[target.name] = Target(name, stored.dtypes[row], shape, target.rule, (row,), copies_of(leaf(0, shape)))
    return scales


def _refuse_unmovable(target: Target, stored: SourceTable, decoded: SourceTable) -> None:
    """Raise UnsupportedError if the codes of a target cannot be moved like its values."""
    decodes = [decoded.decodes.get(row) for row in target.sources]
    known = [decode for decode in decodes if decode is not None]
    if len(known) < len(decodes) or target.fallback is not None:
        raise _refused(target.name, "only some of its parts are quantized")
    if any(decode.bits != 8 or len(decode.parts) > 1 for decode in known):
        raise _refused(target.name, f"codes of the format {known[0].format} cannot be rearranged")
    if any(decode.arrangement != PLAIN for decode in known):
        raise _refused(target.name, f"its codes are stored in another order than its values: {known[0].arrangement}")
    if len({stored.dtypes[row] for row in target.sources}) > 1:
        raise _refused(target.name, "its parts have codes of different formats")


def _suffix(target: Target, stored: SourceTable, decoded: SourceTable) -> str:
    """Return the suffix that turns the name of a weight into the name of its scales."""
    scales = [stored.names[decoded.decodes[row].scales] for row in target.sources]
    suffixes = {scale.removeprefix(decoded.names[row]) for scale, row in zip(scales, target.sources, strict=True)}
    suffix = suffixes.pop()
    if suffixes or not suffix.startswith("_"):
        raise _refused(target.name, f"its scales, such as {scales[0]}, are not named after it")
    return suffix


def _check_blocks(
    plan: CopyPlan,
    kept: dict[str, Target],
    shared: Container[str],
    decoded: SourceTable,
    read: Callable[[SourceTable], SourceTable],
) -> None:
    """Raise UnsupportedError unless the targets of a plan decode in the same blocks as their sources.

    Args:
        plan: the plan.
        kept: targets of codes, by name.
        shared: names of those with one scale for all of their parts, which must stay the only one.
        decoded: the sources.
        read: decodes a table by the config of the checkpoint.
    """
    table = table_of(plan.targets)
    try:
        reread = read(table)
    except QuantizationError:
        first = min(kept.values(), key=lambda target: _is_as_stored(target, decoded))
        why = "its scales would not fit the config"
        raise _refused(first.name, f"{why}; {_blocks(first, decoded)}") from None
    decodes = {table.names[row]: decode for row, decode in reread.decodes.items()}
    for name, target in kept.items():
        if name in shared and name in decodes and decodes[name].block == decodes[name].matrix:
            continue
        for ordinal, row in enumerate(target.sources):
            if name not in decodes or not has_same_blocks(decoded.decodes[row], decodes[name], target.copies, ordinal):
                raise _refused(name, f"a scale would apply to other values; {_blocks(target, decoded)}")


def _is_as_stored(target: Target, decoded: SourceTable) -> bool:
    """Return whether a target has one source, of the same shape."""
    return len(target.sources) == 1 and decoded.shapes[target.sources[0]] == target.shape


def _blocks(target: Target, decoded: SourceTable) -> str:
    """Describe the blocks of a target's first quantized source, for errors."""
    decode = next(decode for row in target.sources if (decode := decoded.decodes.get(row)) is not None)
    return f"each is for a block {list(decode.block)} of {list(decode.matrix)}, which becomes {list(target.shape)}"


def _refused(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        message(
            f"{name}: codes and scales cannot be kept in this layout",
            found=why,
            do=[_DECODE, "{rules=[]} keeps everything as stored"],
        )
    )
