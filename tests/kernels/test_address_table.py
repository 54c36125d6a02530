"""Tests of tensors by their addresses: a tensor that differs from the others is named, at any position."""

import numpy as np
import pytest
import torch

from automodel_conv.errors import ConversionError
from automodel_conv.kernels.address_table import as_matrices

SHAPE, COUNT = (4, 6), 9


def matrices_of_kind(kind="contiguous"):
    """Return matrices of one kind, each with memory of its own."""
    makers = {
        "contiguous": lambda: torch.zeros(SHAPE),
        "rows apart": lambda: torch.zeros(4, 10)[:, 2:8],
        "one row": lambda: torch.zeros(1, 6),
        "one column, apart": lambda: torch.zeros(4, 6)[:, :1],
        "no rows": lambda: torch.zeros(0, 6),
        "rows that repeat": lambda: torch.zeros(1, 6).expand(4, 6),
    }
    return [makers[kind]() for _ in range(COUNT)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("contiguous", (4, 6, 6)),
        ("rows apart", (4, 6, 10)),
        ("one row", (1, 6, 0)),
        ("one column, apart", (4, 1, 6)),
        ("no rows", (0, 6, 0)),
        ("rows that repeat", (4, 6, 0)),
    ],
)
def test_matrices_of_one_kind_are_passed_by_address(kind, expected):
    tensors = matrices_of_kind(kind)
    matrices = as_matrices("src", tensors)
    assert (matrices.rows, matrices.columns, matrices.row_stride) == expected
    assert (matrices.dtype, matrices.device) == (torch.float32, torch.device("cpu"))
    assert matrices.addresses.dtype == np.int64
    assert matrices.addresses.tolist() == [tensor.data_ptr() for tensor in tensors]


def test_unused_strides_may_differ():
    tensors = [torch.zeros(3, 6)[:1], torch.zeros(3, 12)[1:2, :6], torch.zeros(6).as_strided((1, 6), (5, 1))]
    matrices = as_matrices("src", tensors)
    assert (matrices.rows, matrices.columns, matrices.row_stride) == (1, 6, 0)
    assert matrices.addresses.tolist() == [tensor.data_ptr() for tensor in tensors]


ODD = {
    "another shape": lambda t: torch.zeros(6, 4),
    "the same number of elements in one row": lambda t: torch.zeros(1, 24),
    "another shape, at the same strides": lambda t: torch.zeros(5, 6),
    "another dtype": lambda t: t.int(),
    "another row stride": lambda t: torch.zeros(4, 9)[:, :6],
    "no row stride": lambda t: torch.zeros(1, 6).expand(4, 6),
    "on no device": lambda t: torch.empty(t.shape, device="meta"),
}
NOT_A_MATRIX = {
    "a vector": lambda t: torch.zeros(24),
    "a stack": lambda t: t[None],
    "elements apart": lambda t: torch.zeros(4, 12)[:, ::2],
    "column by column": lambda t: torch.zeros(6, 4).t(),
}


@pytest.mark.parametrize("at", range(1, COUNT))
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", ["contiguous", "rows apart"])
def test_matrix_of_another_kind_is_named(kind, odd, at):
    tensors = matrices_of_kind(kind)
    tensors[at] = ODD[odd](tensors[at])
    with pytest.raises(ConversionError, match="src has matrices of several kinds") as error:
        as_matrices("src", tensors)
    assert f"src[{at}]" in str(error.value)
    assert f"strides {tensors[0].stride()}, on cpu" in str(error.value)
    assert f"{tensors[at].dtype} {list(tensors[at].shape)}" in str(error.value)
    assert f"on {tensors[at].device}" in str(error.value)


@pytest.mark.parametrize("at", range(COUNT))
@pytest.mark.parametrize("odd", NOT_A_MATRIX)
def test_tensor_that_is_no_matrix_is_named(odd, at):
    tensors = matrices_of_kind()
    tensors[at] = NOT_A_MATRIX[odd](tensors[at])
    if at:
        # The first tensor sets the kind of the others. The error must still name the tensor that is no matrix.
        assert tensors[0].shape == SHAPE
    with pytest.raises(ConversionError, match="src needs matrices with adjacent elements in each row") as error:
        as_matrices("src", tensors)
    assert f"src[{at}]" in str(error.value)


@pytest.mark.parametrize("at", [1, COUNT - 1])
def test_meta_tensor_among_empty_ones_is_named(at):
    # Empty tensors have no address either.
    tensors = matrices_of_kind("no rows")
    tensors[at] = tensors[at].to("meta")
    with pytest.raises(ConversionError, match=rf"src\[{at}\]"):
        as_matrices("src", tensors)


def test_matrices_that_all_are_meta_are_of_one_kind():
    matrices = as_matrices("src", [tensor.to("meta") for tensor in matrices_of_kind()])
    assert matrices.device == torch.device("meta")


def matrices_of(stack):
    if stack.dim() == 2:
        return [stack]
    return [matrix for part in stack for matrix in matrices_of(part)]


@pytest.mark.parametrize(
    "stack",
    [
        torch.zeros(3, 4, 6),
        torch.zeros(3, 8, 6)[:, 4:],
        torch.zeros(3, 4, 12)[:, :, 6:],
        torch.zeros(4, 3, 6, dtype=torch.bfloat16).transpose(0, 1),
        torch.zeros(4, 6).expand(3, 4, 6),
        torch.zeros(3, 1, 6),
        torch.zeros(0, 4, 6),
        torch.zeros(3, 6, 10).unflatten(2, (2, 5)).transpose(1, 2),  # gate and up of [E, H, 2I]
        torch.zeros(3, 8, 5).unflatten(1, (4, 2)).transpose(1, 2),  # their rows alternate
        torch.zeros(2, 2, 2, 4, 6)[:, :, 1:],
    ],
    ids=lambda stack: f"{list(stack.shape)} {stack.stride()}",
)
def test_stack_is_the_list_of_its_matrices(stack):
    matrices, listed = as_matrices("dst", stack), as_matrices("dst", matrices_of(stack))
    assert matrices.addresses.tolist() == listed.addresses.tolist()
    if len(stack):
        assert matrices[1:] == listed[1:]


@pytest.mark.parametrize("tensor", [torch.zeros(4, 6), torch.zeros(6), torch.zeros(3, 6, 4).transpose(1, 2)])
def test_tensor_that_is_no_stack_of_matrices_is_refused(tensor):
    with pytest.raises(ConversionError, match="dst needs matrices with adjacent elements in each row"):
        as_matrices("dst", tensor)
