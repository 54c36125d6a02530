"""Loading code of other projects, traced and executed, against the same code run on tensors of addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from automodel_conv import load_with, open_checkpoint
from automodel_conv.execution.report import LoadReport
from automodel_conv.testing import assert_bytes_equal


def addressed(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return new contiguous tensors of these names, shapes and dtypes, the elements of which are addresses.

    Up to 65,278 elements of a tensor all differ, or as many as their dtype has values. Each tensor starts at another
    number. Floats are finite and not 0, and float32 still differ when they are cast to bfloat16.
    """
    return {name: _addresses(tensor, 997 * start) for start, (name, tensor) in enumerate(like.items())}


def _addresses(like: Tensor, start: int) -> Tensor:
    size, dtype = like.dtype.itemsize, like.dtype
    numel = like.numel() if size > 2 else min(like.numel(), 2**18)  # more repeat these
    numbers = torch.arange(start, start + numel)
    if dtype == torch.bool:
        values = numbers % 2 == 1
    elif not dtype.is_floating_point:
        values = (numbers % 2 ** (8 * size - 1)).to(dtype)
    else:
        finite = 0x78 if size == 1 else 0x7BFF if dtype == torch.float16 else 0x7F7F
        sign = numbers // finite % 2 if dtype != torch.float8_e8m0fnu else 0
        high = numbers % finite + 1 + sign * (0x80 if size == 1 else 0x8000)
        bits = high if size <= 2 else (high << (8 * size - 16)) + numbers // (2 * finite)
        values = bits.to(_UNSIGNED[size]).view(dtype)
    copies = -(-like.numel() // max(numel, 1))
    return (values if copies <= 1 else torch.cat([values] * copies)[: like.numel()]).reshape(like.shape)


_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def load_both(
    load: Callable[[Any], Any], run: Callable[[Any], Any], tensors: Mapping[str, Tensor], directory: Path
) -> tuple[dict[str, Tensor], LoadReport]:
    """Load a file of tensors by the plan of loading code, and check that it equals the code run on the tensors.

    Args:
        load: the loading code, which is traced.
        run: the same, not run yet: it may change itself.
        tensors: what the file has.
        directory: of the file.

    Returns:
        What the code returns, and the report.
    """
    save_file(dict(tensors), directory / "model.safetensors")
    expected = run({name: tensors[name] for name in open_checkpoint(directory).names})
    loaded = load_with(load, directory, calls="dict")
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        try:
            assert_bytes_equal(loaded[name], tensor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        assert name in loaded.report.computed or loaded[name].is_contiguous()
    return expected, loaded.report
