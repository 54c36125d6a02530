"""From matrices to launches: which compiled variant fits which addresses, and starting them."""

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

_MAX_ROWS = 65535  # of a table in one launch: the second dimension of a CUDA grid
_INT32 = 2**31
_COMPILING = threading.Lock()
_MAX_PROGRAMS = _INT32 - 1  # in one launch: Triton's launchers multiply in 32 bits, and skip a grid that overflows
MAX_STRIDE = 2**19
"""Elements: every variant of every verb takes steps between rows up to this, and rows up to this long."""
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""What all kernels are compiled with."""


def check_operands(verb: str, operands: dict[str, Matrices], shapes: dict[str, tuple[int, int]]) -> None:
    """All operands are as many, on one device, and of the shapes given.

    Raises:
        ConversionError: names the operand that differs.
    """
    first = next(iter(operands.values()))
    for name, matrices in operands.items():
        expected = (len(first.addresses), shapes[name], first.device)
        found = (len(matrices.addresses), matrices.shape, matrices.device)
        if found != expected and (expected[0] or found[0]):
            raise ConversionError(
                message(
                    f"the operands of {verb} do not fit together",
                    where=name,
                    expected=f"{expected[0]} of {list(expected[1])} on {expected[2]}",
                    found=f"{found[0]} of {list(found[1])} on {found[2]}",
                )
            )


def check_same_kind(names: str, first: Matrices, second: Matrices) -> None:
    """Both have one dtype and one row stride.

    Raises:
        ConversionError: they do not.
    """
    kinds = [(m.dtype, m.row_stride) for m in (first, second)]
    if kinds[0] != kinds[1] and len(first.addresses):
        raise ConversionError(
            message(
                f"{names} are not of one kind",
                expected=f"{kinds[0][0]}, row stride {kinds[0][1]}",
                found=f"{kinds[1][0]}, row stride {kinds[1][1]}",
            )
        )


def check_destination(verb: str, dst: Matrices) -> None:
    """Elements of the destination lie at multiples of their size.

    Raises:
        ConversionError: names the first address that does not.
    """
    if np.bitwise_or.reduce(dst.addresses) % dst.dtype.itemsize:
        index = int((dst.addresses % dst.dtype.itemsize != 0).argmax())
        raise ConversionError(
            message(
                f"{verb} writes whole elements",
                where=f"destination {index}",
                expected=f"an address that {dst.dtype.itemsize} divides",
                found=f"{int(dst.addresses[index]):#x}",
            )
        )


@cache
def why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of this device; None where they can."""
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

    # Where Triton looks: for its driver, and for launchers of each signature, which the former may do without.
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton finds no C compiler; it looks for {' and '.join(compilers)}"
    try:
        driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError) as error:
        # No headers of Python, no libcuda.so that a linker finds, no GPU: found out by trying only.
        return f"Triton's driver does not load: {error}"
    return None


class Launch(NamedTuple):
    """Rows ``start`` to ``stop`` of a table, all moved by one compiled variant."""

    variant: Variant
    geometry: Geometry
    start: int
    stop: int


class Launches(NamedTuple):
    """What a call of a verb will launch: a table of addresses, destinations first, and which rows go how."""

    table: np.ndarray  # int64 [n, operands], in bytes
    launches: tuple[Launch, ...]
    device: torch.device

    @property
    def variants(self) -> frozenset[Variant]:
        return frozenset(launch.variant for launch in self.launches)


NO_LAUNCHES = Launches(np.empty((0, 0), np.int64), (), torch.device("cpu"))


def launches_by_alignment(
    operands: Sequence[Matrices],
    dst_count: int,
    choose: Callable[[int, int], tuple[Variant, Geometry]],
    others: Sequence[Matrices] = (),
) -> Launches:
    """Rows of addresses ordered by the variant that their alignment needs.

    Args:
        operands: columns of the table, the ``dst_count`` destinations first.
        choose: what to launch for an alignment of the destinations and one of the sources, in bytes.
        others: further columns, read element by element, so that their alignment is of no account.

    Raises:
        ConversionError: a matrix too large for the arithmetic of a tile.
    """
    columns = (*operands, *others)
    table = np.empty((len(operands[0].addresses), len(columns)), np.int64)
    for number, operand in enumerate(columns):
        table[:, number] = operand.addresses
    sides = operands[:dst_count], operands[dst_count:]
    steps = [reduce(or_, (operand.steps_bytes for operand in side)) for side in sides]
    best = [alignment(step) for step in steps]
    if best == [alignment(step | _all_bits(side)) for step, side in zip(steps, sides, strict=True)]:
        # No address is worse than rows and strides are: one launch, and nothing to sort.
        kind = choose(*best)
        tile_count(*kind)
        return Launches(table, (Launch(*kind, 0, len(table)),), operands[0].device)
    kinds, of_row = _assign(table[:, : len(operands)], dst_count, steps, choose)
    for kind in kinds:
        tile_count(*kind)
    order = np.argsort(of_row, kind="stable")
    bounds = np.searchsorted(of_row[order], np.arange(len(kinds) + 1)).tolist()
    launches = tuple(Launch(*kind, *bounds[n : n + 2]) for n, kind in enumerate(kinds))
    return Launches(table[order], launches, operands[0].device)


def start(*works: Launches) -> None:
    """Queue launches on the current stream, in this order; uploads all their tables at once.

    Raises:
        ConversionError: they are for several devices; nothing is queued then.
        UnsupportedError: kernels cannot run here.
    """
    works = tuple(work for work in works if work.launches)
    if not works:
        return
    device = _one_device(works)
    reason = why_not(device)
    if reason is not None:
        raise UnsupportedError(message(f"Triton kernels cannot run: {reason}", do='use backend="torch"'))
    scope = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with scope:
        for work, table in zip(works, _uploaded([work.table for work in works], device), strict=True):
            for variant, geometry, first, stop in work.launches:
                tiles = tile_count(variant, geometry)
                most = min(_MAX_ROWS, _MAX_PROGRAMS // tiles)
                for at in range(first, stop, most):
                    rows = table if stop - first == len(table) <= most else table[at : min(stop, at + most)]
                    queue(variant, (tiles, len(rows)), rows, variant.kernel.in_vectors(variant, geometry))


def queue(variant: Variant, grid: tuple[int, int], table: Tensor, integers: tuple[int, ...]) -> None:
    """Queue one launch of a kernel on the current stream."""
    kernel = variant.kernel
    kernel.function[grid](table, *integers, **kernel.constants(variant), **OPTIONS)


def _uploaded(tables: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    if len(tables) == 1:
        return [upload(tables[0], device)]
    together = upload(np.concatenate([table.reshape(-1) for table in tables]), device)
    parts = together.split([table.size for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def _one_device(works: Sequence[Launches]) -> torch.device:
    device = works[0].device
    if any(work.device != device for work in works[1:]):
        raise ConversionError(
            message(
                "launches of several devices are started apart",
                expected="one device",
                found=", ".join(sorted({str(work.device) for work in works})),
            )
        )
    return device


def compile_ahead(variants: Iterable[Variant], device: torch.device) -> None:
    """Compile variants and load them onto a device, by one launch each that moves a vector from scratch to scratch.

    One thread at a time does so: loads to several devices share Triton's caches.
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
    """All addresses, or-ed: a number that is aligned as the worst of them is."""
    return reduce(or_, (int(np.bitwise_or.reduce(operand.addresses)) for operand in side))


def _assign(
    table: np.ndarray,
    dst_count: int,
    steps: Sequence[int],
    choose: Callable[[int, int], tuple[Variant, Geometry]],
) -> tuple[list[tuple[Variant, Geometry]], np.ndarray]:
    """The launches that the rows of a table need, and which of them each row takes.

    Args:
        table: of operands only, whose alignment matters.
        steps: of the destinations and of the sources, a number with the alignment of what their matrices step by.
    """
    dst_alignment, src_alignment = (
        alignment(np.bitwise_or.reduce(columns, axis=1) | step)
        for columns, step in zip((table[:, :dst_count], table[:, dst_count:]), steps, strict=True)
    )
    known: dict[tuple[Variant, Geometry], int] = {}
    codes = dst_alignment * (2 * MAX_ACCESS_BYTES) + src_alignment
    of_row = np.empty(len(table), np.int64)
    for code in np.unique(codes).tolist():
        of_row[codes == code] = known.setdefault(choose(*divmod(code, 2 * MAX_ACCESS_BYTES)), len(known))
    return list(known), of_row


@lru_cache(maxsize=1024)
def tile_count(variant: Variant, geometry: Geometry) -> int:
    """How many tiles a matrix has, if offsets within one, in elements and in bytes, fit 32 bits."""
    rows, columns = variant.tile_rows, variant.tile_columns
    tiles = -(-geometry.rows // rows) * -(-geometry.columns // columns)
    lines, run, *begin = variant.kernel.reach(variant, geometry)
    ends = begin[0] + geometry.rows + rows, begin[1] + geometry.columns + columns
    # 8 bytes are a pair of the widest elements.
    reach = 8 * (max(rows * geometry.src_stride, lines * geometry.dst_stride) + max(run, rows, columns))
    if max(reach, tiles, *ends) >= _INT32:
        raise ConversionError(
            message(
                "a matrix is too large for one call",
                expected=f"tiles of {rows} x {columns} elements that span less than 2**31 bytes",
                found=f"{geometry}",
                do="cut it into narrower ones",
            )
        )
    return tiles
