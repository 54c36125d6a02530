"""Match the codes and scales of a checkpoint to their weights, and describe how each weight is decoded.

A checkpoint states this twice: in the ``quantization_config`` of its ``config.json`` (see ``schemes.py``), and by the
names, dtypes and shapes of its tensors. Both must agree. The result is a source table that lists weights in place of
their codes, so that the rest of planning needs no notion of quantization until the bytes are read.

An element is ``value(code) * scale``. ``e4m3`` and ``e5m2`` are FP8 and ``e2m1`` is FP4. ``int4`` is an integer stored
with 8 added, less the zero point if it has one. ``int8`` is an integer in two's complement. Scales are floats, or
powers of two stored as one-byte exponents (``F8_E8M0``, and ``U8`` in MX formats), or FP8 values that a global scale
multiplies or divides (NVFP4).
Sources: OCP Microscaling Formats 1.0; transformers 5.24.0, ``integrations/finegrained_fp8.py`` and ``mxfp4.py``;
compressed-tensors 0.20.1, ``compressors/*/base.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil, prod
from typing import Any, NamedTuple

from automodel_conv.dtypes import FLOATING
from automodel_conv.errors import QuantizationError, listing, message
from automodel_conv.planning.arrangement import PLAIN, Arrangement
from automodel_conv.planning.code_names import NARROW
from automodel_conv.planning.copies import Decode, SourceTable, Target
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.methods.method import (
    ANY_MODULE,
    FLOAT_SCALES,
    TENSOR,
    Block,
    Method,
    Packing,
    Scheme,
    part_name,
    weight_name,
)
from automodel_conv.planning.methods.table import method_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problem_kinds import ProblemKinds
from automodel_conv.planning.schemes import KEEP, kv_cache_rows, read_config
from automodel_conv.planning.stated_schemes import StatedSchemes
from automodel_conv.planning.values import leaf


def quantized_table(
    table: SourceTable, config: Mapping[str, Any], *, like_upstream: bool = False, where: str | None = None
) -> SourceTable:
    """Return ``table`` with each row of codes described as its decoded weight, and all other parts hidden.

    The scales of a quantized KV cache are hidden too. They belong to no weight.

    Args:
        config: the ``quantization_config`` of the model's ``config.json``.
        like_upstream: round as transformers does where that differs.
        where: path of the file that holds the config, for errors.

    Raises:
        UnsupportedError: the method or a scheme is not supported; the error names it.
        QuantizationError: parts are missing, do not fit each other or contradict the config. The error lists all of
            them.
    """
    method, schemes = read_config(config, where)
    matcher = _CodeMatcher(table, method, schemes, like_upstream)
    matcher.match_all()
    if schemes and not matcher.problems and not matcher.decodes and not method.model_types:
        matcher.problems.add("no tensor has codes and a scale, though the config says that weights are quantized")
    if matcher.problems:
        number = len(matcher.problems)
        raise QuantizationError(
            message(
                "the checkpoint's quantized tensors cannot be decoded",
                where=f"{where or 'config.json'}, quantization method {method.name}, {number} problems",
                found="\n" + listing(matcher.problems.texts()),
                do=["check that the config belongs to these files", KEEP],
            )
        )
    return matcher.decoded()


class PaddingSuspect(NamedTuple):
    """Codes whose rows may end in padding."""

    row: int
    """Row of the codes."""
    shape_name: str
    """Name of the tensor that holds the true shape of the weight."""
    codes_per_element: int
    """Number of codes in an element. Fewer of them are padding."""


def padding_suspects(stored: SourceTable, decoded: SourceTable, config: Mapping[str, Any]) -> Iterator[PaddingSuspect]:
    """Yield codes whose rows may end in padding.

    Rows of whole groups do not: compressed-tensors refuses to quantize others (compressed-tensors 0.20.1,
    ``quantization/lifecycle/forward_helpers.py``).

    Args:
        stored: the checkpoint's tensors as stored.
        decoded: ``quantized_table`` of ``stored`` and ``config``.
        config: the ``quantization_config``.
    """
    method = method_of(config)
    packings = [packing for packing in method.codes if packing.shape_suffix] if method is not None else []
    for row, decode in decoded.decodes.items() if packings else ():
        columns, group = decode.matrix[1], decode.block[1]
        if group < columns and columns % group == 0:
            continue
        for packing in packings:
            if stored.dtypes[row] == packing.dtype and stored.names[row].endswith(packing.suffix):
                shape_name = part_name(decoded.names[row], packing.shape_suffix)
                if shape_name is not None:
                    yield PaddingSuspect(row, shape_name, packing.codes_per_element)


def without_padding(decoded: SourceTable, widths: Mapping[int, int]) -> SourceTable:
    """Return a table whose weights have only the columns that are not padding.

    Args:
        decoded: the table.
        widths: true number of columns, by row.
    """
    if not widths:
        return decoded
    decodes = {
        row: decode._replace(arrangement=decode.arrangement._replace(width=widths[row])) if row in widths else decode
        for row, decode in decoded.decodes.items()
    }
    return replace(decoded, decodes=decodes)


def group_indices(decoded: SourceTable, config: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Yield the tensors, if they exist, that hold the group of each column of a weight.

    Args:
        decoded: the decoded table.
        config: the ``quantization_config``.

    Yields:
        The name of the tensor, the number of columns of the weight, and the number of columns of a group.
    """
    method = method_of(config)
    suffix = method.group_index if method is not None else ""
    for row, decode in decoded.decodes.items() if suffix else ():
        name, shape = part_name(decoded.names[row], suffix), decode.arrangement.shape(decode.matrix)
        if name is not None and shape is not None:
            yield name, shape[1], decode.block[0] * shape[1] // max(1, decode.matrix[0])


def arranged_plan(table: SourceTable) -> CopyPlan:
    """Return the plan that views each quantized source as its weight, and copies all other sources unchanged."""
    copies_by_shape: dict[tuple[tuple[int, ...], Arrangement], Any] = {}
    targets = []
    for row, (name, dtype, shape) in enumerate(zip(table.names, table.dtypes, table.shapes, strict=True)):
        if row in table.hidden:
            continue
        decode = table.decodes.get(row)
        key = shape, PLAIN if decode is None else decode.arrangement
        if key not in copies_by_shape:
            value = leaf(0, shape) if key[1] == PLAIN else key[1].view(leaf(0, shape))
            copies_by_shape[key] = value.shape, copies_of(value)
        target_shape, copies = copies_by_shape[key]
        targets.append(Target(name, dtype, target_shape, -1, (row,), copies))
    plan = CopyPlan(table, tuple(targets))
    plan.validate()
    return plan


class _Suffixes(dict[str, bool]):
    """Whether any name ends in a suffix, by suffix; most parts of a method do not occur in most checkpoints."""

    def __init__(self, names: Iterable[str]):
        super().__init__()
        self._text = "\n".join([*names, ""])  # one search of a text is faster than one for each name

    def __missing__(self, suffix: str) -> bool:
        self[suffix] = f"{suffix}\n" in self._text
        return self[suffix]


class _CodeMatcher:
    """Matches codes to their scales and zero points, and collects all problems."""

    def __init__(self, table: SourceTable, method: Method, schemes: Sequence[Scheme], like_upstream: bool):
        self._table = table
        self._rows = {name: row for row, name in enumerate(table.names)}
        self._occurs = _Suffixes(table.names)
        self._method = method
        self._schemes = schemes
        self._stated = StatedSchemes(schemes)
        self._like_upstream = like_upstream or method.like_upstream
        self._weights: dict[int, tuple[str, str, tuple[int, ...]]] = {}  # by row: name, dtype and shape of the weight
        self._reported: set[int] = set()  # rows that have a problem
        self._hidden = set(kv_cache_rows(table.names))
        self.decodes: dict[int, Decode] = {}
        self.problems = ProblemKinds()

    def match_all(self) -> None:
        """Match every tensor, and fill ``decodes`` and ``problems``."""
        packings: dict[str, list[Packing]] = {}
        for packing in self._method.codes:
            packings.setdefault(packing.dtype, []).append(packing)
        for row, (name, dtype) in enumerate(zip(self._table.names, self._table.dtypes, strict=True)):
            for packing in packings.get(dtype, ()):
                if name.endswith(packing.suffix) and self._match(row, weight_name(name, packing.suffix), packing):
                    break
        self._report_unpaired_scales()
        for row, (name, dtype) in enumerate(zip(self._table.names, self._table.dtypes, strict=True)):
            if dtype.startswith(NARROW) and not (row in self._weights or row in self._hidden or row in self._reported):
                self.problems.add(f"{{}} is {dtype}, and nothing describes how to decode it", name)

    def decoded(self) -> SourceTable:
        """Return the table with each row of codes described as its decoded weight."""
        names, dtypes, shapes = list(self._table.names), list(self._table.dtypes), list(self._table.shapes)
        for row, weight in self._weights.items():
            names[row], dtypes[row], shapes[row] = weight
        return replace(
            self._table, names=names, dtypes=dtypes, shapes=shapes, decodes=self.decodes, hidden=frozenset(self._hidden)
        )

    def _match(self, row: int, weight: str, packing: Packing) -> bool:
        """Match a tensor as the codes of ``weight``, or return False if it cannot be codes."""
        name, dtype = self._table.names[row], self._table.dtypes[row]
        whole = self._method.whole_name(weight)
        scales = self._part_rows(weight, self._method.scales)
        if not scales and whole is not None:
            scales = self._part_rows(whole, self._method.scales)
        if not scales:
            if weight.endswith(self._method.scales):  # scales may be FP8 themselves
                return False
            is_codes = packing.suffix or dtype.startswith(NARROW) or weight.endswith("weight")
            if is_codes or self._part_rows(weight, self._method.global_scale):
                wanted = " or ".join(filter(None, (part_name(weight, scale) for scale in self._method.scales)))
                self._report(row, "{} has no scale: no tensor is named {}", name, wanted)
                return True
            return False
        zero_points = self._part_row(weight, self._method.zero_points)
        global_scales = self._part_rows(weight, self._method.global_scale)
        global_scale = global_scales[0] if global_scales else None
        global_divisor = self._part_row(weight, self._method.global_divisor)
        others = [zero_points, self._part_row(weight, self._method.group_index), global_divisor]
        self._hidden.update(scales, global_scales, self._part_rows(weight, self._method.dropped))
        self._hidden.update(part for part in others if part is not None)
        refused = self._part_rows(weight, self._method.refused) if self._method.refused else []
        several = next((parts for parts in (scales, global_scales) if len(parts) > 1), None)
        if several is not None:
            listed = ", ".join(self._table.names[part] for part in several)
            self._report(row, f"{{}} has {len(several)} scales: {{}}", name, listed)
        elif refused:
            part = self._table.names[refused[0]]
            why = next(why for suffix, why in self._method.refused.items() if part_name(weight, suffix) == part)
            self._report(row, f"{{}} {why}: {{}}", weight, part)
        elif packing.suffix and weight in self._rows:
            self._report(row, "{} is stored in addition to its codes, {}", weight, name)
        else:
            shape = packing.unpacked(self._table.shapes[row])
            if shape is None:
                stored_shape = list(self._table.shapes[row])
                self._report(row, f"{{}} has the shape {stored_shape}, not {packing.form}", name)
                return True
            scheme = self._scheme(row, weight, packing, shape, scales[0], zero_points, global_scale)
            if scheme is not None and not self._divisor_fits(row, weight, global_scale, global_divisor):
                return True
            if scheme is not None:
                scale_dtype, (rows, columns) = self._table.dtypes[scales[0]], shape[-2:]
                if scheme.block == TENSOR and prod(self._table.shapes[scales[0]]) == 1:
                    rows *= prod(shape[:-2])
                keeps_scale_dtype = scale_dtype in FLOATING and scale_dtype != "F32"
                self._weights[row] = weight, scale_dtype if keeps_scale_dtype else "BF16", shape
                self.decodes[row] = Decode(
                    packing.format,
                    (rows, columns),
                    (scheme.block[0] or max(1, rows), scheme.block[1] or max(1, columns)),
                    scales[0],
                    zero_points,
                    global_scale,
                    self._method.divides,
                    scheme.stack_arrangement or packing.arrangement,
                    self._like_upstream,
                    scheme.zero_packing,
                    packing.scale_word,
                    global_divisor,
                )
        return True

    def _divisor_fits(self, row: int, weight: str, global_scale: int | None, divisor: int | None) -> bool:
        """Return whether a weight has a divisor like its global scale, or neither; report it if not."""
        names, dtypes, shapes = self._table.names, self._table.dtypes, self._table.shapes
        suffix = self._method.global_divisor
        if not suffix or global_scale is divisor is None:
            return True
        if divisor is None:
            self._report(row, "{} has no divisor of its global scale: no tensor is named {}", weight, weight + suffix)
        elif global_scale is None:
            self._report(row, "{} has no global scale to divide", names[divisor])
        elif (dtypes[divisor], shapes[divisor]) != ("F32", shapes[global_scale]):
            wanted = f"F32 {list(shapes[global_scale])} like {{}}"
            kind = f"{{}}: expected {wanted}, found {dtypes[divisor]} {list(shapes[divisor])}"
            self._report(row, kind, names[divisor], names[global_scale])
        else:
            return True
        return False

    def _report_unpaired_scales(self) -> None:
        """Report scales without codes: their writer meant something other than what a load would produce."""
        code_suffixes = {packing.suffix for packing in self._method.codes}
        suffixes = [suffix for suffix in self._method.scales if suffix.startswith("_") or "" not in code_suffixes]
        suffixes = tuple(sorted(suffixes, key=len, reverse=True))
        for name, row in self._rows.items():
            if row in self._hidden or not name.endswith(suffixes):
                continue
            suffix = next(suffix for suffix in suffixes if name.endswith(suffix))
            weight = weight_name(name, suffix)
            candidates = self._part_rows(weight, {"", *code_suffixes})
            if any(candidate in self._reported for candidate in candidates):
                continue
            if candidates:
                names, dtypes = self._table.names, self._table.dtypes
                others = " and ".join(f"{{}}, which is {dtypes[other]}" for other in candidates)
                self._report(row, f"{{}} is the scale of {others}, not codes", name, *(names[n] for n in candidates))
            elif suffix != "_scale" or weight.endswith("weight"):  # other tensors end in "_scale" too
                wanted = " or ".join(sorted(filter(None, (part_name(weight, suffix) for suffix in code_suffixes))))
                self._report(row, "{} is a scale without codes: no tensor is named {}", name, wanted or weight)

    def _report(self, row: int, kind: str, *names: str) -> None:
        self._reported.add(row)
        self.problems.add(kind, *names)

    def _part_row(self, weight: str, suffix: str) -> int | None:
        name = part_name(weight, suffix) if suffix and self._occurs[suffix] else None
        return None if name is None else self._rows.get(name)

    def _part_rows(self, weight: str, suffixes: Iterable[str]) -> list[int]:
        names = [part_name(weight, suffix) for suffix in suffixes if self._occurs[suffix]]
        return [self._rows[name] for name in names if name in self._rows]

    def _scheme(
        self,
        row: int,
        weight: str,
        packing: Packing,
        shape: tuple[int, ...],
        scales: int,
        zero_points: int | None,
        global_scale: int | None,
    ) -> Scheme | None:
        """Return the scheme of the config that fits the parts of a weight, or report why none does and return None."""
        names, dtypes, shapes = self._table.names, self._table.dtypes, self._table.shapes
        format, lead = packing.format, shape[:-2]
        stated = self._stated.of(weight)
        allowed = [scheme for scheme in stated or self._schemes if scheme.format == format]
        if not lead:
            allowed = [scheme for scheme in allowed if scheme.stack_arrangement is None]
        if not allowed and stated:
            others = " or ".join(sorted({scheme.format for scheme in stated}))
            return self._report(row, f"{{}} has {format} codes; the config states {others} for its module", names[row])
        if not allowed:
            return self._report(row, f"{{}} has {format} codes, which the config does not describe", names[row])
        if self._method.whole_name(weight) is not None:
            allowed.append(Scheme(format, TENSOR, FLOAT_SCALES))
        typed = [scheme for scheme in allowed if dtypes[scales] in scheme.scales]
        if not typed:
            wanted = ", ".join(sorted({dtype for scheme in allowed for dtype in scheme.scales}))
            kind = f"{{}} is {dtypes[scales]}; these {format} codes have scales of {wanted}"
            return self._report(row, kind, names[scales])
        fitting = [scheme for scheme in typed if _fit(shapes[scales], shape, scheme.block)]
        if not fitting:
            wanted = " or ".join(dict.fromkeys(str(list(_scale_shapes(shape, scheme.block)[0])) for scheme in typed))
            difference = f"expected {wanted}, found {list(shapes[scales])}"
            return self._report(
                row, f"{{}} of {{}} {_weight_shape(packing, shape)}: {difference}", names[scales], weight
            )
        for part, suffixes, flag, what in (
            (zero_points, (self._method.zero_points,), "zero_points", "zero points"),
            (global_scale, self._method.global_scale, "global_scale", "global scale"),
        ):
            agreeing = [scheme for scheme in fitting if getattr(scheme, flag) == (part is not None)]
            if not agreeing:
                wanted = " or ".join(filter(None, (part_name(weight, suffix) for suffix in suffixes)))
                if part is not None:
                    return self._report(row, f"{{}}: the config has no {what}", names[part])
                absent = wanted or suffixes[0]
                return self._report(row, f"{{}} has no {what}: no tensor is named {{}}", weight, absent)
            fitting = agreeing
        if not stated:
            fitting = [scheme for scheme in fitting if scheme.modules == ANY_MODULE] or fitting
        if len({_within(scheme.block, shape) for scheme in fitting}) > 1:
            blocks = " and ".join(str(list(scheme.block)) for scheme in fitting)
            kind = f"{{}} of {{}} {_weight_shape(packing, shape)} fits several blocks: {blocks}"
            return self._report(row, kind, names[scales], weight)
        scheme = fitting[0]
        rows, columns = _within(scheme.block, shape)
        if packing.shape_suffix and scheme.block[1] is not None and shape[-1] % scheme.block[1]:
            true_shape = part_name(weight, packing.shape_suffix) or packing.shape_suffix
            if true_shape not in self._rows:
                groups = f"{shape[-1]} columns, not whole groups of {scheme.block[1]}"
                kind = f"{{}} holds {groups}, and no {{}} tells how many are padding"
                return self._report(row, kind, names[row], true_shape)
        if zero_points is not None:
            grid_rows, grid_columns = ceil(shape[-2] / rows), ceil(shape[-1] / columns)
            wanted = scheme.zero_packing.rows(0, grid_rows)[1], scheme.zero_packing.columns(grid_columns)
            if len(shape) > 2 or (dtypes[zero_points], shapes[zero_points]) != ("I32", wanted):
                difference = f"expected I32 {list(wanted)}, found {dtypes[zero_points]} {list(shapes[zero_points])}"
                return self._report(row, f"{{}}: {difference}", names[zero_points])
        if global_scale is not None:
            of_stack = _scale_shapes(shape, TENSOR)
            fits = prod(shapes[global_scale]) == 1 or shapes[global_scale] in of_stack
            if dtypes[global_scale] != "F32" or not fits:
                wanted = " or ".join(["one F32", *(f"F32 {list(one_each)}" for one_each in of_stack[-1:] if one_each)])
                stored = f"{dtypes[global_scale]} {list(shapes[global_scale])}"
                return self._report(row, f"{{}}: expected {wanted}, found {stored}", names[global_scale])
        return scheme


def _weight_shape(packing: Packing, shape: tuple[int, ...]) -> list[int]:
    """Return the shape of a weight for errors, given the shape of its codes."""
    return [*shape[:-2], *(packing.arrangement.shape((shape[-2], shape[-1])) or shape[-2:])]


@lru_cache(maxsize=1024)
def _within(block: Block, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of a block, cut to the matrix that holds it."""
    rows, columns = max(1, shape[-2]), max(1, shape[-1])
    return min(block[0] or rows, rows), min(block[1] or columns, columns)


@lru_cache(maxsize=1024)
def _fit(scales: tuple[int, ...], shape: tuple[int, ...], block: Block) -> bool:
    """Return whether scales of a shape fit a weight; one scale for each matrix of a stack may be one for all."""
    return scales in _scale_shapes(shape, block) or (block == TENSOR and prod(scales) == 1)


def _scale_shapes(shape: Sequence[int], block: Block) -> list[tuple[int, ...]]:
    """Return the shapes that the scales of a weight may have, the most explicit first."""
    *lead, rows, columns = shape
    grid_rows = 1 if block[0] is None else ceil(rows / block[0])
    grid_columns = 1 if block[1] is None else ceil(columns / block[1])
    shapes = [[*lead, grid_rows, grid_columns]]
    if block[1] is None:
        shapes.append([*lead, grid_rows])
    if block == TENSOR:
        shapes.append(lead)
    elif lead:  # the rows of blocks of all matrices, one below the other
        shapes.append([prod(lead) * grid_rows, grid_columns])
    if None not in block:
        shapes.append([*lead, grid_rows, 1, grid_columns, 1])  # FP8_PB_WO of modelopt
    if lead and prod(lead) == 1:
        shapes += [scale_shape[len(lead) :] for scale_shape in shapes]  # modelopt leaves out leading dimensions of 1
    return [tuple(scale_shape) for scale_shape in shapes]
