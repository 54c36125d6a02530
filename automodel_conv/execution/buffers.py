"""Output buffers: making them, checking them, and reaching their elements whatever the strides."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.planning.boxes import Box, NotAffine, Piece, chain, contiguous_strides, reach
from automodel_conv.planning.copies import StridedCopy, Target, group_pieces


def dtype_of(code: str, name: str) -> torch.dtype:
    """The torch dtype of a safetensors code.

    Raises:
        UnsupportedError: this torch has no such dtype; names the tensor.
    """
    dtype = torch_dtype(code)
    if dtype is None:
        raise UnsupportedError(
            message(
                f"{name} has a dtype that torch {torch.__version__} does not know",
                found=code,
                do="use a newer torch, or leave this tensor out",
            )
        )
    return dtype


def allocate(targets: Iterable[Target], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Uninitialized, contiguous tensors for the targets, by name; no page is touched.

    Raises:
        UnsupportedError: this torch has no dtype for a target.
        ConversionError: the host has no memory for it.
    """
    buffers = {}
    for target in targets:
        dtype = dtype_of(target.dtype, target.name)
        try:
            buffer = torch.empty(target.shape, dtype=dtype, device=device)
        except RuntimeError as error:
            if torch.device(device).type != "cpu":  # callers know how to meet those of devices
                raise
            raise ConversionError(
                message(
                    "no memory for a tensor",
                    where=target.name,
                    expected=f"{target.nbytes} bytes for {target.dtype} {list(target.shape)}",
                    found=error,
                    do="free memory, or load a part of it; if the shape is absurd, do not trust this checkpoint",
                )
            ) from error
        buffers[target.name] = buffer
    return buffers


def checked_buffer(target: Target, buffers: Mapping[str, Tensor]) -> Tensor:
    """The buffer of a target, detached from autograd.

    Raises:
        ConversionError: it is missing, has another shape or dtype, or elements that share memory.
    """
    buffer = buffers.get(target.name)
    if buffer is None:
        raise ConversionError(message(f"no buffer for {target.name}"))
    expected = (target.shape, dtype_of(target.dtype, target.name))
    if (buffer.shape, buffer.dtype) != expected:
        raise ConversionError(
            message(
                f"the buffer of {target.name} does not fit",
                expected=f"{expected[1]} {list(expected[0])}",
                found=f"{buffer.dtype} {list(buffer.shape)}",
            )
        )
    if any(stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)):
        raise ConversionError(
            message(
                f"elements of the buffer of {target.name} share memory",
                found=f"shape {list(buffer.shape)}, strides {list(buffer.stride())}",
                do="pass a buffer that was not expanded",
            )
        )
    return buffer.detach()


class BufferCopies:
    """Copies of targets, re-aimed from contiguous tensors to the strides that buffers really have.

    Targets that share their copies share the result.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[StridedCopy, ...]] = {}

    def __call__(self, target: Target, buffer: Tensor) -> tuple[StridedCopy, ...]:
        """The copies that fill ``buffer``; target offsets count elements from its ``data_ptr``.

        Raises:
            UnsupportedError: the copies cannot be expressed with these strides.
        """
        if buffer.is_contiguous():
            return target.copies
        strides = buffer.stride()
        key = (id(target.copies), target.shape, strides)
        if key not in self._known:
            real = Piece(0, Box(target.shape, contiguous_strides(target.shape), strides), 0, 0)
            first = [piece for copy in target.copies for piece in copy.pieces()]
            try:
                self._known[key] = group_pieces(chain(first, [real], buffer.numel()))
            except NotAffine as error:
                raise UnsupportedError(
                    message(
                        f"{target.name} cannot be written straight into its buffer: {error}",
                        found=f"shape {list(target.shape)}, strides {list(strides)}",
                        do="pass a contiguous buffer",
                    )
                ) from None
        return self._known[key]


def span_bytes(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    return (1 + reach(tensor.shape, tensor.stride())) * tensor.element_size()


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a CPU tensor from its first to its last element, as writable bytes.

    Any dtype and strides. The view does not keep the tensor alive.
    """
    nbytes = span_bytes(tensor)
    if not nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())).cast("B")


def raw_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor from its first to its last element, uint8 ``[n]``; any device, dtype and strides."""
    if not tensor.numel():
        return tensor.new_empty(0, dtype=torch.uint8)
    span = 1 + reach(tensor.shape, tensor.stride())
    return strided(tensor, (span,), (1,), 0).view(torch.uint8)


def strided(tensor: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
    """A view of a tensor's memory; ``offset`` counts elements from the tensor's own first one."""
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)
