"""Plans that keep codes and scales while weights are grouped, taken apart or laid out anew.

Codes of eight bits move as the numbers do that they stand for. Scales of blocks move as a matrix of blocks does: the
rules and layouts that make a weight are applied once more, to tensors that have the weights' names and the shapes of
their scales. The result must say the same under the same config: it is read as if it were a checkpoint, and each of its
blocks must be one of the source's. A block that would hold rows of two experts' halves, or lie across, is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from automodel_conv.errors import ConversionError, QuantizationError, UnsupportedError, message
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import Decode, SourceTable, StridedCopy, Target
from automodel_conv.planning.plan import CopyPlan

Matrix = tuple[int, int]  # rows and columns


def keep_codes(
    stored: SourceTable,
    decoded: SourceTable,
    numbers: CopyPlan,
    plan_of: Callable[[SourceTable], CopyPlan],
    read: Callable[[SourceTable], SourceTable],
) -> CopyPlan:
    """The plan that makes codes and scales where ``numbers`` makes numbers of them.

    Args:
        stored: all tensors as they are.
        decoded: the same with numbers in the place of codes, which ``numbers`` is a plan of.
        plan_of: plans the scales by the same rules and layouts, under the names of their weights.
        read: decodes a table by the config of the checkpoint.

    Raises:
        UnsupportedError: codes of other sizes, or scales of which no grouping means the same; names the first target.
    """
    coded = [target for target in numbers.targets if not decoded.decodes.keys().isdisjoint(target.sources)]
    if not coded:
        return replace(numbers, sources=stored)
    coded.sort(key=lambda target: _is_as_stored(target, decoded))  # where anything can go wrong comes first
    suffixes = {target.name: _suffix(target, stored, decoded) for target in coded}
    try:
        scales = plan_of(_scales_as_weights(stored, decoded))
    except ConversionError as error:
        raise _refused(coded[0].name, f"its scales do not come together; {_blocks(coded[0], decoded)}") from error
    left = {target.name: target for target in scales.targets}
    targets: list[Target] = []
    made: dict[str, Target] = {}
    for target in numbers.targets:
        if target.name not in suffixes:
            targets.append(target)
            continue
        part = left.pop(target.name, None)
        if part is None or part.fallback is not None:
            raise _refused(target.name, f"its scales do not come together; {_blocks(target, decoded)}")
        made[target.name] = codes = target._replace(dtype=stored.dtypes[target.sources[0]])
        targets += [codes, part._replace(name=target.name + suffixes[target.name], rule=target.rule)]
    of_weights = {decode.scales for decode in decoded.decodes.values()}
    for name, other in left.items():
        if not of_weights.isdisjoint(other.sources):
            continue  # of a weight that is left out
        if any(part.isdecimal() for part in name.rpartition("experts.")[2].split(".")[:1]) and made:
            raise _refused(name, "it is of one expert, and has no place beside grouped ones")
        targets.append(other._replace(rule=-1))
    plan = CopyPlan(stored, tuple(targets), numbers.rules)
    plan.validate()
    _check_blocks(plan, made, decoded, read)
    return plan


def _scales_as_weights(stored: SourceTable, decoded: SourceTable) -> SourceTable:
    """The scales under the names of their weights, and under their own what else is hidden in ``decoded``."""
    names = list(stored.names)
    for row, decode in decoded.decodes.items():
        names[decode.scales], names[row] = decoded.names[row], stored.names[decode.scales]
    return replace(stored, names=names, hidden=stored.hidden | (frozenset(range(len(names))) - decoded.hidden))


def _suffix(target: Target, stored: SourceTable, decoded: SourceTable) -> str:
    """What follows the name of a weight in that of its scales."""
    decodes = [decoded.decodes.get(row) for row in target.sources]
    known = [decode for decode in decodes if decode is not None]
    if len(known) < len(decodes) or target.fallback is not None:
        raise _refused(target.name, "only some of its parts are quantized")
    if any(decode.bits != 8 or len(decode.parts) > 1 for decode in known):
        raise _refused(target.name, f"codes of the format {known[0].format} are not moved")
    if len({stored.dtypes[row] for row in target.sources}) > 1:
        raise _refused(target.name, "its parts have codes of different formats")
    weights = (decoded.names[row] for row in target.sources)
    suffixes = {stored.names[d.scales].removeprefix(w) for d, w in zip(known, weights, strict=True)}
    suffix = suffixes.pop()
    if suffixes or not suffix.startswith("_"):
        raise _refused(target.name, f"its scales, such as {stored.names[known[0].scales]}, are not named after it")
    return suffix


def _check_blocks(
    plan: CopyPlan, made: dict[str, Target], decoded: SourceTable, read: Callable[[SourceTable], SourceTable]
) -> None:
    """Raise UnsupportedError unless what is made reads as the same blocks of codes as those it is made of."""
    table = table_of(plan.targets)
    try:
        found = read(table)
    except QuantizationError:
        first = min(made.values(), key=lambda target: _is_as_stored(target, decoded))
        why = "its scales would not be those that the config tells of"
        raise _refused(first.name, f"{why}; {_blocks(first, decoded)}") from None
    again = {table.names[row]: decode for row, decode in found.decodes.items()}
    for name, target in made.items():
        for ordinal, row in enumerate(target.sources):
            if name not in again or not _has_same_blocks(decoded.decodes[row], again[name], target.copies, ordinal):
                raise _refused(name, f"a scale would belong to other numbers; {_blocks(target, decoded)}")


def _is_as_stored(target: Target, decoded: SourceTable) -> bool:
    return len(target.sources) == 1 and decoded.shapes[target.sources[0]] == target.shape


def _blocks(target: Target, decoded: SourceTable) -> str:
    decode = next(decode for row in target.sources if (decode := decoded.decodes.get(row)) is not None)
    return f"each is of {list(decode.block)} of {list(decode.matrix)}, which become {list(target.shape)}"


def _has_same_blocks(source: Decode, made: Decode, copies: Sequence[StridedCopy], ordinal: int) -> bool:
    """Whether the blocks of a source are blocks of a target that copies make of it, among others."""
    copies = [copy for copy in copies if ordinal in copy.ordinals]
    transposed = [_is_transposed(copy, source.matrix, made.matrix) for copy in copies]
    if None in transposed or len(set(transposed)) > 1:
        return False
    at = (1, 0) if any(transposed) else (0, 1)  # the target's dimensions, in the order of the source's
    if source.block != tuple(made.block[i] for i in at):
        return False
    for copy in copies:
        for which, start, new_start in zip(copy.ordinals, copy.source_offsets, copy.target_offsets, strict=True):
            first, new_first = _place(start, source.matrix), _place(new_start, made.matrix)
            if which == ordinal and any((first[k] - new_first[i]) % source.block[k] for k, i in enumerate(at)):
                return False
    return True


def _is_transposed(copy: StridedCopy, source: Matrix, target: Matrix) -> bool | None:
    """Whether a copy makes rows of columns; None if it does not take neighbours to neighbours, as where rows alternate.

    Args:
        source, target: the matrices in the last two dimensions of both sides.
    """
    (rows, columns), (new_rows, new_columns) = source, target
    transposed = False
    for size, step, new_step in zip(*copy.box, strict=True):
        if size == 1:
            continue
        if step == new_step == 1:
            in_row = size <= min(columns, new_columns)
            in_matrix = size <= min(rows * columns, new_rows * new_columns) or rows == new_rows
            fits = in_row or (columns == new_columns and in_matrix)
        elif (step, new_step) == (columns, new_columns):
            fits = size <= min(rows, new_rows) or rows == new_rows
        elif (step, new_step) in ((1, new_columns), (columns, 1)):
            transposed, fits = True, True
        else:
            fits = step % (rows * columns) == 0 == new_step % (new_rows * new_columns)
        if not fits:
            return None
    return transposed


def _place(offset: int, matrix: Matrix) -> Matrix:
    """Row and column of an element of a stack of matrices."""
    rows, columns = matrix
    return offset // columns % rows, offset % columns


def _refused(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        message(
            f"{name}: codes and scales cannot be kept in this layout",
            found=why,
            do=["{dequantize=True} writes the numbers that they stand for", "{rules=[]} keeps all as it is"],
        )
    )
