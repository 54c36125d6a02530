"""Tests of every verb, dtype pair and alignment against plain indexing on the CPU, between margins; large ones too."""

import itertools

import pytest
import torch

from automodel_conv.kernels.code_tables import code_table
from automodel_conv.kernels.deinterleave import deinterleave
from automodel_conv.kernels.dequantize import dequantize
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from automodel_conv.kernels.interleave import interleave
from automodel_conv.kernels.strided_copy import strided_copy
from automodel_conv.kernels.transpose import transpose
from automodel_conv.testing import POISON, assert_bytes_equal
from benchmarks.operations import OPERATIONS, Experts
from benchmarks.quantized import QUANTIZED
from tests.gpu import raw
from tests.gpu.place import FULL_SIZES
from tests.kernels.support import CASTABLE, DTYPE_PAIRS, PHASES, VERBS, casting_cases, shapes

pytest.importorskip("triton")

# Rows and columns of a source: multiples of 16 bytes with several tiles, and sizes without any useful divisor.
SIDES = [(192, 320), (131, 257), (1, 4096), (2048, 16)] if FULL_SIZES else [(16, 32), (19, 7)]
LAYOUTS = ["dense", "every other row"]
# tests/kernels covers all of them in the interpreter. In the interpreter these only check the tests themselves.
PLACES = (
    [*itertools.product(LAYOUTS, SIDES[:2]), *itertools.product(LAYOUTS[:1], SIDES[2:])]
    if FULL_SIZES
    else [*zip(LAYOUTS, SIDES, strict=True)]
)
FEW = [torch.bool, torch.bfloat16]
PAIRS = DTYPE_PAIRS if FULL_SIZES else [(d, d) for d in FEW] + [(torch.float32, FEW[1]), (FEW[1], torch.float32)]

PLAIN = {
    "strided_copy": lambda src: [src[0]],
    "transpose": lambda src: [src[0].t()],
    "interleave": lambda src: [torch.stack([src[0].t(), src[1].t()], 2).flatten(1)],
    "deinterleave": lambda src: [src[0][:, 0::2].t(), src[0][:, 1::2].t()],
}


@pytest.mark.parametrize(("layout", "sides"), PLACES, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[1]}-{pair[0]}".replace("torch.", ""))
@pytest.mark.parametrize("name", VERBS)
def test_verb_moves_every_alignment_like_plain_indexing(name, dtypes, layout, sides, device):
    verb, dst_count, src_count = VERBS[name]
    dst_dtype, src_dtype = dtypes
    # strided_copy writes bytes anywhere; everything else is written at multiples of an element.
    anywhere = name == "strided_copy" and dst_dtype == src_dtype
    dst_phases = [phase for phase in PHASES if anywhere or phase % dst_dtype.itemsize == 0]
    phases = list(itertools.product(dst_phases, PHASES)) if FULL_SIZES else [(0, 0), (0, 1), (8, 8)]
    dst_shape, src_shape = shapes(name, *sides)
    gaps = (dst_shape[1], 0) if layout == "every other row" else (0, 0)
    src = [
        raw.random(src_shape, src_dtype, [p for _, p in phases], gaps[1], device, finite=dst_dtype != src_dtype)
        for _ in range(src_count)
    ]
    dst = [raw.poisoned(dst_shape, dst_dtype, [p for p, _ in phases], gaps[0], device) for _ in range(dst_count)]
    assert all(map(raw.aligned, dst + src))
    for index in range(len(phases)):
        expected = PLAIN[name]([s.read(index) for s in src])
        for d, values in zip(dst, expected, strict=True):
            d.write(index, values.to(dst_dtype))
    verb(*(d.matrices for d in dst), *(s.matrices for s in src))
    for operand in dst + src:
        assert_bytes_equal(operand.device, operand.host)


@pytest.mark.parametrize("name", VERBS if FULL_SIZES else ["strided_copy"])
@pytest.mark.parametrize(("dst_dtype", "src_dtype"), [(d, s) for d in CASTABLE for s in CASTABLE if d != s], ids=str)
def test_casts_round_as_on_the_cpu(name, dst_dtype, src_dtype, device):
    verb, _, src_count = VERBS[name]
    bits = casting_cases(src_dtype)
    src = [bits.roll(roll, 0) for roll in range(src_count)]
    wanted = [values.to(dst_dtype).contiguous() for values in PLAIN[name](src)]
    outputs = [torch.empty_like(values, device=device) for values in wanted]
    for out in outputs:
        out.view(torch.uint8).fill_(POISON)
    verb(*([out] for out in outputs), *([s.to(device)] for s in src))
    for out, values in zip(outputs, wanted, strict=True):
        actual = out.cpu()
        # A NaN may become any NaN.
        assert torch.equal(actual.isnan(), values.isnan())
        assert_bytes_equal(actual.masked_fill(actual.isnan(), 0), values.masked_fill(values.isnan(), 0))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_layers_of_experts_are_moved_like_plain_indexing(operation, dtypes, device):
    size = Experts("", 16, 768, 2048) if FULL_SIZES else Experts("", 2, 24, 48)
    case = OPERATIONS[operation](size, *dtypes, device)
    case.verify(operation, case.kernel)
    case.verify(operation, case.with_addresses())


# Strides of [R, C], in elements.
NUMBERS = {
    "rows": lambda rows, columns: (columns, 1),
    "every other column": lambda rows, columns: (2 * columns, 2),
    "transposed": lambda rows, columns: (1, rows),
    "transposed, every other": lambda rows, columns: (2, 2 * rows),
}


@pytest.mark.parametrize("sides", [(320, 512), (131, 258)] if FULL_SIZES else [(16, 32), (5, 6)], ids=str)
@pytest.mark.parametrize(
    ("code_format", "block", "start"),
    [
        ("e4m3", (128, 128), (0, 0)),
        ("e4m3", (100, 60), (7, 58)),
        ("e4m3", (1, 1 << 20), (0, 6)),
        ("e2m1", (1, 32), (0, 16)),
        ("int4", (1, 32), (0, 0)),
        ("int8", (1, 1 << 20), (0, 6)),
    ],
)
@pytest.mark.parametrize("layout", NUMBERS)
def test_dequantize_equals_its_torch_version_on_the_cpu(layout, code_format, block, start, sides, device):
    (rows, columns), bits = sides, 8 if code_format in ("e4m3", "int8") else 4
    grid = [-(-(size + begin) // step) for size, begin, step in zip(sides, start, block, strict=True)]
    scales = torch.randint(0, 255, grid, dtype=torch.uint8) if code_format == "e2m1" else torch.randn(grid)
    nbytes = columns * bits // 8
    for dtype, phase in itertools.product(CASTABLE, PHASES):
        raw_codes = torch.randint(0, 256, (rows * nbytes + 16,), dtype=torch.uint8)
        decoded = []
        for place, verb in ((torch.device("cpu"), dequantize_torch), (device, dequantize)):
            table, table_rows = code_table(code_format, scales.to(place), dtype)
            memory = torch.full((2 * rows * columns + 16,), -1, dtype=dtype, device=place)
            out = memory[8:].as_strided(sides, NUMBERS[layout](*sides))
            codes = raw_codes.to(place)[phase : phase + rows * nbytes].view(rows, nbytes)
            verb([out], [codes], [table_rows], table, bits=bits, block=block, start=start)
            decoded.append((memory.cpu(), table.cpu(), table_rows.cpu()))
        for wanted, actual in zip(*decoded, strict=True):
            assert_bytes_equal(actual, wanted)


@pytest.mark.parametrize("name", QUANTIZED)
def test_layers_of_quantized_experts_are_decoded_as_torch_decodes_them(name, device):
    size = Experts("", 16, 768, 2048) if FULL_SIZES else Experts("", 2, 24, 48)
    case = QUANTIZED[name](size, device)
    for way, run in case.ways().items():
        case.verify(way, run)


@pytest.fixture
def room(device):
    def need(nbytes):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if free < nbytes:
            pytest.skip(f"needs {nbytes / 2**30:.0f} GiB of free GPU memory, has {free / 2**30:.0f}")

    yield need
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_more_than_two_to_the_31_elements_in_one_call(operation, device, room):
    room(24 * 2**30)
    experts = 352 if operation == "transpose down" else 176
    case = OPERATIONS[operation](Experts("", experts, 1536, 4096), torch.bfloat16, torch.bfloat16, device)
    assert case.out.numel() > 2**31
    case.verify(operation, case.kernel)


@pytest.mark.gpu
def test_elements_beyond_4_gib_of_one_matrix_are_reached(device, room):
    rows, columns, stride = 5000, 8, 2**19  # elements, of 2 bytes
    assert (rows - 64) * stride > 2**31
    room(8 * 2**30)
    memory = torch.empty(rows * stride, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((rows, columns), (stride, 1))
    numbers = torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16, device=device).view(torch.bfloat16)
    turned = numbers.t().contiguous()
    for verb, operands in (
        (strided_copy, ([far], [numbers])),
        (transpose, ([far], [turned])),
        (interleave, ([far], [turned[0::2].contiguous()], [turned[1::2].contiguous()])),
    ):
        far.zero_()
        verb(*operands)
        assert_bytes_equal(far, numbers)
    near = torch.zeros_like(turned)
    transpose([near], [far])
    assert_bytes_equal(near, turned)
    back = torch.zeros_like(numbers)
    strided_copy([back], [far])
    assert_bytes_equal(back, numbers)
    first, second = torch.zeros_like(turned[0::2]), torch.zeros_like(turned[1::2])
    deinterleave([first], [second], [far])
    assert_bytes_equal(torch.stack([first, second], 1).flatten(0, 1), turned)
