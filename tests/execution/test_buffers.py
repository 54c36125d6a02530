"""Tests of output buffers: which ones fit a target, and access to every element with any strides."""

import itertools

import pytest
import torch

from automodel_conv.errors import ConversionError, UnsupportedError
from automodel_conv.execution.buffers import (
    BufferCopies,
    allocate,
    byte_view,
    checked_buffer,
    dtype_of,
    fill_constants,
    raw_bytes,
    span_bytes,
    strided,
)
from automodel_conv.planning.boxes import Box, run_of
from automodel_conv.planning.copies import StridedCopy, Target, zero_rows

TARGET = Target("t", "BF16", (2, 3), -1, (0,), (StridedCopy(run_of(6), (0,), (0,), (0,)),))


def test_buffers_have_the_shapes_and_dtypes_of_their_targets():
    targets = [TARGET, TARGET._replace(name="none", shape=(0, 3)), TARGET._replace(name="one", shape=(), dtype="I64")]
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in allocate(targets).items()}
    assert found == {"t": (torch.bfloat16, (2, 3)), "none": (torch.bfloat16, (0, 3)), "one": (torch.int64, ())}
    assert allocate([TARGET], "meta")["t"].is_meta


def test_missing_memory_is_reported_with_name_and_size():
    with pytest.raises(ConversionError, match=rf"(?s)no memory.*t\n.*{2 << 61} bytes"):
        allocate([TARGET._replace(shape=(1 << 61,))])


def test_dtype_that_torch_lacks_names_the_tensor():
    assert dtype_of("F32", "t") == torch.float32
    with pytest.raises(UnsupportedError, match=r"(?s)t has a dtype.*F6_E2M3"):
        dtype_of("F6_E2M3", "t")


@pytest.mark.parametrize(
    ("buffer", "words"),
    [
        (None, "no buffer for t"),
        (torch.ones(3, 2, dtype=torch.bfloat16), r"does not fit.*\[2, 3\].*\[3, 2\]"),
        (torch.ones(2, 3), "does not fit.*bfloat16.*float32"),
        (torch.ones(1, 3, dtype=torch.bfloat16).expand(2, 3), "share memory"),
    ],
    ids=["missing", "shape", "dtype", "expanded"],
)
def test_buffer_that_does_not_fit_is_named(buffer, words):
    with pytest.raises(ConversionError, match=f"(?s){words}"):
        checked_buffer(TARGET, {} if buffer is None else {"t": buffer})


def test_fitting_buffer_is_detached_in_the_same_memory():
    parameter = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    assert not checked_buffer(TARGET, {"t": parameter}).requires_grad
    assert checked_buffer(TARGET, {"t": parameter}).data_ptr() == parameter.data_ptr()
    row = torch.ones(3, dtype=torch.bfloat16).expand(1, 3)  # a stride of zero in a dimension of size one
    assert checked_buffer(TARGET._replace(shape=(1, 3)), {"t": row}).shape == (1, 3)


LAYOUTS = {
    "contiguous": torch.zeros(3, 4),
    "transposed": torch.zeros(4, 3).t(),
    "apart": torch.zeros(6, 9)[1::2, 1::2],
    "one row": torch.zeros(5, 4)[2:3],
    "one element": torch.zeros(5)[3],
    "none": torch.zeros(3, 0),
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_raw_memory_is_from_the_first_element_to_the_last(tensor):
    addresses = [tensor[index].data_ptr() for index in itertools.product(*map(range, tensor.shape))]
    nbytes = max(addresses) + 4 - min(addresses) if addresses else 0
    assert span_bytes(tensor) == len(byte_view(tensor)) == len(raw_bytes(tensor)) == nbytes
    if nbytes:
        byte_view(tensor)[-4:] = b"\0\0\x80\x3f"  # 1.0
        assert raw_bytes(tensor)[-4:].tolist() == [0, 0, 0x80, 0x3F]
        assert tensor.reshape(-1)[-1] == 1
        assert raw_bytes(tensor).data_ptr() == tensor.data_ptr()


def test_view_of_memory_begins_at_the_tensors_own_first_element():
    memory = torch.arange(20)
    assert strided(memory[5:], (2, 2), (3, 1), 2).tolist() == [[7, 8], [10, 11]]


def test_copies_are_aimed_at_the_strides_that_a_buffer_has():
    copies = BufferCopies()
    assert copies(TARGET, torch.zeros(2, 3)) is TARGET.copies
    transposed = torch.zeros(3, 2).t()
    (copy,) = copies(TARGET, transposed)
    assert copy.box == Box((3, 2), (1, 3), (2, 1))
    assert copies(TARGET._replace(name="another"), torch.zeros(3, 2).t()) is copies(TARGET, transposed)
    assert copies(TARGET, torch.zeros(2, 5)[:, :3]) is not copies(TARGET, transposed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_rows_of_zeros_are_filled_in_a_buffer_of_any_strides(dtype):
    for buffer in (torch.ones(4, 3).to(dtype), torch.ones(3, 4).to(dtype).t(), torch.ones(8, 6).to(dtype)[::2, ::2]):
        fill_constants(TARGET._replace(shape=(4, 3), fills=zero_rows((4, 3), 3)), buffer)
        assert buffer.float().tolist() == [[1.0] * 3, *([[0.0] * 3] * 3)]
        fill_constants(TARGET._replace(shape=(4, 3)), buffer)
        assert buffer[0].float().tolist() == [1.0] * 3
