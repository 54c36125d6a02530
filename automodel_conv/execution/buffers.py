"""Output buffers: allocate and check them, and view their memory for any strides."""

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
    """Return the torch dtype for a safetensors dtype.

    Args:
        code: the dtype as safetensors writes it, such as "BF16".
        name: name of the tensor, for the error.

    Raises:
        UnsupportedError: this version of torch does not have the dtype.
    """
    dtype = torch_dtype(code)
    if dtype is None:
        raise UnsupportedError(
            message(
                f"{name} has a dtype that torch {torch.__version__} does not support",
                found=code,
                do="use a newer torch, or leave this tensor out",
            )
        )
    return dtype


def allocate(targets: Iterable[Target], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Allocate an uninitialized, contiguous tensor for each target, and return the tensors by name.

    No page of memory is touched.

    Raises:
        UnsupportedError: this version of torch does not have the dtype of a target.
        ConversionError: the host does not have enough memory.
    """
    buffers = {}
    for target in targets:
        dtype = dtype_of(target.dtype, target.name)
        try:
            buffer = torch.empty(target.shape, dtype=dtype, device=device)
        except RuntimeError as error:
            if torch.device(device).type != "cpu":  # callers handle the errors of devices
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
    """Check the shape, dtype and strides of the buffer of a target, and return it detached from autograd.

    Raises:
        ConversionError: the buffer is missing, has a wrong shape or dtype, or has elements that share memory.
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
    if buffer.numel() and any(
        stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    ):
        raise ConversionError(
            message(
                f"elements of the buffer of {target.name} share memory",
                found=f"shape {list(buffer.shape)}, strides {list(buffer.stride())}",
                do="pass a buffer that was not expanded",
            )
        )
    return buffer.detach()


class BufferCopies:
    """Adapts the copies of targets from contiguous tensors to the actual strides of buffers.

    Targets that share their copies share the adapted copies too.
    """

    def __init__(self) -> None:
        self._adapted: dict[tuple[object, ...], tuple[StridedCopy, ...]] = {}

    def __call__(self, target: Target, buffer: Tensor) -> tuple[StridedCopy, ...]:
        """Return the copies that fill ``buffer``; target offsets count elements from its ``data_ptr``.

        Raises:
            UnsupportedError: the copies cannot be expressed with these strides.
        """
        if buffer.is_contiguous():
            return target.copies
        strides = buffer.stride()
        key = (id(target.copies), target.shape, strides)
        if key not in self._adapted:
            to_buffer = Piece(0, Box(target.shape, contiguous_strides(target.shape), strides), 0, 0)
            pieces = [piece for copy in target.copies for piece in copy.pieces()]
            try:
                self._adapted[key] = group_pieces(chain(pieces, [to_buffer], buffer.numel()))
            except NotAffine as error:
                raise UnsupportedError(
                    message(
                        f"{target.name} cannot be written straight into its buffer: {error}",
                        found=f"shape {list(target.shape)}, strides {list(strides)}",
                        do="pass a contiguous buffer",
                    )
                ) from None
        return self._adapted[key]


def fill_constants(target: Target, buffer: Tensor) -> None:
    """Write the elements of a target that are constant, and wait for the device."""
    to_buffer = Piece(0, Box(target.shape, contiguous_strides(target.shape), buffer.stride()), 0, 0)
    for fill in target.fills:
        for piece in chain([fill.piece(0)], [to_buffer], buffer.numel()):
            strided(buffer, piece.box.shape, piece.box.target_strides, piece.target_offset).fill_(fill.value)
    if target.fills and buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()


def span_bytes(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    return (1 + reach(tensor.shape, tensor.stride())) * tensor.element_size()


def byte_view(tensor: Tensor) -> memoryview:
    """Return a writable view of the bytes of a CPU tensor, from its first to its last element.

    The tensor may have any dtype and strides. The view does not keep it alive.
    """
    nbytes = span_bytes(tensor)
    if not nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())).cast("B")


def raw_bytes(tensor: Tensor) -> Tensor:
    """Return a uint8 view ``[n]`` of a tensor from its first to its last element; any device, dtype and strides."""
    if not tensor.numel():
        return tensor.new_empty(0, dtype=torch.uint8)
    span = 1 + reach(tensor.shape, tensor.stride())
    return strided(tensor, (span,), (1,), 0).view(torch.uint8)


def strided(tensor: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
    """Return a view of a tensor's memory; ``offset`` counts elements from the tensor's own first one."""
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)
