"""Tests of dequantize and its torch version: both against the definition, by coordinates, between guards."""

from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_conv.errors import ConversionError, UnsupportedError
from automodel_conv.kernels import dequantize as module
from automodel_conv.kernels import dequantize_torch as twin
from automodel_conv.kernels import jit, launch
from automodel_conv.kernels.code_tables import code_table
from automodel_conv.kernels.dequantize import dequantize
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from automodel_conv.testing import address_valued, assert_bytes_equal, guarded
from tests.machine_code.variants import launchable

needs_triton = pytest.mark.skipif(not jit.IS_INSTALLED, reason="triton is not installed")

BF16, F32 = torch.bfloat16, torch.float32
# Strides of [R, C], in elements.
LAYOUTS = {
    "rows": lambda rows, columns: (columns, 1),
    "rows apart": lambda rows, columns: (columns + 3, 1),
    "every other row": lambda rows, columns: (2 * columns, 1),
    "every other column": lambda rows, columns: (2 * columns, 2),
    "transposed": lambda rows, columns: (1, rows),
    "transposed, apart": lambda rows, columns: (1, rows + 16),
    "transposed, every other": lambda rows, columns: (2, 2 * rows),
}


def random_bytes(shape, seed):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class Problem:
    """Operands of a call, and the results by the definition."""

    def __init__(self, bits, shape, block, start, dtype, table_row_dtype, rows_of_table, gap=0, count=1):
        self.how = {"bits": bits, "block": block, "start": start}
        self.shape = rows, columns = shape
        self.dtype = dtype
        # Every entry is different, so nothing can be right by chance.
        self.table = address_valued((rows_of_table, 1 << bits), dtype)
        nbytes = columns * bits // 8
        grid = [-(-(size + begin) // step) for size, begin, step in zip(shape, start, block, strict=True)]
        most = min(rows_of_table, 256) if table_row_dtype == torch.uint8 else rows_of_table
        self.codes = [random_bytes((rows, nbytes + gap), seed)[:, :nbytes] for seed in range(count)]
        self.table_rows = [
            torch.randint(0, most, grid, generator=torch.Generator().manual_seed(seed)).to(table_row_dtype)
            for seed in range(count)
        ]

    def expected(self):
        values = []
        (rows, columns), (block_rows, block_columns), (r0, c0) = self.shape, self.how["block"], self.how["start"]
        for codes, table_rows in zip(self.codes, self.table_rows, strict=True):
            numbers = codes.long()
            if self.how["bits"] == 4:
                numbers = torch.stack([numbers % 16, numbers // 16], 2).flatten(1)
            of_rows, of_columns = (torch.arange(rows) + r0) // block_rows, (torch.arange(columns) + c0) // block_columns
            values.append(self.table[table_rows.long()[of_rows][:, of_columns], numbers])
        return values

    def check(self, verb, layout):
        """Call a verb on poisoned destinations between guards, and check the results."""
        strides = LAYOUTS[layout](*self.shape)
        outputs = [guarded(self.shape, self.dtype, strides=strides) for _ in self.codes]
        before = [codes.clone() for codes in self.codes]
        verb([out for out, _ in outputs], self.codes, self.table_rows, self.table, **self.how)
        for (out, check), expected in zip(outputs, self.expected(), strict=True):
            assert_bytes_equal(out.clone(memory_format=torch.contiguous_format), expected)
            check()
        assert all(map(torch.equal, self.codes, before))


@st.composite
def problems(draw, most=40):
    bits = draw(st.sampled_from([4, 8]))
    step = 8 // bits
    sides = st.integers(1, most) | st.sampled_from([16, 32, 48])
    rows, columns = draw(sides), draw(sides) * step
    block = (
        draw(st.integers(1, 50) | st.sampled_from([1, 16, 32, 128])),
        draw(st.integers(1, 50) | st.sampled_from([8, 16, 64])) * step,
    )
    start = draw(st.integers(0, block[0] - 1)), draw(st.integers(0, block[1] // step - 1)) * step
    return Problem(
        bits,
        (rows, columns),
        block,
        start,
        draw(st.sampled_from([BF16, F32])),
        draw(st.sampled_from([torch.uint8, torch.int32])),
        draw(st.sampled_from([1, 3, 256, 300])),
        draw(st.sampled_from([0, 0, 1, 16])),
        draw(st.integers(1, 2)),
    )


def pieces(nbytes, pairs_worth=2):
    """Shrink the pieces so that small matrices have several."""
    return mock.patch.multiple(twin, _PIECE_BYTES=nbytes, _TRANSPOSED_ROWS=8, _PAIRS_WORTH=pairs_worth)


@settings(max_examples=200)
@given(
    problem=problems(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    nbytes=st.sampled_from([1, 7, 64, 1 << 18]),
    pairs_worth=st.sampled_from([0, 2]),
)
def test_torch_version_equals_the_definition(problem, layout, nbytes, pairs_worth):
    with pieces(nbytes, pairs_worth):
        problem.check(dequantize_torch, layout)


@given(problem=problems(), data=st.data(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_part_with_its_start_is_the_part_of_the_whole(problem, data, layout):
    (rows, columns), block, start = problem.shape, problem.how["block"], problem.how["start"]
    bits = problem.how["bits"]
    step = 8 // bits
    r, c = (
        sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))
        for size in (rows, columns // step)
    )
    c = [step * n for n in c]
    whole, check = guarded(problem.shape, problem.dtype, strides=LAYOUTS[layout](rows, columns))
    first = [(at + begin) // of for at, begin, of in zip((r[0], c[0]), start, block, strict=True)]
    inside = tuple((at + begin) % of for at, begin, of in zip((r[0], c[0]), start, block, strict=True))
    last = [-(-(end + begin) // of) for end, begin, of in zip((r[1], c[1]), start, block, strict=True)]
    dequantize_torch(
        [whole[r[0] : r[1], c[0] : c[1]]],
        [problem.codes[0][r[0] : r[1], c[0] // step : c[1] // step]],
        [problem.table_rows[0][first[0] : last[0], first[1] : last[1]].contiguous()],
        problem.table,
        bits=bits,
        block=block,
        start=inside,
    )
    wanted = guarded(problem.shape, problem.dtype, strides=LAYOUTS[layout](rows, columns)).tensor
    wanted[r[0] : r[1], c[0] : c[1]] = problem.expected()[0][r[0] : r[1], c[0] : c[1]]
    assert_bytes_equal(whole, wanted)
    check()


@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize(
    ("code_format", "bits", "scales", "block"),
    [
        ("e4m3", 8, torch.rand(3, 2), (128, 128)),
        ("e4m3", 8, torch.rand(300, 1), (1, 256)),
        ("e4m3", 8, torch.rand(1, 1), (300, 256)),
        ("e5m2", 8, torch.randint(100, 140, (300, 8), dtype=torch.uint8), (1, 32)),
        ("e2m1", 4, torch.randint(0, 255, (300, 8), dtype=torch.uint8), (1, 32)),
        ("e2m1", 4, torch.rand(300, 16).to(torch.float8_e4m3fn), (1, 16)),
        ("int4", 4, torch.rand(300, 8).to(BF16), (1, 32)),
    ],
)
def test_matrices_of_each_format_are_the_products(code_format, bits, scales, block, layout):
    codes = random_bytes((300, 256 * bits // 8), 0)
    numbers = torch.stack([codes % 16, codes // 16], 2).flatten(1) if bits == 4 else codes
    if code_format in ("e4m3", "e5m2"):
        numbers = numbers.view(torch.float8_e4m3fn if code_format == "e4m3" else torch.float8_e5m2).float()
    elif code_format == "int4":
        numbers = numbers.float() - 8
    else:
        numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[numbers.long()]
    of_scales = scales.view(torch.float8_e8m0fnu).float() if scales.dtype == torch.uint8 else scales.float()
    of_blocks = of_scales.repeat_interleave(block[0], 0)[:300].repeat_interleave(block[1], 1)[:, :256]
    table = code_table(code_format, scales, F32)
    out, check = guarded((300, 256), F32, strides=LAYOUTS[layout](300, 256))
    dequantize_torch([out], [codes], [table.table_rows], table.table, bits=bits, block=block)
    wanted = numbers * of_blocks
    assert torch.equal(out.isnan(), wanted.isnan())
    assert_bytes_equal(out.nan_to_num(), wanted.nan_to_num())
    check()


def test_scratch_stays_within_its_bound():
    sizes = []

    class Storages(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                sizes.append(out.untyped_storage().nbytes())
            return out

    for bits, layout in product((4, 8), ("rows", "transposed", "every other row")):
        problem = Problem(bits, (300, 9000), (1, 16), (0, 0), BF16, torch.int32, 300)
        out = guarded(problem.shape, BF16, strides=LAYOUTS[layout](*problem.shape)).tensor
        operands = [out], problem.codes, problem.table_rows, problem.table
        known = {t.untyped_storage().data_ptr() for t in (out, *problem.codes, *problem.table_rows, problem.table)}
        with Storages():
            dequantize_torch(*operands, **problem.how)
    assert 0 < max(sizes) <= 2 << 20


def test_table_row_beyond_the_table_is_an_error_in_torch():
    problem = Problem(8, (4, 4), (2, 2), (0, 0), BF16, torch.uint8, 3)
    problem.table_rows[0][1, 1] = 3
    with pytest.raises(IndexError):
        dequantize_torch(
            [torch.empty(4, 4, dtype=BF16)], problem.codes, problem.table_rows, problem.table, **problem.how
        )


@pytest.fixture
def launched():
    """Return the launched variants, after checking the promise that the interpreter does not check."""
    seen = []

    def spy(variant, grid, table, integers):
        number = 2 if variant.dst == "uint16" else 4
        assert not (table[:, 0] % (number * variant.dst_vector)).any()
        assert not (table[:, 1] % variant.src_vector).any()
        seen.append(variant)
        return real(variant, grid, table, integers)

    real = launch.queue
    with mock.patch.object(launch, "queue", spy):
        yield seen


def small_tiles():
    """Shrink the tiles so that small matrices have several, the last ones partial."""
    return mock.patch.multiple(module, _TILE=(8, 64), _TRANSPOSED_TILE=(32, 32), _SCALAR_TILE=(16, 16))


@needs_triton
@settings(max_examples=100)
@given(problem=problems(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_kernel_equals_the_definition(problem, layout):
    with small_tiles():
        problem.check(dequantize, layout)


@needs_triton
def test_every_variant_decodes_right_and_its_machine_code_is_checked(launched):
    known = {variant for variant in launchable() if variant.kernel.name == "dequantize_tiles"}
    cases = product((4, 8), (BF16, F32), (torch.uint8, torch.int32), [(1, 16), (12, 48)], LAYOUTS, (0, 1))
    for bits, dtype, table_row_dtype, block, layout, gap in cases:
        problem = Problem(bits, (32, 48), block, (0, 0), dtype, table_row_dtype, 300, gap)
        out = guarded(problem.shape, dtype, strides=LAYOUTS[layout](*problem.shape)).tensor
        before = len(launched)
        with mock.patch.object(launch, "queue", lambda variant, *_: launched.append(variant)):
            dequantize([out], problem.codes, problem.table_rows, problem.table, **problem.how)
        if launched[-1] not in launched[:before]:
            problem.check(dequantize, layout)
    assert set(launched) == known


@needs_triton
@pytest.mark.parametrize(
    ("block", "start", "vector"),
    [
        ((128, 128), (0, 0), 8),
        ((128, 128), (5, 64), 8),
        ((128, 128), (5, 60), 1),
        ((100, 60), (0, 0), 1),
        ((100, 64), (0, 32), 8),
        ((1, 90), (0, 0), 8),  # one block for all columns
    ],
)
def test_vectors_are_as_long_as_blocks_allow(launched, block, start, vector):
    Problem(8, (33, 64 if block[1] == 90 else 160), block, start, BF16, torch.uint8, 9).check(dequantize, "rows")
    assert [variant.dst_vector for variant in launched] == [vector]


@needs_triton
@pytest.mark.parametrize("block", [(128, 128), (1, 40), (64, 40), (1, 1 << 20), (1 << 30, 1 << 30)])
def test_blocks_of_powers_of_two_or_whole_matrices_need_no_division(launched, block):
    Problem(8, (3, 40), block, (0, 0), BF16, torch.uint8, 9).check(dequantize, "rows")
    assert [variant.details.by_shifts for variant in launched] == [True]


@needs_triton
def test_empty_operands_launch_nothing(launched):
    table = address_valued((1, 256), BF16)
    for shape in ((0, 4), (4, 0)):
        codes = torch.empty(shape, dtype=torch.uint8)
        for verb in (dequantize, dequantize_torch):
            verb([codes.to(BF16)], [codes], [torch.empty(shape, dtype=torch.uint8)], table, bits=8, block=(1, 1))
            verb([], [], [], table, bits=8, block=(1, 1))
    assert not launched


def misfits():
    """Return changes to a valid call, by the misfit that they cause."""
    fits = Problem(4, (6, 8), (2, 4), (0, 0), BF16, torch.uint8, 3)
    out = torch.zeros(6, 8, dtype=BF16)
    good = {"dst": [out], "codes": fits.codes, "table_rows": fits.table_rows, "table": fits.table, **fits.how}
    codes, table_rows, table = fits.codes[0], fits.table_rows[0], fits.table
    changes = {
        "another shape": {"dst": [out[:5]]},
        "another dtype": {"dst": [out.float()]},
        "one dimension": {"dst": [out[0]]},
        "too many codes": {"codes": [codes, codes]},
        "no table rows": {"table_rows": []},
        "signed codes": {"codes": [codes.view(torch.int8)]},
        "wide table rows": {"table_rows": [table_rows.long()]},
        "a row of blocks missing": {"table_rows": [table_rows[:-1]]},
        "half a byte in a block": {"block": (2, 3)},
        "begins within a byte": {"start": (0, 1)},
        "begins beyond the block": {"start": (2, 0)},
        "an empty block": {"block": (0, 4)},
        "a table of bytes": {"table": address_valued((3, 256), BF16)},
        "no row in the table": {"table": table[:0]},
        "a table with gaps": {"table": address_valued((3, 32), BF16)[:, ::2]},
        "elsewhere": {"table": table.to("meta")},
    }
    return {name: good | change for name, change in changes.items()}


@pytest.mark.parametrize("verb", [dequantize_torch, pytest.param(dequantize, marks=needs_triton)])
@pytest.mark.parametrize("name", misfits())
def test_operands_that_do_not_fit_are_refused_before_anything_is_written(name, verb):
    operands = misfits()[name]
    with pytest.raises(ConversionError):
        verb(**operands)
    assert not any(bool(out.any()) for out in operands["dst"])


@pytest.mark.parametrize("verb", [dequantize_torch, pytest.param(dequantize, marks=needs_triton)])
@pytest.mark.parametrize(("bits", "dtype"), [(2, BF16), (8, torch.float64)])
def test_other_codes_and_numbers_are_refused(bits, dtype, verb):
    with pytest.raises(UnsupportedError, match="does not support"):
        verb([], [], [], torch.zeros(1, 1 << bits, dtype=dtype), bits=bits, block=(1, 1))


@needs_triton
def test_destinations_of_two_kinds_are_refused_by_the_kernel():
    problem = Problem(8, (4, 4), (2, 2), (0, 0), BF16, torch.uint8, 3, count=2)
    out = [torch.zeros(4, 4, dtype=BF16), torch.zeros(4, 4, dtype=BF16).t()]
    with pytest.raises(ConversionError, match="of several kinds"):
        dequantize(out, problem.codes, problem.table_rows, problem.table, **problem.how)
    dequantize_torch(out, problem.codes, problem.table_rows, problem.table, **problem.how)
    for actual, wanted in zip(out, problem.expected(), strict=True):
        assert_bytes_equal(actual.contiguous(), wanted)
