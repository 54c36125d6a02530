"""Match the codes of a checkpoint to their scales and other parts by name, and collect all problems."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

from automodel_conv.dtypes import FLOATING
from automodel_conv.planning.code_names import NARROW
from automodel_conv.planning.copies import Decode, SourceTable
from automodel_conv.planning.methods.method import TENSOR, Method, Packing, Scheme, part_name, weight_name
from automodel_conv.planning.problem_kinds import ProblemKinds
from automodel_conv.planning.scheme_choice import (
    CodedWeight,
    Misfit,
    Part,
    check_divisor,
    check_global_scale,
    check_zero_points,
    choose_scheme,
)
from automodel_conv.planning.schemes import kv_cache_rows
from automodel_conv.planning.stated_schemes import StatedSchemes


class CodeMatcher:
    """Matches codes to their scales and zero points, and collects all problems.

    Attributes:
        decodes: how each row of codes is decoded.
        problems: the problems.
    """

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
        scales = self._scale_rows(weight)
        if not scales:
            return self._report_missing_scale(row, weight, packing)
        try:
            coded = self._coded_weight(row, weight, packing, scales)
            scheme = choose_scheme(coded, self._method, self._schemes, self._stated.of(weight))
            self._check_padding(coded, scheme)
            check_zero_points(coded, scheme)
            check_global_scale(coded)
            check_divisor(coded, self._method.global_divisor)
        except Misfit as misfit:
            self._report(row, misfit.kind, *misfit.names)
            return True
        scale_dtype = coded.scales.dtype
        keeps_scale_dtype = scale_dtype in FLOATING and scale_dtype != "F32"
        self._weights[row] = weight, scale_dtype if keeps_scale_dtype else "BF16", coded.shape
        self.decodes[row] = self._decode(coded, scheme)
        return True

    def _scale_rows(self, weight: str) -> list[int]:
        """Return the rows of all scales of a weight, or of the weight that it is a shard of."""
        scales = self._part_rows(weight, self._method.scales)
        whole = None if scales else self._method.whole_name(weight)
        return scales if whole is None else self._part_rows(whole, self._method.scales)

    def _report_missing_scale(self, row: int, weight: str, packing: Packing) -> bool:
        """Report codes without a scale, or return False if the tensor does not hold codes."""
        if weight.endswith(self._method.scales):  # scales may be FP8 themselves
            return False
        is_codes = packing.suffix or self._table.dtypes[row].startswith(NARROW) or weight.endswith("weight")
        if not is_codes and not self._part_rows(weight, self._method.global_scale):
            return False
        wanted = " or ".join(filter(None, (part_name(weight, scale) for scale in self._method.scales)))
        self._report(row, "{} has no scale: no tensor is named {}", self._table.names[row], wanted)
        return True

    def _coded_weight(self, row: int, weight: str, packing: Packing, scales: Sequence[int]) -> CodedWeight:
        """Return a weight with its parts, and hide these.

        Raises:
            Misfit: a part is present twice or not supported, or the shape of the codes is invalid.
        """
        method = self._method
        zero_points = self._part_row(weight, method.zero_points)
        global_scales = self._part_rows(weight, method.global_scale)
        divisor = self._part_row(weight, method.global_divisor)
        self._hidden.update(scales, global_scales, self._part_rows(weight, method.dropped))
        others = (zero_points, divisor, self._part_row(weight, method.group_index))
        self._hidden.update(part for part in others if part is not None)
        codes = self._part(row)
        for parts in (scales, global_scales):
            if len(parts) > 1:
                listed = ", ".join(self._table.names[part] for part in parts)
                raise Misfit(f"{{}} has {len(parts)} scales: {{}}", codes.name, listed)
        for suffix, why in method.refused.items():
            refused = self._part_row(weight, suffix)
            if refused is not None:
                raise Misfit(f"{{}} {why}: {{}}", weight, self._table.names[refused])
        if packing.suffix and weight in self._rows:
            raise Misfit("{} is stored in addition to its codes, {}", weight, codes.name)
        shape = packing.unpacked(codes.shape)
        if shape is None:
            raise Misfit(f"{{}} has the shape {list(codes.shape)}, not {packing.form}", codes.name)
        return CodedWeight(
            weight,
            packing,
            shape,
            codes=codes,
            scales=self._part(scales[0]),
            zero_points=None if zero_points is None else self._part(zero_points),
            global_scale=self._part(global_scales[0]) if global_scales else None,
            global_divisor=None if divisor is None else self._part(divisor),
        )

    def _check_padding(self, weight: CodedWeight, scheme: Scheme) -> None:
        """Raise Misfit if the rows of a weight may end in padding, and no tensor has its true shape."""
        suffix, columns, group = weight.packing.shape_suffix, weight.shape[-1], scheme.block[1]
        if not suffix or group is None or columns % group == 0:
            return
        true_shape = part_name(weight.name, suffix) or suffix
        if true_shape not in self._rows:
            groups = f"{columns} columns, which are not whole groups of {group}"
            kind = f"{{}} has {groups}: no tensor {{}} states how many of them are padding"
            raise Misfit(kind, weight.codes.name, true_shape)

    def _decode(self, weight: CodedWeight, scheme: Scheme) -> Decode:
        """Return how a weight is decoded by a scheme that fits its parts."""
        *lead, rows, columns = weight.shape
        if scheme.block == TENSOR and prod(weight.scales.shape) == 1:
            rows *= prod(lead)
        return Decode(
            weight.packing.format,
            (rows, columns),
            (scheme.block[0] or max(1, rows), scheme.block[1] or max(1, columns)),
            scales=weight.scales.row,
            zero_points=None if weight.zero_points is None else weight.zero_points.row,
            global_scale=None if weight.global_scale is None else weight.global_scale.row,
            divides=self._method.divides,
            arrangement=scheme.stack_arrangement or weight.packing.arrangement,
            like_upstream=self._like_upstream,
            zero_packing=scheme.zero_packing,
            scale_word=weight.packing.scale_word,
            global_divisor=None if weight.global_divisor is None else weight.global_divisor.row,
        )

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

    def _part(self, row: int) -> Part:
        return Part(row, self._table.names[row], self._table.dtypes[row], self._table.shapes[row])


class _Suffixes(dict[str, bool]):
    """Whether any name ends in a suffix, by suffix; most parts of a method do not occur in most checkpoints."""

    def __init__(self, names: Iterable[str]):
        super().__init__()
        self._text = "\n".join([*names, ""])  # one search of a text is faster than one for each name

    def __missing__(self, suffix: str) -> bool:
        self[suffix] = f"{suffix}\n" in self._text
        return self[suffix]
