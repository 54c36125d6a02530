"""Quantized sources in a file, and schedules that decode them, executed one element at a time in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from automodel_conv.kernels.code_tables import CODE_VALUES, E8M0_VALUES
from automodel_conv.planning.boxes import Box, Piece
from automodel_conv.planning.copies import CODE_BITS, Decode, ZeroPacking
from automodel_conv.schedule.code_windows import CodeWindow, ScaleGroup
from automodel_conv.schedule.jobs import Move, Read, ReadAndCopy

PLAIN_ZEROS = ZeroPacking()
FORMATS = {
    "fp8": dict(code_format="e4m3", scales="F32"),
    "mxfp4": dict(code_format="e2m1", scales="U8", block=(1, 4)),
    "nvfp4": dict(code_format="e2m1", scales="BF16", has_global=True, block=(1, 2)),
    "nvfp4, a global scale for each matrix": dict(code_format="e2m1", scales="U8", has_global="each", block=(1, 4)),
    "bf16 scales, a global scale for each matrix": dict(
        code_format="e2m1", scales="BF16", has_global="each", block=(2, 4)
    ),
    "nvfp4, a quotient for each matrix": dict(
        code_format="e2m1", scales="U8", has_global="each", has_divisor=True, block=(1, 4)
    ),
    "bf16 scales, a quotient": dict(code_format="e2m1", scales="BF16", has_global=True, has_divisor=True, block=(1, 2)),
    "int4 with zero points": dict(code_format="int4", scales="BF16", zero_points=True, block=(1, 4)),
    "gptq": dict(
        code_format="int4", scales="BF16", zero_points=True, block=(2, 8), packing=ZeroPacking(True, 0x11111111)
    ),
    "awq": dict(
        code_format="int4", scales="BF16", zero_points=True, block=(4, 1), packing=ZeroPacking(True), word=(4, 2)
    ),
    "odd blocks": dict(code_format="int4", scales="F32", zero_points=True, block=(2, 3)),
    "int4 in blocks": dict(code_format="int4", scales="F32", zero_points=True, has_global=True, block=(3, 4)),
}
# Rows, columns and block: square, single, and cut off by the block.
SMALL_MATRICES = [
    (8, 8, (4, 4)),
    (1, 2, (1, 2)),
    (1, 16, (128, 128)),
    (5, 6, (2, 4)),
    (7, 2, (7, 2)),
]
SCALES = {"F32": np.float32, "BF16": None, "U8": None}


class File:
    """Tensors of one file, with the part of a checkpoint that schedules use."""

    def __init__(self):
        self.data = b""
        self.names, self.dtypes, self.shapes, self.offsets, self.nbytes = [], [], [], [], []
        self.files = ["a.safetensors"]

    @property
    def file_ids(self):
        return [0] * len(self.names)

    def add(self, name, dtype, array):
        self.data += b"\x7e" * (7 * len(self.names) % 13)  # a gap, so that nothing is aligned
        raw = array.tobytes()
        for column, value in (
            (self.names, name),
            (self.dtypes, dtype),
            (self.shapes, array.shape),
            (self.offsets, len(self.data)),
            (self.nbytes, len(raw)),
        ):
            column.append(value)
        self.data += raw
        return len(self.names) - 1


def add_source(
    file,
    random,
    name,
    *,
    code_format,
    matrices,
    rows,
    columns,
    block,
    scales,
    zero_points,
    has_global,
    packing=PLAIN_ZEROS,
    word=(),
    has_divisor=False,
):
    """Add a quantized source. Return its row, its ``Decode`` and its values in float64, flat."""
    bits = CODE_BITS[code_format]
    codes = random.integers(0, 1 << bits, (matrices, rows, columns))
    if bits == 8:
        codes[codes % 128 == 127] = 3  # no NaN, which never equals itself
    stored = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    row = file.add(name, "F8_E4M3" if bits == 8 else "U8", stored.astype(np.uint8))
    down, across = matrices * -(-rows // block[0]), -(-columns // block[1])
    if scales == "U8":
        raw = random.integers(120, 134, (down, across)).astype(np.uint8)
        values = np.array(E8M0_VALUES)[raw]
    else:
        values = random.normal(size=(down, across)).astype(np.float32)
        raw = values
        if scales == "BF16":
            raw = (values.view(np.uint32) >> 16).astype(np.uint16)
            values = (raw.astype(np.uint32) << 16).view(np.float32)
    values = values[:, [stored_column(column, word) for column in range(across)]]
    at = file.add(f"{name}.scales", scales, raw)
    zeros_row = global_row = divisor_row = None
    zeros = np.full((down, across), 8)
    if zero_points:
        zeros = random.integers(0, 16, (down, across))
        padded = np.zeros((-(-down // 8) * 8, -(-across // 8) * 8), np.int64)
        padded[:down, :across] = zeros
        words = sum((padded[:, k::8] if packing.by_columns else padded[k::8]) << (4 * k) for k in range(8))
        words = words[:down] if packing.by_columns else words[:, :across]
        packed = ((words - packing.added) % 2**32).astype(np.uint32).view(np.int32)
        zeros_row = file.add(f"{name}.zeros", "I32", packed)
    common = np.ones(matrices, np.float32)
    if has_global:
        stored = random.normal(size=matrices if has_global == "each" else 1).astype(np.float32)
        common[:] = stored
        global_row = file.add(f"{name}.global", "F32", stored)
        if has_divisor:
            divisor = random.normal(size=stored.shape).astype(np.float32)
            common[:] = stored / divisor
            divisor_row = file.add(f"{name}.divisor", "F32", divisor)
    decode = Decode(
        code_format,
        (rows, columns),
        block,
        at,
        zeros_row,
        global_row,
        zero_packing=packing,
        scale_word=word,
        global_divisor=divisor_row,
    )
    numbers = np.empty((matrices, rows, columns), np.float64)
    for m, r, c in np.ndindex(numbers.shape):
        cell = m * -(-rows // block[0]) + r // block[0], c // block[1]
        number = CODE_VALUES[code_format][codes[m, r, c]]
        if zero_points:
            number = float(codes[m, r, c] - zeros[cell])
        numbers[m, r, c] = number * float(values[cell]) * float(common[m])
    return row, decode, numbers.reshape(-1)


VIEWS = {
    "whole": lambda x: x,
    "flat run that begins and ends within rows": lambda x: x.flatten()[x.shape[2] // 2 : -max(1, x.shape[2] // 3)],
    "transposed": lambda x: x.transpose(1, 2),
    "columns": lambda x: x[:, :, x.shape[2] // 4 :],
    "an odd column": lambda x: x[:, :, 1:],
    "rows": lambda x: x[:, x.shape[1] // 3 :],
    "even rows": lambda x: x[:, 0::2],
    "odd rows transposed": lambda x: x[:, 1::2].transpose(1, 2),
    "every third row": lambda x: x[:, 0::3],
    "every other column": lambda x: x[:, :, 0::2],
    "matrices last": lambda x: x.permute(1, 2, 0),
    "one element": lambda x: x[0, 0, :1],
    "each twice": lambda x: x[None].expand(2, *x.shape),
    "halves of columns separately": lambda x: x.unflatten(2, (2, -1)).permute(2, 0, 1, 3) if x.shape[2] % 2 == 0 else x,
}


def taken(view, numel, shape):
    """Return a view of a source as a copy to a contiguous target, with the elements that it reads."""
    places = VIEWS[view](torch.arange(numel).view(shape))
    if not places.numel():
        return None
    box = Box(tuple(places.shape), tuple(places.stride()), contiguous(places.shape))
    return Piece(0, box, places.storage_offset(), 0), places.reshape(-1)


def contiguous(shape):
    return tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]


Written = dict[int, dict[int, float]]
"""The value of each element that is written, by tensor and element."""


def put(written: dict[int, float], element: int, value: float) -> None:
    assert element not in written, f"element {element} is written twice"
    written[element] = value


def pairs(box: Box, source_offset: int, target_offset: int) -> list[tuple[int, int]]:
    """Return the source and target elements of everything that a copy moves."""
    return [
        (
            source_offset + sum(i * s for i, s in zip(index, box.source_strides, strict=True)),
            target_offset + sum(i * s for i, s in zip(index, box.target_strides, strict=True)),
        )
        for index in itertools.product(*map(range, box.shape))
    ]


def filled(file: File, reads: Iterable[Read], nbytes: int) -> tuple[bytearray, np.ndarray]:
    """Return memory after its reads, and the mask of its used bytes. Reads must stay inside of it and not overlap."""
    memory, in_use = bytearray(b"\xa5" * nbytes), np.zeros(nbytes, bool)
    for _, offset, length, _, start in reads:
        use(in_use, start, length)
        memory[start : start + length] = file.data[offset : offset + length]
    return memory, in_use


def use(in_use: np.ndarray, start: int, nbytes: int) -> None:
    """Mark bytes of a memory as used; they must be free."""
    assert 0 <= start <= start + nbytes <= len(in_use)
    assert not in_use[start : start + nbytes].any()
    in_use[start : start + nbytes] = True


def scale_at(memory: bytearray, start: int, dtype: str, index: int) -> float:
    if dtype == "U8":
        return E8M0_VALUES[memory[start + index]]
    if dtype == "BF16":
        raw = int.from_bytes(memory[start + 2 * index : start + 2 * index + 2], "little") << 16
        return float(np.uint32(raw).view(np.float32))
    return float(np.frombuffer(bytes(memory[start + 4 * index : start + 4 * index + 4]), np.float32)[0])


def quotient(common: float, divisor: float) -> float:
    return float(np.float32(common) / np.float32(divisor))


def number_at(memory: bytearray, start: int, column: int, code_format: str, zero: int | None) -> float:
    """Return the value of a code, less its zero point, in a row of codes that starts at a byte."""
    if CODE_BITS[code_format] == 8:
        return CODE_VALUES[code_format][memory[start + column]]
    code = memory[start + column // 2] >> 4 * (column % 2) & 15
    return CODE_VALUES[code_format][code] if zero is None else float(code - zero)


def zero_at(memory: bytearray, start: int, columns: int, row: int, column: int, packing: ZeroPacking) -> int:
    """Return a zero point of a grid with so many columns."""
    if packing.by_columns:
        at, nibble = start + 4 * (row * -(-columns // 8) + column // 8), column % 8
    else:
        at, nibble = start + 4 * (row // 8 * columns + column), row % 8
    word = int.from_bytes(memory[at : at + 4], "little") + packing.added
    return word >> 4 * nibble & 15


def stored_column(column: int, word: tuple[int, ...]) -> int:
    """Return the column of the stored scale of a column of blocks; a word has two axes."""
    if not word:
        return column
    outer, inner = word
    first, (h, j) = column // (outer * inner) * outer * inner, divmod(column % (outer * inner), outer)
    return first + j * inner + h


def run_job(file: File, job: ReadAndCopy, written: Written) -> None:
    """Run a job of the host schedule whose values are F32."""
    (memory, in_use), values = filled(file, job.reads.one_by_one(), job.scratch_bytes), {}
    for rectangle in job.rectangles:
        decode, scales, zeros = rectangle.decode, rectangle.scales, rectangle.zero_points
        assert rectangle.values_bytes % 4 == 0
        common = 1.0 if rectangle.global_bytes is None else scale_at(memory, rectangle.global_bytes, "F32", 0)
        if rectangle.has_divisor:
            common = quotient(common, scale_at(memory, rectangle.global_bytes, "F32", 1))
        for row, column in np.ndindex(rectangle.shape):
            block_row = rectangle.block_row + (rectangle.start[0] + row) // decode.block[0]
            block_column = rectangle.block_column + (rectangle.start[1] + column) // decode.block[1]
            assert 0 <= block_row < scales.shape[0]
            assert 0 <= block_column < scales.shape[1]
            zero = None
            if zeros is not None:
                zero_row, packing = rectangle.zero_row + block_row, decode.zero_packing
                zero = zero_at(memory, zeros.start_bytes, scales.shape[1], zero_row, block_column, packing)
                assert zeros.shape[1] == packing.columns(scales.shape[1])
            index = block_row * scales.shape[1] + stored_column(block_column, decode.scale_word)
            scale = scale_at(memory, scales.start_bytes, scales.dtype, index)
            start = rectangle.codes_bytes + row * rectangle.codes_stride
            element = rectangle.values_bytes // 4 + row * rectangle.values_stride + column
            use(in_use, 4 * element, 4)
            put(values, element, number_at(memory, start, column, decode.format, zero) * scale * common)
    for copies in job.copies:
        for source_offset, target_offset in zip(copies.source_offsets, copies.target_offsets, strict=True):
            for source, target in pairs(copies.box, source_offset, target_offset):
                put(written.setdefault(copies.target, {}), target, values[source])


def run_window(file: File, window: CodeWindow, written: Written) -> None:
    """Run a window whose values are F32."""
    (memory, in_use), values = filled(file, window.reads, window.nbytes), {}
    for group in window.groups.values():
        use(in_use, group.table_rows_bytes, 0 if group.kind.scale_is_table_row else 4 * group.count)
        use(in_use, group.table_bytes, group.table_rows * group.kind.row_bytes)
    for rectangle, positions in window.rectangles.items():
        group = window.groups[rectangle.kind]
        for position in positions:
            for row, column in np.ndindex(rectangle.shape):
                block_row = (rectangle.start[0] + row) // rectangle.block[0]
                block_column = (rectangle.start[1] + column) // rectangle.block[1]
                index = position.scale + block_row * rectangle.scales_stride + block_column
                start = position.codes_bytes + row * rectangle.codes_stride
                number = number_at(
                    memory, start, column, group.kind.format, _zero_of(memory, group, position.source, index)
                )
                element = position.target_offset
                element += row * rectangle.target_strides[0] + column * rectangle.target_strides[1]
                if rectangle.in_window:
                    use(in_use, 4 * element, 4)
                into = values if rectangle.in_window else written.setdefault(position.target, {})
                assert 0 <= index < group.count
                put(
                    into,
                    element,
                    number
                    * scale_at(memory, group.scales_bytes, group.kind.scale_dtype, _stored_index(group, index))
                    * _common_of(memory, group, position.source),
                )
    for move in window.moves:
        for source, target in pairs(move.box, move.source_offset, move.target_offset):
            put(written.setdefault(move.target, {}), target, values[source])


def _zero_of(memory: bytearray, group: ScaleGroup, source: int, index: int) -> int | None:
    if group.kind.zero_points is None or group.kind.grid is None:
        return None
    packed_rows, first = group.kind.zero_points
    rows, columns = group.kind.grid
    row, column = divmod(index - source * rows * columns, columns)
    start = group.zero_points_bytes + 4 * source * packed_rows * group.kind.zero_packing.columns(columns)
    return zero_at(memory, start, columns, first + row, column, group.kind.zero_packing)


def _stored_index(group: ScaleGroup, index: int) -> int:
    """Return the index of the stored scale of a block. Words never continue in the next row of blocks."""
    return stored_column(index, group.kind.scale_word)


def _common_of(memory: bytearray, group: ScaleGroup, source: int) -> float:
    common = scale_at(memory, group.globals_bytes, "F32", source) if group.kind.has_global else 1.0
    if group.kind.has_divisor:
        return quotient(common, scale_at(memory, group.globals_bytes, "F32", group.sources + source))
    return common


class Case:
    """Sources of one file, the moves out of them, and the values that the moves must write."""

    def __init__(self, seed: int = 0):
        self.file = File()
        self.decodes: dict[int, Decode] = {}
        self.moves: dict[int, list[Move]] = {}
        self.expected: Written = {}
        self._random = np.random.default_rng(seed)

    def add(self, views: Sequence[str], **source: Any) -> int:
        """Add a source and a move for each of ``views``; return its row."""
        defaults = dict(code_format="e4m3", matrices=1, rows=4, columns=8, block=(2, 4), scales="F32")
        source = defaults | dict(zero_points=False, has_global=False) | source
        row, decode, numbers = add_source(self.file, self._random, f"s{len(self.decodes)}", **source)
        shape = source["matrices"], source["rows"], source["columns"]
        self.decodes[row], self.moves[row] = decode, []
        for view in views:
            view_taken = taken(view, prod(shape), shape)
            if view_taken is not None:
                piece, order = view_taken
                target = len(self.expected)
                self.moves[row].append(Move(target, "F32", piece.box, piece.source_offset, 0))
                self.expected[target] = dict(enumerate(numbers[order.numpy()].tolist()))
        return row
