"""Launches of kernels: choose the compiled variant for each address, and start the launches."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache, reduce
from operator import or_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.kernels.address_table import MAX_ACCESS_BYTES, Matrices, alignment
from automodel_conv.kernels.staging import upload
from automodel_conv.kernels.variants import Geometry, Variant

_MAX_ROWS = 65535  # rows of a table in one launch: the limit of the second dimension of a CUDA grid
_INT32 = 2**31
_COMPILING = threading.Lock()
# Programs in one launch. Triton's launchers multiply in 32 bits and skip a grid that overflows.
_MAX_PROGRAMS = _INT32 - 1
MAX_STRIDE = 2**19
"""Largest row stride and longest row, in elements, that every variant of every verb supports."""
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""Compile options of all kernels."""


def check_operands(verb: str, operands: dict[str, Matrices], shapes: dict[str, tuple[int, int]]) -> None:
    """Check that all operands have the same count and device, and the shapes given.

    Raises:
        ConversionError: an operand differs; the error names it.
    """
    first = next(iter(operands.values()))
    for name, matrices in operands.items():
        expected = (len(first.addresses), shapes[name], first.device)
        actual = (len(matrices.addresses), matrices.shape, matrices.device)
        if actual != expected and (expected[0] or actual[0]):
            raise ConversionError(
                message(
                    f"the operands of {verb} do not fit together",
                    where=name,
                    expected=f"{expected[0]} matrices {list(expected[1])} on {expected[2]}",
                    found=f"{actual[0]} matrices {list(actual[1])} on {actual[2]}",
                )
            )


def check_same_kind(names: str, first: Matrices, second: Matrices) -> None:
    """Check that two operands have the same dtype and row stride.

    Raises:
        ConversionError: they differ.
    """
    kinds = [(m.dtype, m.row_stride) for m in (first, second)]
    if kinds[0] != kinds[1] and len(first.addresses):
        raise ConversionError(
            message(
                f"{names} differ in dtype or row stride",
                expected=f"{kinds[0][0]}, row stride {kinds[0][1]}",
                found=f"{kinds[1][0]}, row stride {kinds[1][1]}",
            )
        )


def check_destination(verb: str, dst: Matrices) -> None:
    """Check that the destination's elements are at multiples of their size.

    Raises:
        ConversionError: an address is not a multiple; the error names the first.
    """
    if np.bitwise_or.reduce(dst.addresses) % dst.dtype.itemsize:
        index = int((dst.addresses % dst.dtype.itemsize != 0).argmax())
        raise ConversionError(
            message(
                f"{verb} writes only to multiples of the element size",
                where=f"destination {index}",
                expected=f"an address that is a multiple of {dst.dtype.itemsize}",
                found=f"{int(dst.addresses[index]):#x}",
            )
        )


@cache
def why_not(device: torch.device) -> str | None:
    """Return why kernels cannot run on tensors of this device; None if they can."""
    from automodel_conv.kernels.jit import INTERPRETED, IS_INSTALLED

    if not IS_INSTALLED:
        return "triton is not installed"
    if INTERPRETED and device.type != "cpu":
        return "Triton's interpreter is on, which reads host memory"
    if not INTERPRETED and device.type != "cuda":
        return f"tensors on {device.type} need Triton's interpreter, which is off"
    return None if INTERPRETED else _why_no_driver()


def _why_no_driver() -> str | None:
    from triton.runtime import driver

    # Triton needs one of these compilers for its driver and for each launcher. Its driver may load without one.
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton does not find a C compiler; it looks for {' and '.join(compilers)}"
    try:
        driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError) as error:
        # No Python headers, no libcuda.so that a linker finds, or no GPU: only an attempt can show it.
        return f"Triton's driver does not load: {error}"
    return None


class Launch(NamedTuple):
    """Rows ``start`` to ``stop`` of a table, which one compiled variant moves."""

    variant: Variant
    geometry: Geometry
    start: int
    stop: int


class Launches(NamedTuple):
    """The launches of one call of a verb, and the table of addresses that they share."""

    table: np.ndarray  # int64 [n, operands], addresses in bytes, destinations first
    launches: tuple[Launch, ...]
    device: torch.device

    @property
    def variants(self) -> frozenset[Variant]:
        """The variants of all launches."""
        return frozenset(launch.variant for launch in self.launches)


NO_LAUNCHES = Launches(np.empty((0, 0), np.int64), (), torch.device("cpu"))


def launches_by_alignment(
    operands: Sequence[Matrices],
    dst_count: int,
    choose: Callable[[int, int], tuple[Variant, Geometry]],
    unaligned: Sequence[Matrices] = (),
) -> Launches:
    """Sort the rows of a table by the variant that their alignment needs, one launch for each variant.

    Args:
        operands: columns of the table, the ``dst_count`` destinations first.
        choose: returns the variant and geometry for an alignment of the destinations and one of the sources, in bytes.
        unaligned: further columns, which are read element by element, so their alignment does not matter.

    Raises:
        ConversionError: a matrix is too large for the arithmetic of a tile.
    """
    columns = (*operands, *unaligned)
    table = np.empty((len(operands[0].addresses), len(columns)), np.int64)
    for column, operand in enumerate(columns):
        table[:, column] = operand.addresses
    sides = operands[:dst_count], operands[dst_count:]
    steps = [reduce(or_, (operand.steps_bytes for operand in side)) for side in sides]
    best = [alignment(step) for step in steps]
    if best == [alignment(step | _all_bits(side)) for step, side in zip(steps, sides, strict=True)]:
        # No address is aligned worse than the rows and strides: one launch, and nothing to sort.
        choice = choose(*best)
        tile_count(*choice)
        return Launches(table, (Launch(*choice, 0, len(table)),), operands[0].device)
    choices, choice_of_row = _choose_by_row(table[:, : len(operands)], dst_count, steps, choose)
    for choice in choices:
        tile_count(*choice)
    order = np.argsort(choice_of_row, kind="stable")
    bounds = np.searchsorted(choice_of_row[order], np.arange(len(choices) + 1)).tolist()
    launches = tuple(Launch(*choice, *bounds[n : n + 2]) for n, choice in enumerate(choices))
    return Launches(table[order], launches, operands[0].device)


def start(*calls: Launches) -> None:
    """Queue the launches of several calls on the current stream, in this order; upload all their tables at once.

    Raises:
        ConversionError: the calls are for several devices. Nothing has been queued.
        UnsupportedError: kernels cannot run here.
    """
    calls = tuple(call for call in calls if call.launches)
    if not calls:
        return
    device = _single_device(calls)
    reason = why_not(device)
    if reason is not None:
        raise UnsupportedError(message(f"Triton kernels cannot run: {reason}", do='use backend="torch"'))
    scope = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with scope:
        for call, table in zip(calls, _upload_together([call.table for call in calls], device), strict=True):
            for variant, geometry, first, stop in call.launches:
                tiles = tile_count(variant, geometry)
                max_rows = min(_MAX_ROWS, _MAX_PROGRAMS // tiles)
                for row in range(first, stop, max_rows):
                    rows = table if stop - first == len(table) <= max_rows else table[row : min(stop, row + max_rows)]
                    queue(variant, (tiles, len(rows)), rows, variant.kernel.in_vectors(variant, geometry))


def queue(variant: Variant, grid: tuple[int, int], table: Tensor, integers: tuple[int, ...]) -> None:
    """Queue one launch of a kernel on the current stream."""
    kernel = variant.kernel
    kernel.function[grid](table, *integers, **kernel.constants(variant), **OPTIONS)


def _upload_together(tables: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    if len(tables) == 1:
        return [upload(tables[0], device)]
    together = upload(np.concatenate([table.reshape(-1) for table in tables]), device)
    parts = together.split([table.size for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def _single_device(calls: Sequence[Launches]) -> torch.device:
    device = calls[0].device
    if any(call.device != device for call in calls[1:]):
        raise ConversionError(
            message(
                "launches on several devices cannot be started together",
                expected="one device",
                found=", ".join(sorted({str(call.device) for call in calls})),
            )
        )
    return device


def compile_ahead(variants: Iterable[Variant], device: torch.device) -> None:
    """Compile variants and load them onto a device.

    Each variant is launched once and moves a vector from scratch to scratch. One thread at a time compiles, because
    loads to several devices share Triton's caches.
    """
    scope = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with _COMPILING, scope:
        scratch = torch.zeros(2, 1 << 13, dtype=torch.uint8, device=device)
        for variant in variants:
            kernel = variant.kernel
            row = [scratch[int(n >= kernel.destinations)].data_ptr() for n in range(kernel.operands)]
            table = upload(np.array([row], np.int64), device)
            queue(variant, (1, 1), table, (1,) * kernel.integers)


def _all_bits(side: Sequence[Matrices]) -> int:
    """Return the bitwise or of all addresses, which has the alignment of the worst of them."""
    return reduce(or_, (int(np.bitwise_or.reduce(operand.addresses)) for operand in side))


def _choose_by_row(
    table: np.ndarray,
    dst_count: int,
    steps: Sequence[int],
    choose: Callable[[int, int], tuple[Variant, Geometry]],
) -> tuple[list[tuple[Variant, Geometry]], np.ndarray]:
    """Return the variants and geometries that the rows of a table need, and the index of its choice for each row.

    Args:
        table: addresses of the operands that must be aligned.
        steps: two integers, with the alignment of the steps of all destinations and of all sources.
    """
    dst_alignment, src_alignment = (
        alignment(np.bitwise_or.reduce(columns, axis=1) | step)
        for columns, step in zip((table[:, :dst_count], table[:, dst_count:]), steps, strict=True)
    )
    choices: dict[tuple[Variant, Geometry], int] = {}
    alignments = dst_alignment * (2 * MAX_ACCESS_BYTES) + src_alignment
    choice_of_row = np.empty(len(table), np.int64)
    for both in np.unique(alignments).tolist():
        choice = choose(*divmod(both, 2 * MAX_ACCESS_BYTES))
        choice_of_row[alignments == both] = choices.setdefault(choice, len(choices))
    return list(choices), choice_of_row


@lru_cache(maxsize=1024)
def tile_count(variant: Variant, geometry: Geometry) -> int:
    """Return the number of tiles of a matrix.

    Raises:
        ConversionError: offsets within a tile, in elements or in bytes, do not fit 32 bits.
    """
    rows, columns = variant.tile_rows, variant.tile_columns
    tiles = -(-geometry.rows // rows) * -(-geometry.columns // columns)
    lines, run, *first = variant.kernel.reach(variant, geometry)
    ends = first[0] + geometry.rows + rows, first[1] + geometry.columns + columns
    # A pair of the widest elements has 8 bytes.
    reach = 8 * (max(rows * geometry.src_stride, lines * geometry.dst_stride) + max(run, rows, columns))
    if max(reach, tiles, *ends) >= _INT32:
        raise ConversionError(
            message(
                "a matrix is too large for one call",
                expected=f"tiles of {rows} x {columns} elements that span less than 2**31 bytes",
                found=f"{geometry}",
                do="split it into narrower matrices",
            )
        )
    return tiles
