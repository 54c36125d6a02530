"""What quantized tensors are made of: which stored tensors are codes and scales of which weight, and how they decode.

A checkpoint says it twice, in the ``quantization_config`` of its ``config.json`` and by the names, dtypes and shapes of
its tensors; both must agree. What comes out is a table in which codes stand for the weights they hold, so that nothing
after this knows of quantization until the bytes are read.

An element is ``value(code) * scale``. ``e4m3`` and ``e5m2`` are FP8, ``e2m1`` is FP4, ``int4`` is an integer stored
with 8 added, less the zero point if there is one. Scales are floating, or exponents of two in one byte (``F8_E8M0``,
and ``U8`` in MX formats), or FP8 numbers that a scale of the whole tensor multiplies or divides (NVFP4).
Sources: OCP Microscaling Formats 1.0; transformers 5.23.0, ``integrations/finegrained_fp8.py`` and ``mxfp4.py``;
compressed-tensors 0.20.0, ``compressors/*/base.py``; the files of DeepSeek-V3, DeepSeek-V4, gpt-oss and Kimi-K2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil, prod
from typing import Any, NamedTuple

from automodel_conv.dtypes import FLOATING
from automodel_conv.errors import QuantizationError, UnsupportedError, listing, message
from automodel_conv.planning.copies import Decode, SourceTable, Target, group_pieces
from automodel_conv.planning.lowering import leaf, transpose
from automodel_conv.planning.plan import CopyPlan


class _Storage(NamedTuple):
    """How a method stores a weight called N: suffixes to N, or in place of its last component if they start with a dot.

    ``codes``: by suffix and dtype, the format. ``scales``: the first one found. ``dropped``: what only running the
    model quantized needs.
    """

    codes: Mapping[tuple[str, str], str]
    scales: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    zero_points: str = ""
    global_scale: str = ""
    divides: bool = False


_FP8 = {("", "F8_E4M3"): "e4m3", ("", "F8_E5M2"): "e5m2"}
_METHODS: Mapping[str, _Storage] = {
    # DeepSeek-V3, Qwen3-FP8, MiniMax-M2 (_scale_inv); DeepSeek-V4 (.scale; experts e2m1 as I8); Mistral (.qscale_*).
    "fp8": _Storage(
        {**_FP8, ("", "I8"): "e2m1", ("", "F4"): "e2m1"},
        ("_scale_inv", "_scale", ".scale", ".qscale_weight"),
        (".activation_scale", "_activation_scale", ".input_scale", ".qscale_act"),
    ),
    "fbgemm_fp8": _Storage(_FP8, ("_scale",), (".input_scale_ub",)),
    # gpt-oss: [..., rows, groups, 16] bytes of codes, meant as [..., columns, rows].
    "mxfp4": _Storage({("_blocks", "U8"): "e2m1"}, ("_scales",)),
    "compressed-tensors": _Storage(
        {**_FP8, ("_packed", "I32"): "int4", ("_packed", "U8"): "e2m1"},
        ("_scale",),
        ("_shape", ".input_scale", ".input_global_scale", ".input_zero_point"),
        zero_points="_zero_point",
        global_scale="_global_scale",
        divides=True,
    ),
    "modelopt": _Storage({**_FP8, ("", "U8"): "e2m1"}, ("_scale",), (".input_scale",), global_scale="_scale_2"),
}

# Of a code's container, by dtype.
_CODES_IN = {"I32": 8, "U8": 2, "I8": 2, "F4": 2}
_EXPONENTS = {"F8_E8M0", "U8"}
_SCALE_DTYPES = {
    "e4m3": {"F32", "BF16", "F16"} | _EXPONENTS,
    "e5m2": {"F32", "BF16", "F16"} | _EXPONENTS,
    "e2m1": {"F8_E4M3"} | _EXPONENTS,
    "int4": {"F32", "BF16", "F16"},
}
# What shares a scale: rows and columns of a block, None for all there are.
_Block = tuple[int | None, int | None]
_TENSOR: _Block = (None, None)
_CHANNEL: _Block = (1, None)


def has_codes(table: SourceTable) -> str | None:
    """The name of a tensor of ``table`` that has the form of codes with scales, if there is one."""
    names = set(table.names)
    for name, dtype in zip(table.names, table.dtypes, strict=True):
        for storage in _METHODS.values():
            for (suffix, stored), _ in storage.codes.items():
                if dtype == stored and name.endswith(suffix):
                    weight = name.removesuffix(suffix)
                    if any(_part(weight, scale) in names for scale in storage.scales):
                        return name
    return None


def quantized_table(table: SourceTable, config: Mapping[str, Any], *, like_upstream: bool = False) -> SourceTable:
    """``table`` with codes in the place of the weights that they stand for, and all other parts hidden.

    Args:
        config: ``quantization_config`` of the model's ``config.json``.
        like_upstream: decode as transformers rounds, where that differs.

    Raises:
        UnsupportedError: a method or scheme that is not decoded here; names it.
        QuantizationError: parts are missing, do not fit each other or contradict the config; names all of them.
    """
    method = config.get("quant_method")
    storage = _METHODS.get(method) if isinstance(method, str) else None
    if storage is None:
        raise UnsupportedError(
            message(
                f"checkpoints of the quantization method {method!r} are not decoded",
                expected=f"one of {sorted(_METHODS)}",
                do="dequantize=False loads the stored tensors as they are",
            )
        )
    try:
        schemes = _schemes(str(method), config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, UnsupportedError):
            raise
        text = f"the quantization_config of method {method} is malformed"
        raise QuantizationError(message(text, found=f"{type(error).__name__}: {error}")) from error
    rows = {name: row for row, name in enumerate(table.names)}
    finder = _Finder(table, rows, storage, schemes, like_upstream)
    formats: dict[str, list[tuple[str, str]]] = {}
    for (suffix, dtype), format in storage.codes.items():
        formats.setdefault(dtype, []).append((suffix, format))
    for row, (name, dtype) in enumerate(zip(table.names, table.dtypes, strict=True)):
        for suffix, format in formats.get(dtype, ()):
            if name.endswith(suffix) and finder.take(row, name.removesuffix(suffix), suffix, format):
                break
    finder.look_for_orphans()
    if not finder.problems and not finder.decodes:
        finder.problems.append("no tensor has codes and a scale, though the config says that weights are quantized")
    if finder.problems:
        found = "\n" + listing(finder.problems)
        raise QuantizationError(
            message(
                "the checkpoint's quantized tensors cannot be decoded",
                where=f"quantization method {method}, {len(finder.problems)} problems",
                found=found,
                do="check that config.json belongs to these files; dequantize=False loads them as they are",
            )
        )
    return finder.table()


def as_meant(table: SourceTable) -> CopyPlan:
    """The plan that takes every source as it is, but those that are stored transposed in their meant order."""
    swapped = {row for row, decode in table.decodes.items() if decode.swapped}
    known: dict[tuple[tuple[int, ...], bool], Any] = {}
    targets = []
    for row, (name, dtype, shape) in enumerate(zip(table.names, table.dtypes, table.shapes, strict=True)):
        if row in table.hidden:
            continue
        key = shape, row in swapped
        if key not in known:
            value = leaf(0, shape)
            value = transpose(value, -2, -1) if row in swapped else value
            known[key] = value.shape, group_pieces(value.pieces)
        made, copies = known[key]
        targets.append(Target(name, dtype, made, -1, (row,), copies))
    plan = CopyPlan(table, tuple(targets))
    plan.validate()
    return plan


# --- what a config says ---------------------------------------------------------------------------------------------


class _Scheme(NamedTuple):
    """What a config allows a weight to be: the format of its codes, what shares a scale, whether with zero points."""

    format: str
    block: _Block
    zero_points: bool = False


def _schemes(method: str, config: Mapping[str, Any]) -> list[_Scheme]:
    """All schemes that a config allows.

    Raises:
        UnsupportedError: one that is not decoded here.
    """
    if method == "fp8":
        block = config.get("weight_block_size", (128, 128))  # transformers' default; None is one scale a tensor
        blocks = [_TENSOR, _CHANNEL] if block is None else [_pair(block)]
        fp8 = [_Scheme(format, each) for format in ("e4m3", "e5m2") for each in blocks]
        # DeepSeek-V4's experts: the config tells the block of the other weights alone.
        return [*fp8, _Scheme("e2m1", (1, 32))]
    if method == "fbgemm_fp8":
        return [_Scheme("e4m3", _CHANNEL)]
    if method == "mxfp4":
        return [_Scheme("e2m1", (1, 32))]
    if method == "modelopt":
        return _modelopt_schemes(config)
    groups = [group for group in (config.get("config_groups") or {}).values() if group.get("weights")]
    return [_compressed_scheme(group["weights"], group.get("format") or config.get("format")) for group in groups]


def _modelopt_schemes(config: Mapping[str, Any]) -> list[_Scheme]:
    algorithm = str(config.get("quant_algo"))
    known = {"FP8": _Scheme("e4m3", _TENSOR), "NVFP4": _Scheme("e2m1", (1, int(config.get("group_size") or 16)))}
    if algorithm not in known:
        raise _unsupported(f"modelopt's {algorithm}", sorted(known))
    return [known[algorithm]]


# compressed-tensors 0.20.0, ``CompressionFormat``: those of which the codes are one of our formats.
_COMPRESSED = {
    "pack-quantized": ("int", 4, "int4"),
    "float-quantized": ("float", 8, "e4m3"),
    "naive-quantized": ("float", 8, "e4m3"),
    "mxfp8-quantized": ("float", 8, "e4m3"),
    "nvfp4-pack-quantized": ("float", 4, "e2m1"),
    "mxfp4-pack-quantized": ("float", 4, "e2m1"),
}


def _compressed_scheme(weights: Mapping[str, Any], stored: Any) -> _Scheme:
    kind, bits = weights.get("type"), weights.get("num_bits")
    known = _COMPRESSED.get(str(stored))
    if known is None or known[:2] != (kind, bits):
        raise _unsupported(f"compressed-tensors' {stored} with {bits}-bit {kind} weights", sorted(_COMPRESSED))
    if weights.get("actorder") in ("group", True):
        raise _unsupported("compressed-tensors' groups by activation order", "no actorder, or static or weight")
    return _Scheme(known[2], _compressed_block(weights), not weights.get("symmetric", True))


def _compressed_block(weights: Mapping[str, Any]) -> _Block:
    strategy = weights.get("strategy")
    if strategy in ("group", "tensor_group"):
        return 1, int(weights["group_size"])
    if strategy == "block":
        return _pair(weights["block_structure"])
    if strategy == "channel":
        return _CHANNEL
    if strategy == "tensor":
        return _TENSOR
    raise _unsupported(f"compressed-tensors' strategy {strategy!r}", ["tensor", "channel", "group", "block"])


def _pair(block: Sequence[Any]) -> _Block:
    rows, columns = block
    if int(rows) < 1 or int(columns) < 1:
        raise UnsupportedError(message("a quantization block without elements", found=list(block)))
    return int(rows), int(columns)


def _unsupported(what: str, expected: object) -> UnsupportedError:
    do = "dequantize=False loads the stored tensors as they are"
    return UnsupportedError(message(f"this quantization scheme is not decoded: {what}", expected=expected, do=do))


# --- what tensors say -----------------------------------------------------------------------------------------------


class _Finder:
    """Goes through codes, finds their other parts, and collects what does not fit."""

    def __init__(
        self,
        table: SourceTable,
        rows: Mapping[str, int],
        storage: _Storage,
        schemes: Iterable[_Scheme],
        like_upstream: bool,
    ):
        self._table = table
        self._rows = rows
        self._storage = storage
        self._schemes = list(schemes)
        self._like_upstream = like_upstream
        self._names: dict[int, str] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._dtypes: dict[int, str] = {}
        self._hidden: set[int] = set()
        self.decodes: dict[int, Decode] = {}
        self.problems: list[str] = []

    def table(self) -> SourceTable:
        names, dtypes, shapes = list(self._table.names), list(self._table.dtypes), list(self._table.shapes)
        for row in self.decodes:
            names[row], dtypes[row], shapes[row] = self._names[row], self._dtypes[row], self._shapes[row]
        return replace(
            self._table, names=names, dtypes=dtypes, shapes=shapes, decodes=self.decodes, hidden=frozenset(self._hidden)
        )

    def take(self, row: int, weight: str, suffix: str, format: str) -> bool:
        """Take a tensor for the codes of ``weight``, unless it cannot be codes; False then."""
        dtype = self._table.dtypes[row]
        scales = self._find(weight, *self._storage.scales)
        if scales is None:
            if weight.endswith(self._storage.scales):  # which may be FP8 numbers themselves
                return False
            if suffix or dtype.startswith("F8_"):
                wanted = " or ".join(_part(weight, suffix) for suffix in self._storage.scales)
                self.problems.append(f"{self._table.names[row]} has no scale: nothing is called {wanted}")
            return bool(suffix)
        shape = self._meant(row, format)
        scheme = self._scheme(row, weight, format, scales, shape) if shape is not None else None
        parts = [self._find(weight, suffix) for suffix in self._storage.dropped]
        self._hidden.update(part for part in (*parts, scales) if part is not None)
        if shape is None or scheme is None:
            return True
        matrix = shape[-2], shape[-1]
        block = scheme.block[0] or max(1, matrix[0]), scheme.block[1] or max(1, matrix[1])
        zero_points = self._zero_points(weight, scheme, matrix, block)
        global_scale = self._global_scale(weight, format, scales)
        self._hidden.update(part for part in (zero_points, global_scale) if part is not None)
        kind = self._table.dtypes[scales]
        swapped = suffix == "_blocks"
        self._names[row] = weight
        self._shapes[row] = shape
        self._dtypes[row] = kind if kind in FLOATING and kind != "F32" else "BF16"
        self.decodes[row] = Decode(
            format,
            matrix,
            block,
            scales,
            zero_points,
            global_scale,
            self._storage.divides,
            swapped,
            self._like_upstream,
        )
        return True

    def look_for_orphans(self) -> None:
        """Scales of tensors that are no codes: whoever wrote them meant something else than we would load."""
        suffixes = tuple(suffix for suffix in self._storage.scales if suffix.startswith("_"))
        for name, row in self._rows.items():
            if row in self._hidden or not name.endswith(suffixes):
                continue
            base = next(name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix))
            of = self._rows.get(base)
            if of is not None and of not in self.decodes:
                self.problems.append(f"{name} is the scale of {base}, which is {self._table.dtypes[of]}, not codes")

    def _find(self, weight: str, *suffixes: str) -> int | None:
        return next((self._rows[name] for s in suffixes if (name := _part(weight, s)) in self._rows), None)

    def _meant(self, row: int, format: str) -> tuple[int, ...] | None:
        """The shape of the weight, as stored."""
        name, dtype, shape = self._table.names[row], self._table.dtypes[row], self._table.shapes[row]
        in_blocks = name.endswith("_blocks")
        if len(shape) < 2 + in_blocks or (in_blocks and shape[-1] != 16):
            expected = "[..., rows, groups, 16]" if in_blocks else "[..., rows, columns]"
            self.problems.append(f"{name} has the shape {list(shape)}, not {expected}")
            return None
        if in_blocks:
            return (*shape[:-2], shape[-2] * 32)
        return (*shape[:-1], shape[-1] * (_CODES_IN[dtype] if format in ("e2m1", "int4") else 1))

    def _scheme(self, row: int, weight: str, format: str, scales: int, shape: tuple[int, ...]) -> _Scheme | None:
        """The scheme of which the scales have the right shape."""
        name = self._table.names[row]
        allowed = [scheme for scheme in self._schemes if scheme.format == format]
        if not allowed:
            self.problems.append(f"{name} has {format} codes, of which the config does not speak")
            return None
        kind, found = self._table.dtypes[scales], self._table.shapes[scales]
        if kind not in _SCALE_DTYPES[format]:
            wanted = ", ".join(sorted(_SCALE_DTYPES[format]))
            self.problems.append(f"{self._table.names[scales]} is {kind}; scales of {format} codes are {wanted}")
            return None
        for scheme in allowed:
            if found in _scale_shapes(shape, scheme.block):
                return scheme
        wanted = " or ".join(dict.fromkeys(str(list(_scale_shapes(shape, scheme.block)[0])) for scheme in allowed))
        self.problems.append(
            f"{self._table.names[scales]} of {weight} {list(shape)}: expected {wanted}, found {list(found)}"
        )
        return None

    def _zero_points(self, weight: str, scheme: _Scheme, matrix: tuple[int, int], block: tuple[int, int]) -> int | None:
        suffix = self._storage.zero_points
        row = self._find(weight, suffix) if suffix else None
        if row is None:
            if scheme.zero_points:
                self.problems.append(f"{weight} has no zero points: nothing is called {_part(weight, suffix)}")
            return None
        if not scheme.zero_points:
            self.problems.append(f"{self._table.names[row]} are zero points, and the config says there are none")
            return None
        # Packed along the rows, eight to an I32, the first in the lowest bits.
        wanted = ceil(ceil(matrix[0] / block[0]) / 8), ceil(matrix[1] / block[1])
        found = self._table.dtypes[row], self._table.shapes[row]
        if found != ("I32", wanted):
            self.problems.append(
                f"{self._table.names[row]}: expected I32 {list(wanted)}, found {found[0]} {list(found[1])}"
            )
        return row

    def _global_scale(self, weight: str, format: str, scales: int) -> int | None:
        suffix = self._storage.global_scale
        row = self._find(weight, suffix) if suffix else None
        if row is None:
            if self._table.dtypes[scales] == "F8_E4M3":
                wanted = f": nothing is called {_part(weight, suffix)}" if suffix else ""
                self.problems.append(f"{weight} has FP8 scales and no scale of the whole tensor{wanted}")
            return None
        found = self._table.dtypes[row], self._table.shapes[row]
        if found[0] != "F32" or prod(found[1]) != 1:
            self.problems.append(f"{self._table.names[row]}: expected one F32, found {found[0]} {list(found[1])}")
        return row


def _part(weight: str, suffix: str) -> str:
    return weight.rpartition(".")[0] + suffix if suffix.startswith(".") else weight + suffix


def _scale_shapes(shape: Sequence[int], block: _Block) -> list[tuple[int, ...]]:
    """The shapes that scales of a weight may have, the plainest first."""
    *lead, rows, columns = shape
    down = 1 if block[0] is None else ceil(rows / block[0])
    across = 1 if block[1] is None else ceil(columns / block[1])
    shapes = [[*lead, down, across]]
    if block[1] is None:
        shapes.append([*lead, down])
    if block == _TENSOR:
        shapes.append(lead)
    return [tuple(each) for each in shapes]
