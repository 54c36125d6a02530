"""Tests of the software GPU's kernels: the bytes they write, and the broken promises they detect."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from automodel_conv.kernels import dequantize as dequantize_module
from automodel_conv.kernels import launch as launching
from automodel_conv.kernels import strided_copy as strided_copy_module
from automodel_conv.kernels import transpose as transpose_module
from automodel_conv.kernels.address_table import at_addresses, matrices_at
from automodel_conv.kernels.code_tables import code_table
from automodel_conv.kernels.deinterleave import deinterleave
from automodel_conv.kernels.dequantize import dequantize
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from automodel_conv.kernels.interleave import interleave
from automodel_conv.kernels.strided_copy import strided_copy
from automodel_conv.kernels.transpose import transpose
from automodel_conv.testing import POISON, assert_bytes_equal
from tests.gpu import raw
from tests.kernels.support import DTYPE_PAIRS, PHASES, VERBS, casting_cases, shapes
from tests.software_gpu.accesses import Box, GpuFault, conflict

ROWS, COLUMNS = 16, 48


def bytes_of(nbytes):
    return torch.zeros(nbytes, dtype=torch.uint8)


@pytest.mark.parametrize("dtypes", [p for p in DTYPE_PAIRS if p[0].itemsize * p[1].itemsize in (1, 4, 8)], ids=str)
@pytest.mark.parametrize("name", VERBS)
def test_verb_moves_elements_at_any_alignment(gpu, name, dtypes):
    verb, dst_count, src_count = VERBS[name]
    dst_dtype, src_dtype = dtypes
    dst_shape, src_shape = shapes(name, ROWS, COLUMNS)
    finite = dst_dtype != src_dtype
    src = [raw.random(src_shape, src_dtype, PHASES, 8, torch.device("cpu"), finite=finite) for _ in range(src_count)]
    dst = [raw.poisoned(dst_shape, dst_dtype, [0] * 5, 16, torch.device("cpu")) for _ in range(dst_count)]
    for index in range(5):
        read, moved = [s.read(index).tolist() for s in src], [d.read(index) for d in dst]
        for r in range(ROWS):
            for c in range(COLUMNS):
                if name == "strided_copy":
                    moved[0][r, c] = read[0][r][c]
                elif name == "transpose":
                    moved[0][c, r] = read[0][r][c]
                elif name == "interleave":
                    moved[0][c, 2 * r], moved[0][c, 2 * r + 1] = read[0][r][c], read[1][r][c]
                else:
                    moved[0][c, r], moved[1][c, r] = read[0][r][2 * c], read[0][r][2 * c + 1]
        if src_dtype.is_floating_point and not finite:  # a list does not keep the bits of a NaN
            moved = [m.view(torch.uint8) for m in _by_bits(name, [s.read(index) for s in src])]
        for d, values in zip(dst, moved, strict=True):
            d.write(index, values.view(dst_dtype))
    verb(*(d.matrices for d in dst), *(s.matrices for s in src))
    for operand in dst + src:
        assert_bytes_equal(operand.device, operand.host)
    assert len(gpu.executor.variants) > 1


def _by_bits(name, src):
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[src[0].itemsize]
    first = src[0].view(word)
    if name == "strided_copy":
        return [first]
    if name == "transpose":
        return [first.t().contiguous()]
    if name == "interleave":
        return [torch.stack([first.t(), src[1].view(word).t()], 2).flatten(1)]
    return [first[:, half::2].t().contiguous() for half in (0, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_round_to_nearest_even(gpu, dtype):
    for source in {torch.bfloat16, torch.float16, torch.float32} - {dtype}:
        src = casting_cases(source)
        dst = torch.full(src.shape, -1, dtype=dtype)
        strided_copy([dst], [src])
        assert torch.equal(dst.isnan(), src.isnan())
        assert_bytes_equal(dst[~dst.isnan()], src.to(dtype)[~src.isnan()])


@pytest.mark.parametrize("code_format", ["e4m3", "e2m1"])
@pytest.mark.parametrize("turned", [False, True])
def test_codes_are_decoded_as_in_torch(gpu, code_format, turned):
    rows, columns = 32, 256
    scales = torch.rand(rows // 16, columns // 32)
    table, table_rows = code_table(code_format, scales, torch.bfloat16)
    bits = 8 if code_format == "e4m3" else 4
    codes = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8)
    outputs = []
    for verb in (dequantize, dequantize_torch):
        out = torch.full((columns, rows) if turned else (rows, columns), -1, dtype=torch.bfloat16)
        verb([out.t() if turned else out], [codes], [table_rows], table, bits=bits, block=(16, 32))
        outputs.append(out)
    assert_bytes_equal(*outputs)


def test_wrong_alignment_promise_is_detected(gpu, monkeypatch):
    real = strided_copy_module.byte_variant
    monkeypatch.setattr(strided_copy_module, "byte_variant", lambda alignment, nbytes: real(16, nbytes))
    memory = bytes_of(4096)
    src, dst = matrices_at(memory, [1024], (4, 64), 80, torch.uint8), matrices_at(memory, [8], (4, 64), 80, torch.uint8)
    with pytest.raises(GpuFault, match="promises 16 bytes for operand 0"):
        strided_copy(dst, src)


@pytest.mark.parametrize(("rows", "stride"), [(19, 48), (16, 49)], ids=["rows", "stride"])
def test_sizes_that_no_vector_divides_are_detected(gpu, monkeypatch, rows, stride):
    real = transpose_module.transpose_variant
    monkeypatch.setattr(transpose_module, "transpose_variant", lambda d, s, *_: real(d, s, 16, 16))
    src = torch.zeros(rows * stride, dtype=torch.int16).as_strided((rows, COLUMNS), (stride, 1))
    with pytest.raises(GpuFault, match="cannot count"):
        transpose([torch.zeros(COLUMNS, rows, dtype=torch.int16)], [src])


def test_vector_of_codes_over_two_blocks_is_found(gpu, monkeypatch):
    real = dequantize_module.dequantize_variant
    monkeypatch.setattr(dequantize_module, "dequantize_variant", lambda d, how, a, b, _: real(d, how, a, b, 16))
    table, table_rows = code_table("e4m3", torch.rand(4, 8), torch.bfloat16)
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(GpuFault, match="two blocks"):
        dequantize([torch.zeros(4, 32, dtype=torch.bfloat16)], [codes], [table_rows], table, bits=8, block=(1, 4))


def test_table_row_beyond_the_table_is_found(gpu):
    table, table_rows = code_table("e4m3", torch.rand(1, 4), torch.bfloat16)
    codes, out = torch.zeros(1, 32, dtype=torch.uint8), torch.zeros(1, 32, dtype=torch.bfloat16)
    with pytest.raises(GpuFault, match="table of values leaves memory"):
        dequantize([out], [codes], [table_rows + 1000], table, bits=8, block=(1, 8))


def test_stride_that_is_not_passed_on_is_found(gpu, monkeypatch):
    real = launching.queue
    monkeypatch.setattr(launching, "queue", lambda *first: real(*first[:3], (*first[3][:3], 0)))
    with pytest.raises(GpuFault, match="share memory"):
        strided_copy([bytes_of(8192).view(4, 2048)[:, :1024]], [bytes_of(4096).view(4, 1024)])


def test_more_rows_than_a_grid_has_are_found(gpu, monkeypatch):
    monkeypatch.setattr(launching, "_MAX_ROWS", 1 << 20)
    count = 66_000
    dst, src = (matrices_at(bytes_of(16 * count), np.arange(count) * 16, (1, 16), 0, torch.uint8) for _ in range(2))
    with pytest.raises(GpuFault, match="the grid is"):
        strided_copy(dst, src)


@pytest.mark.parametrize(("wrong", "text"), [((2, 1), "programs"), ((1, 2), "takes a table")])
def test_wrong_grid_size_is_detected(gpu, wrong, text):
    variant = strided_copy_module.byte_variant(16, 64)
    memory = bytes_of(256)
    table = torch.tensor([[memory.data_ptr(), memory.data_ptr() + 128]])
    with pytest.raises(GpuFault, match=text):
        launching.queue(variant, wrong, table, (1, 4, 0, 0))


def at(tensor, offset, shape, stride):
    return at_addresses(np.array([tensor.data_ptr() + offset]), shape, stride, tensor.dtype, tensor.device)


@pytest.mark.parametrize("side", ["destination", "source"])
@pytest.mark.parametrize("offset", [-1, 1])
def test_byte_beyond_a_tensor_is_found(gpu, side, offset):
    memory, other = bytes_of(1024), bytes_of(1024)
    beyond, within = at(memory, offset, (4, 256), 256), at(other, 0, (4, 256), 256)
    pair = (beyond, within) if side == "destination" else (within, beyond)
    with pytest.raises(GpuFault, match=rf"{side} 0 leaves memory"):
        strided_copy(*pair)
    assert memory.sum() == other.sum() == 0


def test_use_of_freed_memory_is_detected(gpu):
    memory = bytes_of(1 << 20)
    src, dst = at(memory, 0, (1, 64), 0), [bytes_of(64).view(1, 64)]
    strided_copy(dst, src)
    del memory
    with pytest.raises(GpuFault, match="source 0 leaves memory"):
        strided_copy(dst, src)


def test_pinned_memory_is_refused_in_kernels(gpu):
    pinned = gpu.new_device().pinned(64)
    with pytest.raises(GpuFault, match="the host's memory"):
        strided_copy([bytes_of(64).view(1, 64)], [pinned.view(1, 64)])


def test_two_destinations_that_share_a_byte_are_found(gpu):
    memory, src = bytes_of(8192), bytes_of(8192)
    dst = matrices_at(memory, [0, 128 * 3 + 48], (4, 64), 128, torch.uint8)
    with pytest.raises(GpuFault, match="shares bytes with destination 0"):
        strided_copy(dst, matrices_at(src, [0, 1024], (4, 64), 64, torch.uint8))


def test_source_that_is_written_is_found(gpu):
    memory = bytes_of(8192)
    src, dst = (matrices_at(memory, [at], (4, 64), 128, torch.uint8) for at in (0, 63))
    with pytest.raises(GpuFault, match=r"source 0 .* shares bytes with destination 0"):
        strided_copy(dst, src)


def test_boxes_that_fill_gaps_do_not_conflict(gpu):
    memory, src = bytes_of(1024), torch.randint(0, 255, (8, 64), dtype=torch.uint8)
    strided_copy(
        matrices_at(memory, [0, 64], (4, 64), 128, torch.uint8), matrices_at(src, [0, 256], (4, 64), 64, torch.uint8)
    )
    assert torch.equal(memory[:512].view(4, 2, 64), src.view(2, 4, 64).transpose(0, 1))


def test_boxes_meet_if_and_only_if_they_share_a_byte():
    generator = np.random.default_rng(0)
    met = 0
    for _ in range(3000):
        boxes = []
        for number in range(2):
            n, m = generator.integers(1, 5, 2).tolist()
            itemsize = int(generator.choice([1, 2]))
            inner = itemsize * int(generator.integers(1, 3))
            outer = inner * m + int(generator.integers(0, 8))
            start = np.array([4096 + int(generator.integers(0, 40))])
            boxes.append(Box(f"box {number}", start, (n, m), (outer, inner), itemsize, number == 0))
        bytes_of_boxes = [
            {
                int(box.starts[0]) + r * box.strides[0] + c * box.strides[1] + byte
                for r in range(box.shape[0])
                for c in range(box.shape[1])
                for byte in range(box.itemsize)
            }
            for box in boxes
        ]
        shared = bool(bytes_of_boxes[0] & bytes_of_boxes[1])
        assert (conflict(boxes) is not None) == shared
        met += shared
    assert 300 < met < 2700


def test_margins_and_gaps_stay_as_they_were(gpu):
    dst = raw.poisoned((COLUMNS, 2 * ROWS), torch.bfloat16, [0, 8, 4, 2], 24, torch.device("cpu"))
    halves = [torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16) for _ in range(8)]
    interleave(dst.matrices, halves[:4], halves[4:])
    back = [torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16) for _ in range(8)]
    for index in range(4):
        dst.write(index, torch.zeros(COLUMNS, 2 * ROWS, dtype=torch.bfloat16))
    assert_bytes_equal(dst.device, dst.host)
    assert (dst.device == POISON).sum() > 1000
    deinterleave(back[:4], back[4:], dst.matrices)
    assert not any(half.any() for half in back)
