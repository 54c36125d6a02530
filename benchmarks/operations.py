"""The operations on a layer's experts, as calls of the verbs on real shapes, with the expected result of each.

A ``Case`` owns its buffers. Its ways are equivalent: one call of a verb's kernel, one of its twin, or the usual code in
torch. ``verify`` compares a way with plain indexing, expert by expert, on a poisoned output.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automodel_conv.kernels.address_table import Matrices, as_matrices
from automodel_conv.testing import POISON

VERBS = ("strided_copy", "transpose", "interleave", "deinterleave")


@cache
def _found(verb: str, name: str) -> Callable[..., None]:
    return getattr(importlib.import_module(f"automodel_conv.kernels.{verb}"), name)


def _at_first_call(verb: str, name: str) -> Callable[..., None]:
    """Return a function of a verb's file that imports Triton on its first call."""

    def call(*operands: Any) -> None:
        _found(verb, name)(*operands)

    return call


KERNELS = {verb: _at_first_call(verb, verb) for verb in VERBS}
TWINS = {verb: _at_first_call(verb, f"{verb}_torch") for verb in VERBS}

Way = Callable[[], Tensor]
"""Runs the operation once more and returns the result, ``[E, ...]``. On a GPU it is queued, not finished."""


class Mismatch(Exception):
    """A way's result differs from that of plain indexing."""


class Experts(NamedTuple):
    """The experts of one layer: E, I, H.

    ``phase_bytes``: start of sources, past a multiple of 16 bytes.
    """

    name: str
    experts: int
    intermediate: int
    hidden: int
    note: str = ""
    phase_bytes: int = 0


class Case(NamedTuple):
    """One operation on one layer.

    ``operands`` are those of the verb, destinations first. Destinations are views of ``out`` ``[E, ...]`` and fill it.
    ``expected(e)`` computes ``out[e]`` by plain indexing. ``idiom`` computes all of it with stack, cat and transpose.
    """

    verb: str
    out: Tensor
    operands: tuple[list[Tensor], ...]
    expected: Callable[[int], Tensor]
    idiom: Way

    @property
    def bytes_moved(self) -> int:
        """Number of bytes read and written."""
        return sum(tensor.nbytes for operand in self.operands for tensor in operand)

    def kernel(self) -> Tensor:
        """Call the kernel as a user does: addresses are gathered and uploaded."""
        KERNELS[self.verb](*self.operands)
        return self.out

    def with_addresses(self) -> Way:
        """Return the kernel's call with addresses gathered beforehand.

        They are still uploaded.
        """
        matrices: list[Matrices] = [as_matrices("operand", operand) for operand in self.operands]

        def run() -> Tensor:
            KERNELS[self.verb](*matrices)
            return self.out

        return run

    def twin(self) -> Tensor:
        TWINS[self.verb](*self.operands)
        return self.out

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return views of equal shape.

        ``copy_`` between them has the same effect.
        """
        dst, *src = self.operands
        if self.verb == "strided_copy":
            return list(zip(dst, src[0], strict=True))
        if self.verb == "transpose":
            return [(d, s.t()) for d, s in zip(dst, src[0], strict=True)]
        if self.verb == "interleave":
            return [(d[:, k::2], s.t()) for k in (0, 1) for d, s in zip(dst, src[k], strict=True)]
        first, second, whole = self.operands
        return [(d, s[:, k::2].t()) for k, half in enumerate((first, second)) for d, s in zip(half, whole, strict=True)]

    def loop(self) -> Way:
        """Return a way that calls ``copy_`` from view to view."""
        pairs = self.pairs()

        def run() -> Tensor:
            for dst, src in pairs:
                dst.copy_(src)
            return self.out

        return run

    def foreach(self) -> Way:
        """Return a way that calls ``torch._foreach_copy_``.

        It accepts any strides, but only plain copies are fast.
        """
        dst, src = ([*side] for side in zip(*self.pairs(), strict=True))

        def run() -> Tensor:
            torch._foreach_copy_(dst, src)
            return self.out

        return run

    def verify(self, name: str, way: Way) -> None:
        """Run a way on a poisoned output and compare every byte.

        Raises:
            Mismatch: a byte differs; with the expert.
        """
        self.out.view(torch.uint8).fill_(POISON)
        result = way()
        for expert in range(len(self.out)):
            wanted = self.expected(expert)
            if result[expert].shape != wanted.shape or not torch.equal(_raw(result[expert]), _raw(wanted)):
                raise Mismatch(f"{name}: expert {expert} is not what plain indexing gives")


def random_matrices(
    count: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, phase_bytes: int = 0
) -> Tensor:
    """Return ``[count, rows, columns]`` of random bits without NaN (a cast may return any NaN for one)."""
    nbytes = count * rows * columns * dtype.itemsize
    quads = torch.empty(nbytes // 8 + 8, dtype=torch.int64, device=device)
    quads.random_(-(2**63), None)
    values = quads.view(torch.uint8)[phase_bytes : phase_bytes + nbytes].view(dtype)
    if dtype.is_floating_point and dtype.itemsize > 1:
        # Without its top bit, no exponent is that of a NaN.
        word, mask = {2: (torch.int16, ~0x4000), 4: (torch.int32, ~0x40000000)}[dtype.itemsize]
        values.view(word).bitwise_and_(mask)
    return values.view(count, rows, columns)


def concatenate(size: Experts, dst: torch.dtype, src: torch.dtype, device: torch.device) -> Case:
    """Return the case from gate and up ``[I, H]`` to ``[E, 2I, H]``, gate before up."""
    gate, up = _gate_and_up(size, src, device)
    out = _out((size.experts, 2 * size.intermediate, size.hidden), dst, device)
    halves = [half for whole in out.unbind() for half in whole.chunk(2)]
    return Case(
        "strided_copy",
        out,
        (halves, _alternating(gate, up)),
        lambda e: torch.cat([gate[e], up[e]]).to(dst),
        lambda: torch.cat([torch.stack(gate), torch.stack(up)], 1).to(dst),
    )


def interleave_rows(size: Experts, dst: torch.dtype, src: torch.dtype, device: torch.device) -> Case:
    """Return the case from gate and up to ``[E, 2I, H]``, with alternating rows."""
    gate, up = _gate_and_up(size, src, device)
    out = _out((size.experts, 2 * size.intermediate, size.hidden), dst, device)
    lanes = [whole[lane::2] for whole in out.unbind() for lane in (0, 1)]
    return Case(
        "strided_copy",
        out,
        (lanes, _alternating(gate, up)),
        lambda e: torch.stack([gate[e], up[e]], 1).flatten(0, 1).to(dst),
        lambda: torch.stack([torch.stack(gate), torch.stack(up)], 2).flatten(1, 2).to(dst),
    )


def split_back(size: Experts, dst: torch.dtype, src: torch.dtype, device: torch.device) -> Case:
    """Return the case from ``[E, 2I, H]`` with alternating rows back to gate and up, here ``[E, 2, I, H]``."""
    whole = random_matrices(size.experts, 2 * size.intermediate, size.hidden, src, device, size.phase_bytes)
    out = _out((size.experts, 2, size.intermediate, size.hidden), dst, device)
    return Case(
        "strided_copy",
        out,
        ([*out.flatten(0, 1).unbind()], [one[lane::2] for one in whole.unbind() for lane in (0, 1)]),
        lambda e: torch.stack([whole[e, 0::2], whole[e, 1::2]]).to(dst),
        lambda: whole.unflatten(1, (size.intermediate, 2)).transpose(1, 2).contiguous().to(dst),
    )


def concatenate_transposed(size: Experts, dst: torch.dtype, src: torch.dtype, device: torch.device) -> Case:
    """Return the case from gate and up to ``[E, H, 2I]``, gate before up."""
    gate, up = _gate_and_up(size, src, device)
    out = _out((size.experts, size.hidden, 2 * size.intermediate), dst, device)
    halves = [half for whole in out.unbind() for half in whole.chunk(2, 1)]
    return Case(
        "transpose",
        out,
        (halves, _alternating(gate, up)),
        lambda e: torch.cat([gate[e], up[e]]).t().to(dst),
        lambda: torch.cat([torch.stack(gate), torch.stack(up)], 1).transpose(1, 2).contiguous().to(dst),
    )


def transpose_down(size: Experts, dst: torch.dtype, src: torch.dtype, device: torch.device) -> Case:
    """Return the case from down ``[H, I]`` to ``[E, I, H]``."""
    down = random_matrices(size.experts, size.hidden, size.intermediate, src, device, size.phase_bytes)
    out = _out((size.experts, size.intermediate, size.hidden), dst, device)
    sources = [*down.unbind()]
    return Case(
        "transpose",
        out,
        ([*out.unbind()], sources),
        lambda e: down[e].t().to(dst),
        lambda: torch.stack(sources).transpose(1, 2).contiguous().to(dst),
    )


def interleave_columns(size: Experts, dst: torch.dtype, src: torch.dtype, device: torch.device) -> Case:
    """Return the case from gate and up to ``[E, H, 2I]``, with alternating columns."""
    gate, up = _gate_and_up(size, src, device)
    out = _out((size.experts, size.hidden, 2 * size.intermediate), dst, device)
    return Case(
        "interleave",
        out,
        ([*out.unbind()], gate, up),
        lambda e: torch.stack([gate[e].t(), up[e].t()], 2).flatten(1).to(dst),
        lambda: torch.stack([torch.stack(gate), torch.stack(up)], -1).transpose(1, 2).flatten(2).contiguous().to(dst),
    )


def deinterleave_columns(size: Experts, dst: torch.dtype, src: torch.dtype, device: torch.device) -> Case:
    """Return the case from ``[E, H, 2I]`` with alternating columns back to gate and up.

    The output is ``[2, E, I, H]`` in memory, here ``[E, 2, I, H]``.
    """
    whole = random_matrices(size.experts, size.hidden, 2 * size.intermediate, src, device, size.phase_bytes)
    out = _out((size.experts, 2, size.intermediate, size.hidden), dst, device)
    return Case(
        "deinterleave",
        out,
        ([*out[:, 0].unbind()], [*out[:, 1].unbind()], [*whole.unbind()]),
        lambda e: torch.stack([whole[e, :, 0::2].t(), whole[e, :, 1::2].t()]).to(dst),
        lambda: whole.unflatten(2, (size.intermediate, 2)).permute(0, 3, 2, 1).contiguous().to(dst),
    )


Make = Callable[[Experts, torch.dtype, torch.dtype, torch.device], Case]

OPERATIONS: Mapping[str, Make] = {
    "concatenate": concatenate,
    "interleave rows": interleave_rows,
    "split back": split_back,
    "concatenate transposed": concatenate_transposed,
    "transpose down": transpose_down,
    "interleave columns": interleave_columns,
    "deinterleave columns": deinterleave_columns,
}


def synchronize(device: torch.device) -> None:
    """Wait for all work that is queued on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gate_and_up(size: Experts, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return gate and up as a file stores them, an expert's gate next to its up."""
    both = random_matrices(2 * size.experts, size.intermediate, size.hidden, dtype, device, size.phase_bytes)
    return [*both[0::2].unbind()], [*both[1::2].unbind()]


def _alternating(gate: Sequence[Tensor], up: Sequence[Tensor]) -> list[Tensor]:
    return [matrix for pair in zip(gate, up, strict=True) for matrix in pair]


def _out(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
