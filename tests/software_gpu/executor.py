"""Launches run as a GPU would run them, on host memory, after a check of every promise to the kernels.

Each kernel does what its docstring in ``kernels/`` states, element by element. The Triton code does not run.
The input is what a kernel gets: the variant, the grid, the table, and the integers, which are counted in vectors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from automodel_conv.kernels.dequantize import Blocks, DequantizeConstants
from automodel_conv.kernels.variants import Geometry, Variant
from tests.software_gpu.accesses import Box, GpuFault, array_at, conflict
from tests.software_gpu.memory import Allocations, Touched

_NUMPY = {
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "int32": np.int32,
    "float16": np.uint16,
    "bfloat16": np.uint16,
    "float32": np.uint32,
}
_CASTABLE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SIGNED = {2: torch.int16, 4: torch.int32}
_INT32 = 2**31
_MOST_ROWS = 65535  # the second dimension of a CUDA grid
_MOST_PROGRAMS = _INT32 - 1


def demand(holds: object, variant: Variant, what: str) -> None:
    if not holds:
        raise GpuFault(f"{variant.kernel}: {what}; {variant}")


def size_of(name: str) -> int:
    return np.dtype(_NUMPY[name]).itemsize


def as_kernels_count(variant: Variant, integers: tuple[int, ...]) -> Geometry:
    """Return the geometry that a kernel computes from its integers, which come in vectors."""
    takes = 4 + (len(Blocks._fields) if _decoding(variant) else 0)
    demand(len(integers) == takes == variant.kernel.integers, variant, f"takes {takes} integers, gets {len(integers)}")
    for number in integers:
        demand(type(number) is int and 0 <= number < _INT32, variant, f"{number} is no int32, so another compilation")
    rows, columns, src_stride, dst_stride = integers[:4]
    decoding = _decoding(variant)
    in_vectors = decoding.is_transposed if decoding else variant.kernel.name != "copy_tiles"
    rows *= variant.dst_vector if in_vectors else 1
    src_stride *= 2 if variant.pairs and variant.kernel.name == "deinterleave_tiles" else 1
    dst_stride *= 2 if variant.pairs and variant.kernel.name == "interleave_tiles" else 1
    blocks = Blocks(*integers[4:]) if decoding else None
    return Geometry(
        rows, columns * variant.src_vector, src_stride * variant.src_vector, dst_stride * variant.dst_vector, blocks
    )


def promised_bytes(variant: Variant) -> list[int]:
    """Return the promised divisor of the addresses of each column of a table."""
    destinations, operands = variant.kernel.destinations, variant.kernel.operands
    written = variant.dst_vector * size_of(variant.dst) * (2 if _pairs(variant, "interleave_tiles") else 1)
    read = variant.src_vector * size_of(variant.src) * (2 if _pairs(variant, "deinterleave_tiles") else 1)
    decoding = _decoding(variant)
    if decoding:
        return [written, read, size_of(decoding.table_row), size_of(variant.dst)]
    return [written] * destinations + [1 if variant.bytewise else read] * (operands - destinations)


def _pairs(variant: Variant, kernel: str) -> bool:
    return variant.pairs and variant.kernel.name == kernel


def _decoding(variant: Variant) -> DequantizeConstants | None:
    return variant.details if isinstance(variant.details, DequantizeConstants) else None


class Executor:
    """A replacement for ``launch.queue``.

    Attributes:
        variants: all variants that were launched.
        launches: number of launches.
        compiled_ahead: variants that were launched with placeholder integers, only to be compiled.
    """

    def __init__(self, memory: Allocations):
        self.memory = memory
        self.variants: set[Variant] = set()
        self.compiled_ahead: set[Variant] = set()
        self.launches = 0
        self._thread = threading.local()

    @contextmanager
    def compiling_ahead(self) -> Iterator[None]:
        """Treat launches of this thread as compilation only."""
        self._thread.is_compiling = True
        try:
            yield
        finally:
            self._thread.is_compiling = False

    @property
    def _is_compiling(self) -> bool:
        return getattr(self._thread, "is_compiling", False)

    def launch(
        self, variant: Variant, grid: tuple[int, int], table: Tensor, integers: tuple[int, ...]
    ) -> list[Touched]:
        """Check a launch and run it. Return the boxes that it touched.

        Raises:
            GpuFault: it breaks a promise, touches a byte outside of every tensor, or writes a byte that it also touches
            otherwise.
        """
        geometry = as_kernels_count(variant, integers)
        addresses = self._checked_table(variant, grid, table, geometry)
        _check_offsets(variant, geometry)
        touched = self.memory.check(list(_boxes(variant, geometry, addresses)))
        if _decoding(variant):
            touched += self._lookups(variant, geometry, geometry.details, addresses)
        shared = conflict([box for box, _ in touched])
        demand(shared is None, variant, str(shared))
        (self.compiled_ahead if self._is_compiling else self.variants).add(variant)
        self.launches += 1
        for row in addresses.tolist():
            if _decoding(variant):
                _decode(variant, geometry, geometry.details, row)
            else:
                _move(variant, geometry, row)
        return touched

    def _checked_table(self, variant: Variant, grid: tuple[int, int], table: Tensor, geometry: Geometry) -> np.ndarray:
        demand(table.dtype == torch.int64 and table.is_contiguous(), variant, "takes a contiguous table of int64")
        expected = grid[1], variant.kernel.operands
        demand(tuple(table.shape) == expected, variant, f"takes a table {expected}, gets {list(table.shape)}")
        tiles = -(-geometry.rows // variant.tile_rows) * -(-geometry.columns // variant.tile_columns)
        demand(grid[0] == tiles > 0, variant, f"needs {tiles} programs for a matrix, gets {grid[0]}; {geometry}")
        demand(0 < grid[1] <= _MOST_ROWS and grid[0] * grid[1] <= _MOST_PROGRAMS, variant, f"the grid is {grid}")
        addresses = table.numpy().copy()
        for column, promise in enumerate(promised_bytes(variant)):
            off = addresses[:, column] % promise != 0
            if off.any():
                address = int(addresses[off, column][0])
                demand(False, variant, f"promises {promise} bytes for operand {column}, which is at {address:#x}")
        return addresses

    def _lookups(self, variant: Variant, geometry: Geometry, blocks: Blocks, addresses: np.ndarray) -> list[Touched]:
        """Check the look-ups of ``dequantize_tiles``: every vector of codes reads one table row."""
        decoding = _decoding(variant)
        assert decoding is not None
        demand(decoding.is_stepped or blocks.step == 1, variant, f"elements of a row are {blocks.step} apart")
        columns = _of_columns(variant, geometry, blocks)
        vectors = columns.reshape(-1, _codes_of_vector(variant))
        if not self._is_compiling:
            demand((vectors == vectors[:, :1]).all(), variant, f"a vector of codes spans two blocks: {geometry}")
        rows = _of_rows(variant, geometry, blocks)
        stride = blocks.table_rows_stride
        last = int(rows[-1]) * stride + int(columns[-1])
        demand(self._is_compiling or columns[-1] < stride, variant, f"a stride of {stride} table rows is too short")
        size = size_of(decoding.table_row)
        table_rows = Box("grid of table rows", addresses[:, 2], (1, last + 1), (0, size), size, False)
        looked_up = self.memory.check([table_rows])
        highest = []
        for row in addresses.tolist():
            read_rows = array_at(row[2], (last + 1,), (size,), _NUMPY[decoding.table_row])
            read_rows = read_rows[np.unique(rows)[:, None] * stride + np.unique(columns)]
            demand(read_rows.min() >= 0, variant, "a table row is negative")
            highest.append(int(read_rows.max()))
        demand(max(highest) + 1 << decoding.bits < _INT32, variant, f"table row {max(highest)} is beyond 32 bits")
        size = size_of(variant.dst)
        values = [
            Box("table of values", addresses[n : n + 1, 3], (1, most + 1 << decoding.bits), (0, size), size, False)
            for n, most in enumerate(highest)
        ]
        return looked_up + self.memory.check(values)


def _boxes(variant: Variant, geometry: Geometry, addresses: np.ndarray) -> Iterator[Box]:
    """Yield the boxes that all programs of a launch touch, in the order of the table, except table rows and values."""
    rows, columns, src_stride, dst_stride, blocks = geometry
    src, dst = size_of(variant.src), size_of(variant.dst)
    twice = 2 if variant.kernel.name == "deinterleave_tiles" else 1
    written = {
        "copy_tiles": (rows, columns),
        "transpose_tiles": (columns, rows),
        "interleave_tiles": (columns, 2 * rows),
        "deinterleave_tiles": (columns, rows),
        "dequantize_tiles": (rows, columns),
    }[variant.kernel.name]
    step, decoding = 1, _decoding(variant)
    if decoding:
        values = columns * 8 // decoding.bits
        written = (values, rows) if decoding.is_transposed else (rows, values)
        step = blocks.step if decoding.is_stepped else 1
    destinations, operands = variant.kernel.destinations, variant.kernel.operands
    for column in range(destinations):
        yield Box(f"destination {column}", addresses[:, column], written, (dst_stride * dst, step * dst), dst, True)
    for column in range(destinations, 2 if decoding else operands):
        shape, strides = (rows, twice * columns), (src_stride * src, src)
        yield Box(f"source {column - destinations}", addresses[:, column], shape, strides, src, False)


def _check_offsets(variant: Variant, geometry: Geometry) -> None:
    """Check that tiles begin at whole vectors, and that offsets within a tile fit 32 bits."""
    rows, columns = min(geometry.rows, variant.tile_rows), min(geometry.columns, variant.tile_columns)
    tile_columns, tile_rows = variant.tile_columns, variant.tile_rows
    decoding = _decoding(variant)
    written_by_columns = variant.kernel.name == "copy_tiles" or (decoding and not decoding.is_transposed)
    demand(tile_columns % variant.src_vector == 0, variant, "a tile ends within a vector that is read")
    values = tile_columns * 8 // decoding.bits if decoding else tile_columns
    demand(
        (values if written_by_columns else tile_rows) % variant.dst_vector == 0, variant, "a tile ends within a vector"
    )
    size = size_of(variant.src) if variant.bytewise else 1
    twice = 2 if variant.kernel.name in ("interleave_tiles", "deinterleave_tiles") else 1
    read = (rows * geometry.src_stride + twice * columns) * size
    if decoding:
        values = columns * 8 // decoding.bits
        lines, run = (values, rows) if decoding.is_transposed else (rows, values)
        written = lines * geometry.dst_stride + run * geometry.details.step
    elif variant.kernel.name == "copy_tiles":
        written = rows * geometry.dst_stride + columns
    else:
        written = columns * geometry.dst_stride + twice * rows
    demand(max(read, written) < _INT32, variant, f"offsets within a tile do not fit 32 bits: {geometry}")


def _move(variant: Variant, geometry: Geometry, row: list[int]) -> None:
    rows, columns, src_stride, dst_stride, _ = geometry
    src, dst = size_of(variant.src), size_of(variant.dst)

    def read(address: int, width: int = columns) -> np.ndarray:
        return array_at(address, (rows, width), (src_stride * src, src), _NUMPY[variant.src])

    def write(address: int, shape: tuple[int, int]) -> np.ndarray:
        return array_at(address, shape, (dst_stride * dst, dst), _NUMPY[variant.dst])

    if variant.kernel.name == "copy_tiles":
        write(row[0], (rows, columns))[...] = _cast(variant, read(row[1]))
    elif variant.kernel.name == "transpose_tiles":
        write(row[0], (columns, rows))[...] = _cast(variant, read(row[1])).T
    elif variant.kernel.name == "interleave_tiles":
        for half in (0, 1):
            write(row[0], (columns, 2 * rows))[:, half::2] = _cast(variant, read(row[1 + half])).T
    elif variant.kernel.name == "deinterleave_tiles":
        for half in (0, 1):
            write(row[half], (columns, rows))[...] = _cast(variant, read(row[2], 2 * columns)[:, half::2]).T
    else:
        raise GpuFault(f"no such kernel: {variant}")


def _cast(variant: Variant, values: np.ndarray) -> np.ndarray:
    """Cast through float32, to nearest even, as the kernels do."""
    if variant.src == variant.dst:
        return values
    bits = torch.from_numpy(np.ascontiguousarray(values).view(f"i{values.itemsize}"))
    converted = bits.view(_CASTABLE[variant.src]).to(torch.float32).to(_CASTABLE[variant.dst])
    return converted.view(_SIGNED[converted.itemsize]).numpy().view(_NUMPY[variant.dst])


def _of_rows(variant: Variant, geometry: Geometry, blocks: Blocks) -> np.ndarray:
    rows = np.arange(geometry.rows) + blocks.start_row
    return rows >> blocks.block_rows if variant.details.by_shifts else rows // blocks.block_rows


def _of_columns(variant: Variant, geometry: Geometry, blocks: Blocks) -> np.ndarray:
    """Return the block of each code of a row."""
    column = np.arange(geometry.columns * 8 // variant.details.bits) + blocks.start_column
    return column >> blocks.block_columns if variant.details.by_shifts else column // blocks.block_columns


def _codes_of_vector(variant: Variant) -> int:
    """Return the number of codes that one look-up of a table row is for."""
    return 1 if variant.src_vector == 1 else variant.src_vector * 8 // variant.details.bits


def _decode(variant: Variant, geometry: Geometry, blocks: Blocks, row: list[int]) -> None:
    decoding = _decoding(variant)
    assert decoding is not None
    rows, columns, src_stride, dst_stride, _ = geometry
    size = size_of(variant.dst)
    codes = array_at(row[1], (rows, columns), (src_stride, 1), np.uint8)
    block_rows, block_columns = _of_rows(variant, geometry, blocks), _of_columns(variant, geometry, blocks)
    vector = _codes_of_vector(variant)
    block_columns = block_columns.reshape(-1, vector)[:, :1].repeat(vector, 1).reshape(-1)
    last = int(block_rows[-1]) * blocks.table_rows_stride + int(block_columns[-1])
    table_rows = array_at(row[2], (last + 1,), (size_of(decoding.table_row),), _NUMPY[decoding.table_row])
    first = table_rows[block_rows[:, None] * blocks.table_rows_stride + block_columns].astype(np.int64) << decoding.bits
    values = array_at(row[3], (int(first.max()) + (1 << decoding.bits),), (size,), _NUMPY[variant.dst])
    if decoding.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], 2).reshape(rows, -1)
    decoded = values[first + codes]
    strides = (dst_stride * size, (blocks.step if decoding.is_stepped else 1) * size)
    decoded = decoded.T if decoding.is_transposed else decoded
    array_at(row[0], decoded.shape, strides, _NUMPY[variant.dst])[...] = decoded
