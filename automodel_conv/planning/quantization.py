"""What quantized tensors are made of: which stored tensors are codes and scales of which weight, and how they decode.

A checkpoint says it twice, in the ``quantization_config`` of its ``config.json`` (``schemes``) and by the names, dtypes
and shapes of its tensors; both must agree. What comes out is a table in which codes stand for the weights they hold, so
that nothing after this knows of quantization until the bytes are read.

An element is ``value(code) * scale``. ``e4m3`` and ``e5m2`` are FP8, ``e2m1`` is FP4, ``int4`` is an integer stored
with 8 added, less the zero point if there is one. Scales are floating, or exponents of two in one byte (``F8_E8M0``,
and ``U8`` in MX formats), or FP8 numbers that a scale of the whole tensor multiplies or divides (NVFP4).
Sources: OCP Microscaling Formats 1.0; transformers 5.23.0, ``integrations/finegrained_fp8.py`` and ``mxfp4.py``;
compressed-tensors 0.20.0, ``compressors/*/base.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil, prod
from typing import Any

from automodel_conv.dtypes import FLOATING
from automodel_conv.errors import QuantizationError, listing, message
from automodel_conv.planning.code_names import NARROW
from automodel_conv.planning.copies import ZEROS_IN_I32, Decode, SourceTable, Target
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.methods.method import Block, Method, Packing, Scheme, part_name, weight_name
from automodel_conv.planning.methods.table import METHODS
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.schemes import KEEP, read_config, rows_of_kv_caches
from automodel_conv.planning.values import leaf, transpose


def quantized_table(
    table: SourceTable, config: Mapping[str, Any], *, like_upstream: bool = False, where: str | None = None
) -> SourceTable:
    """``table`` with codes in the place of the weights that they stand for, and all other parts hidden.

    Hidden are also the scales of a quantized KV cache, which are no part of a weight.

    Args:
        config: ``quantization_config`` of the model's ``config.json``.
        where: the file that holds the config, for errors.
        like_upstream: decode as transformers rounds, where that differs.

    Raises:
        UnsupportedError: a method or scheme that is not decoded here; names it.
        QuantizationError: parts are missing, do not fit each other or contradict the config; names all of them.
    """
    method, schemes = read_config(config, where)
    finder = _Finder(table, method, schemes, like_upstream)
    finder.look()
    if schemes and not finder.problems and not finder.decodes:
        finder.problems.append("no tensor has codes and a scale, though the config says that weights are quantized")
    if finder.problems:
        raise QuantizationError(
            message(
                "the checkpoint's quantized tensors cannot be decoded",
                where=f"{where or 'config.json'}, quantization method {method.name}, {len(finder.problems)} problems",
                found="\n" + listing(finder.problems),
                do=["check that the config belongs to these files", KEEP],
            )
        )
    return finder.decoded()


def padding_suspects(stored: SourceTable, decoded: SourceTable, config: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Rows of codes that may end in padding because one scale serves the whole row, and the tensors that tell.

    Args:
        decoded: ``stored`` by this config.
    """
    packings = [packing for packing in METHODS[config["quant_method"]].codes if packing.shape_suffix]
    for row, decode in decoded.decodes.items() if packings else ():
        if decode.block[1] < decode.matrix[1]:
            continue
        for packing in packings:
            if stored.dtypes[row] == packing.dtype and stored.names[row].endswith(packing.suffix):
                teller = part_name(decoded.names[row], packing.shape_suffix)
                if teller is not None:
                    yield row, teller


def untransposed_plan(table: SourceTable) -> CopyPlan:
    """The plan that takes every source as it is, but those that are stored transposed in their meant order."""
    stored_transposed = {row for row, decode in table.decodes.items() if decode.stored_transposed}
    known: dict[tuple[tuple[int, ...], bool], Any] = {}
    targets = []
    for row, (name, dtype, shape) in enumerate(zip(table.names, table.dtypes, table.shapes, strict=True)):
        if row in table.hidden:
            continue
        key = shape, row in stored_transposed
        if key not in known:
            value = leaf(0, shape)
            value = transpose(value, -2, -1) if row in stored_transposed else value
            known[key] = value.shape, copies_of(value)
        made, copies = known[key]
        targets.append(Target(name, dtype, made, -1, (row,), copies))
    plan = CopyPlan(table, tuple(targets))
    plan.validate()
    return plan


class _Finder:
    """Goes through codes, finds their other parts, and collects what does not fit."""

    def __init__(self, table: SourceTable, method: Method, schemes: Sequence[Scheme], like_upstream: bool):
        self._table = table
        self._rows = {name: row for row, name in enumerate(table.names)}
        self._method = method
        self._schemes = schemes
        self._like_upstream = like_upstream
        self._meant: dict[int, tuple[str, str, tuple[int, ...]]] = {}  # name, dtype and shape of the weight
        self._told: set[int] = set()  # rows that take part in a problem
        self._hidden = set(rows_of_kv_caches(table.names))
        self.decodes: dict[int, Decode] = {}
        self.problems: list[str] = []

    def look(self) -> None:
        packings: dict[str, list[Packing]] = {}
        for packing in self._method.codes:
            packings.setdefault(packing.dtype, []).append(packing)
        for row, (name, dtype) in enumerate(zip(self._table.names, self._table.dtypes, strict=True)):
            for packing in packings.get(dtype, ()):
                if name.endswith(packing.suffix) and self._take(row, weight_name(name, packing.suffix), packing):
                    break
        self._look_for_orphans()
        for row, (name, dtype) in enumerate(zip(self._table.names, self._table.dtypes, strict=True)):
            if dtype.startswith(NARROW) and not (row in self._meant or row in self._hidden or row in self._told):
                self.problems.append(f"{name} is {dtype}, and nothing says how that decodes")

    def decoded(self) -> SourceTable:
        names, dtypes, shapes = list(self._table.names), list(self._table.dtypes), list(self._table.shapes)
        for row, meant in self._meant.items():
            names[row], dtypes[row], shapes[row] = meant
        return replace(
            self._table, names=names, dtypes=dtypes, shapes=shapes, decodes=self.decodes, hidden=frozenset(self._hidden)
        )

    def _take(self, row: int, weight: str, packing: Packing) -> bool:
        """Take a tensor for the codes of ``weight``, unless it cannot be codes; False then."""
        name, dtype = self._table.names[row], self._table.dtypes[row]
        scales = self._found(weight, self._method.scales)
        if not scales:
            if weight.endswith(self._method.scales):  # which may be FP8 numbers themselves
                return False
            if packing.suffix or dtype.startswith(NARROW) or weight.endswith("weight"):
                wanted = " or ".join(filter(None, (part_name(weight, scale) for scale in self._method.scales)))
                self._tell(row, f"{name} has no scale: nothing is called {wanted}")
                return True
            return False
        zero_points = self._part(weight, self._method.zero_points)
        global_scale = self._part(weight, self._method.global_scale)
        others = [part for part in (zero_points, global_scale) if part is not None]
        self._hidden.update(scales, others, self._found(weight, self._method.dropped))
        refused = self._found(weight, self._method.refused) if self._method.refused else []
        if len(scales) > 1:
            self._tell(row, f"{name} has {len(scales)} scales: {', '.join(self._table.names[s] for s in scales)}")
        elif refused:
            part = self._table.names[refused[0]]
            why = next(why for suffix, why in self._method.refused.items() if part_name(weight, suffix) == part)
            self._tell(row, f"{weight} {why}: {part}")
        elif packing.suffix and weight in self._rows:
            self._tell(row, f"{weight} is there beside its codes, {name}")
        else:
            shape = packing.unpacked(self._table.shapes[row])
            if shape is None:
                found = list(self._table.shapes[row])
                self._tell(row, f"{name} has the shape {found}, not {packing.form}")
                return True
            scheme = self._scheme(row, weight, packing, shape, scales[0], zero_points, global_scale)
            if scheme is not None:
                kind, (rows, columns) = self._table.dtypes[scales[0]], shape[-2:]
                self._meant[row] = weight, kind if kind in FLOATING and kind != "F32" else "BF16", shape
                self.decodes[row] = Decode(
                    packing.format,
                    (rows, columns),
                    (scheme.block[0] or max(1, rows), scheme.block[1] or max(1, columns)),
                    scales[0],
                    zero_points,
                    global_scale,
                    self._method.divides,
                    packing.stored_transposed,
                    self._like_upstream,
                )
        return True

    def _look_for_orphans(self) -> None:
        """Scales without codes: whoever wrote them meant something else than we would load."""
        suffixes = tuple(suffix for suffix in self._method.scales if suffix.startswith("_"))
        codes = {packing.suffix for packing in self._method.codes}
        for name, row in self._rows.items():
            if row in self._hidden or not name.endswith(suffixes):
                continue
            suffix = next(suffix for suffix in suffixes if name.endswith(suffix))
            weight = name.removesuffix(suffix)
            of = self._found(weight, {"", *codes})
            if any(each in self._told for each in of):
                continue
            if of:
                found = " and ".join(f"{self._table.names[each]}, which is {self._table.dtypes[each]}" for each in of)
                self._tell(row, f"{name} is the scale of {found}, not codes")
            elif suffix != "_scale" or weight.endswith("weight"):  # "_scale" alone is an ending of other things too
                wanted = " or ".join(sorted(filter(None, (part_name(weight, each) for each in codes))))
                self._tell(row, f"{name} is the scale of nothing: nothing is called {wanted or weight}")

    def _tell(self, row: int, problem: str) -> None:
        self._told.add(row)
        self.problems.append(problem)

    def _part(self, weight: str, suffix: str) -> int | None:
        name = part_name(weight, suffix) if suffix else None
        return None if name is None else self._rows.get(name)

    def _found(self, weight: str, suffixes: Iterable[str]) -> list[int]:
        names = [part_name(weight, suffix) for suffix in suffixes]
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
        """The scheme of the config that the parts of a weight agree with."""
        names, dtypes, shapes = self._table.names, self._table.dtypes, self._table.shapes
        format = packing.format
        allowed = [scheme for scheme in self._schemes if scheme.format == format]
        if not allowed:
            return self._tell(row, f"{names[row]} has {format} codes, of which the config does not speak")
        typed = [scheme for scheme in allowed if dtypes[scales] in scheme.scales]
        if not typed:
            wanted = ", ".join(sorted({dtype for scheme in allowed for dtype in scheme.scales}))
            return self._tell(row, f"{names[scales]} is {dtypes[scales]}; these {format} codes have scales of {wanted}")
        fitting = [scheme for scheme in typed if shapes[scales] in _scale_shapes(shape, scheme.block)]
        if not fitting:
            wanted = " or ".join(dict.fromkeys(str(list(_scale_shapes(shape, each.block)[0])) for each in typed))
            found = f"expected {wanted}, found {list(shapes[scales])}"
            return self._tell(row, f"{names[scales]} of {weight} {list(shape)}: {found}")
        for part, suffix, flag, what in (
            (zero_points, self._method.zero_points, "zero_points", "zero points"),
            (global_scale, self._method.global_scale, "global_scale", "scale of the whole tensor"),
        ):
            agreeing = [scheme for scheme in fitting if getattr(scheme, flag) == (part is not None)]
            if not agreeing:
                missing = f"{weight} has no {what}: nothing is called {part_name(weight, suffix) or suffix}"
                return self._tell(row, missing if part is None else f"{names[part]}: the config speaks of no {what}")
            fitting = agreeing
        if len({_within(scheme.block, shape) for scheme in fitting}) > 1:
            blocks = " and ".join(str(list(scheme.block)) for scheme in fitting)
            return self._tell(row, f"{names[scales]} of {weight} {list(shape)} fits several blocks: {blocks}")
        scheme = fitting[0]
        rows, columns = _within(scheme.block, shape)
        # Whole groups leave no padding.
        if packing.shape_suffix and scheme.block[1] is not None and shape[-1] % scheme.block[1]:
            return self._tell(row, f"{names[row]} holds {shape[-1]} columns, not whole groups of {scheme.block[1]}")
        if zero_points is not None:
            wanted = ceil(ceil(shape[-2] / rows) / ZEROS_IN_I32), ceil(shape[-1] / columns)
            if len(shape) > 2 or (dtypes[zero_points], shapes[zero_points]) != ("I32", wanted):
                found = f"expected I32 {list(wanted)}, found {dtypes[zero_points]} {list(shapes[zero_points])}"
                return self._tell(row, f"{names[zero_points]}: {found}")
        if global_scale is not None and (dtypes[global_scale] != "F32" or prod(shapes[global_scale]) != 1):
            found = f"{dtypes[global_scale]} {list(shapes[global_scale])}"
            return self._tell(row, f"{names[global_scale]}: expected one F32, found {found}")
        return scheme


def _within(block: Block, shape: Sequence[int]) -> tuple[int, int]:
    """A block cut to the matrix that it lies in."""
    rows, columns = max(1, shape[-2]), max(1, shape[-1])
    return min(block[0] or rows, rows), min(block[1] or columns, columns)


def _scale_shapes(shape: Sequence[int], block: Block) -> list[tuple[int, ...]]:
    """The shapes that scales of a weight may have, the plainest first."""
    *lead, rows, columns = shape
    down = 1 if block[0] is None else ceil(rows / block[0])
    across = 1 if block[1] is None else ceil(columns / block[1])
    shapes = [[*lead, down, across]]
    if block[1] is None:
        shapes.append([*lead, down])
    if block == (None, None):
        shapes.append(lead)
    return [tuple(each) for each in shapes]
