"""The kernels in Triton's interpreter: against loops over coordinates, at any address, between guards."""

import itertools
import math
import os
import struct
import subprocess
import sys
from contextlib import ExitStack
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from automodel_conv.errors import ConversionError, UnsupportedError
from automodel_conv.kernels import deinterleave as deinterleaving
from automodel_conv.kernels import interleave as interleaving
from automodel_conv.kernels import jit, launch, strided_copy, transpose
from automodel_conv.kernels.address_table import alignment, at_addresses, bytes_moved, matrices_at
from automodel_conv.kernels.deinterleave import deinterleave
from automodel_conv.kernels.interleave import interleave
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.kernels.support import CASTABLE, DTYPE_PAIRS, PHASES, VERBS, casting_cases, shapes
from tests.machine_code.variants import DTYPE_PAIRS as DTYPES_CHECKED
from tests.machine_code.variants import launchable

needs_triton = pytest.mark.skipif(not jit.IS_INSTALLED, reason="triton is not installed")

SIDES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40]
POISON = 0x5C
BYTES = {"uint8": 1, "uint16": 2, "uint32": 4, "bfloat16": 2, "float16": 2, "float32": 4}


class Lot(NamedTuple):
    """Equal matrices at arbitrary places of one buffer of raw bytes."""

    raw: bytearray
    offsets: list[int]
    shape: tuple[int, int]
    row_stride: int
    dtype: torch.dtype

    def at(self, matrix, row, column):
        return self.offsets[matrix] + (row * self.row_stride + column) * self.dtype.itemsize

    def read(self, matrix, row, column):
        at = self.at(matrix, row, column)
        return bytes(self.raw[at : at + self.dtype.itemsize])

    def write(self, matrix, row, column, value):
        at = self.at(matrix, row, column)
        self.raw[at : at + self.dtype.itemsize] = value

    @property
    def tensor(self):
        return torch.frombuffer(self.raw, dtype=torch.uint8)

    @property
    def matrices(self):
        return matrices_at(self.tensor, self.offsets, self.shape, self.row_stride, self.dtype)


def lot(shape, dtype, phases, gap, *, poisoned=False):
    """One matrix for each phase, which starts that many bytes past a multiple of 16; ``gap`` elements between rows."""
    rows, columns = shape
    stride = columns + gap
    size = max(rows * stride * dtype.itemsize, 1)
    step = -(-size // 16) * 16 + 64
    raw = bytearray([POISON]) * (step * len(phases) + 64)
    aligned = -torch.frombuffer(raw, dtype=torch.uint8).data_ptr() % 16
    made = Lot(raw, [aligned + k * step + 16 + phase for k, phase in enumerate(phases)], shape, stride, dtype)
    if not poisoned:
        values = iter(address_valued((rows * columns * len(phases),), dtype).view(torch.uint8).tolist())
        for k in range(len(phases)):
            for r in range(rows):
                for c in range(columns):
                    made.write(k, r, c, bytes(next(values) for _ in range(dtype.itemsize)))
    return made


def number(value, dtype):
    """The number that the bits of an element stand for."""
    if dtype == torch.bfloat16:
        return struct.unpack("<f", b"\0\0" + value)[0]
    return struct.unpack("<e" if dtype == torch.float16 else "<f", value)[0]


def rounded(value, src, dst):
    """The element of ``dst`` nearest to one of ``src``, halfway to the even one; doubles hold every step."""
    if src == dst:
        return value
    x = number(value, src)
    fraction_bits, least, bias = {
        torch.bfloat16: (7, -126, 127),
        torch.float16: (10, -14, 15),
        torch.float32: (23, -126, 127),
    }[dst]
    sign = (math.copysign(1, x) < 0) << (dst.itemsize * 8 - 1)
    infinity = (2 * bias + 1) << fraction_bits
    if math.isnan(x):
        bits = infinity + 1
    elif math.isinf(x):
        bits = infinity
    elif x == 0:
        bits = 0
    else:
        exponent = max(math.frexp(abs(x))[1] - 1, least)
        # round() is to nearest even.
        units = round(math.ldexp(abs(x), fraction_bits - exponent))
        bits = min(((exponent - least) << fraction_bits) + units, infinity)
    return (bits | sign).to_bytes(dst.itemsize, "little")


def same(found, expected, dtype):
    if found == expected:
        return True
    return dtype in CASTABLE and math.isnan(number(found, dtype)) and math.isnan(number(expected, dtype))


def check(dst, expected, *, cast):
    """Bytes as expected, gaps and margins too; which NaN a cast makes of a NaN is open."""
    for made, wanted in zip(dst, expected, strict=True):
        if made.raw == wanted.raw:
            continue
        assert cast
        for k in range(len(made.offsets)):
            for r in range(made.shape[0]):
                for c in range(made.shape[1]):
                    assert same(made.read(k, r, c), wanted.read(k, r, c), made.dtype), (k, r, c)
                    made.write(k, r, c, wanted.read(k, r, c))
        assert made.raw == wanted.raw, "written outside of the matrices"


def run(verb, dst, src, element):
    """Call a verb and compare with a loop: element (k, r, c) of ``dst[n]`` is ``element(n, r, c)`` of a source."""
    expected = [d._replace(raw=bytearray(d.raw)) for d in dst]
    for n, wanted in enumerate(expected):
        for k in range(len(wanted.offsets)):
            for r in range(wanted.shape[0]):
                for c in range(wanted.shape[1]):
                    source, row, column = element(n, r, c)
                    value = src[source].read(k, row, column)
                    wanted.write(k, r, c, rounded(value, src[source].dtype, wanted.dtype))
    before = [bytes(s.raw) for s in src]
    verb(*(d.matrices for d in dst), *(s.matrices for s in src))
    check(dst, expected, cast=dst[0].dtype != src[0].dtype)
    assert [bytes(s.raw) for s in src] == before


def small_tiles():
    """Tiles that small matrices have several of, the last ones in part."""
    tiles = dict.fromkeys([(1, 1), (2, 2), (4, 4), (2, 4), (4, 2)], (16, 16))
    return (
        mock.patch.multiple(strided_copy, _WIDE=(4, 64), _NARROW=(8, 32), _SCALAR=(4, 32)),
        mock.patch.multiple(transpose, _TILES=tiles, SCALAR_TILE=(16, 16)),
        mock.patch.multiple(interleaving, _TILES=tiles, SCALAR_TILE=(16, 16)),
        mock.patch.multiple(deinterleaving, _TILES=tiles, SCALAR_TILE=(16, 16)),
    )


@pytest.fixture(autouse=True)
def _small_tiles():
    with ExitStack() as stack:
        for patch in small_tiles():
            stack.enter_context(patch)
        yield


@st.composite
def phases(draw, count, dtype, *, whole=False):
    """Bytes past a multiple of 16, mostly the same for all; ``whole``: elements stay at multiples of their size."""
    step = dtype.itemsize if whole else 1
    one = st.sampled_from(sorted({0, 8, 4, 2, 1, 3, 12}) if step == 1 else [0, 0, 8, 4 if step <= 4 else 0, step])
    common = draw(one)
    return [draw(one) if draw(st.integers(0, 3)) == 0 else common for _ in range(count)]


@st.composite
def problems(draw, multiple=1):
    """Dtypes, sides, how many, and gaps, each now and then friendly to long vectors."""
    dst, src = draw(st.sampled_from(DTYPE_PAIRS))
    sides = st.sampled_from(SIDES) | st.sampled_from([16, 32, 48])
    rows, columns, count = draw(sides), draw(sides), draw(st.sampled_from([0, 1, 2, 3]))
    assume(rows * columns * count <= 2500)
    gap = st.sampled_from([0, 0, 16, 8, 1, 3])
    return dst, src, rows, columns, count, draw(gap), draw(gap)


@needs_triton
@settings(max_examples=100)
@given(problem=problems(), data=st.data())
def test_strided_copy_puts_every_element_where_loops_put_it(problem, data):
    dtype, src_dtype, rows, columns, count, dst_gap, src_gap = problem
    whole = dtype != src_dtype
    src = lot((rows, columns), src_dtype, data.draw(phases(count, src_dtype)), src_gap)
    dst = lot((rows, columns), dtype, data.draw(phases(count, dtype, whole=whole)), dst_gap, poisoned=True)
    run(strided_copy.strided_copy, [dst], [src], lambda n, r, c: (0, r, c))


@needs_triton
@settings(max_examples=100)
@given(problem=problems(), data=st.data())
def test_transpose_puts_every_element_where_loops_put_it(problem, data):
    dtype, src_dtype, rows, columns, count, dst_gap, src_gap = problem
    src = lot((rows, columns), src_dtype, data.draw(phases(count, src_dtype)), src_gap)
    dst = lot((columns, rows), dtype, data.draw(phases(count, dtype, whole=True)), dst_gap, poisoned=True)
    run(transpose.transpose, [dst], [src], lambda n, r, c: (0, c, r))


@needs_triton
@settings(max_examples=100)
@given(problem=problems(), data=st.data())
def test_interleave_puts_every_element_where_loops_put_it(problem, data):
    dtype, src_dtype, rows, columns, count, dst_gap, src_gap = problem
    src = [lot((rows, columns), src_dtype, data.draw(phases(count, src_dtype)), src_gap) for _ in range(2)]
    dst = lot((columns, 2 * rows), dtype, data.draw(phases(count, dtype, whole=True)), dst_gap, poisoned=True)
    run(interleave, [dst], src, lambda n, r, c: (c % 2, c // 2, r))


@needs_triton
@settings(max_examples=100)
@given(problem=problems(), data=st.data())
def test_deinterleave_puts_every_element_where_loops_put_it(problem, data):
    dtype, src_dtype, rows, columns, count, dst_gap, src_gap = problem
    src = lot((rows, 2 * columns), src_dtype, data.draw(phases(count, src_dtype)), src_gap)
    dst = [
        lot((columns, rows), dtype, data.draw(phases(count, dtype, whole=True)), dst_gap, poisoned=True)
        for _ in range(2)
    ]
    run(deinterleave, dst, [src], lambda n, r, c: (0, c, 2 * r + n))


# --- every variant ----------------------------------------------------------------------------------------------------

ELEMENTS = {
    "strided_copy": lambda n, r, c: (0, r, c),
    "transpose": lambda n, r, c: (0, c, r),
    "interleave": lambda n, r, c: (c % 2, c // 2, r),
    "deinterleave": lambda n, r, c: (0, c, 2 * r + n),
}


@pytest.fixture(autouse=jit.IS_INSTALLED)
def launched():
    """The variants launched, with the number of matrices; and the promise kept that the interpreter does not check."""
    seen = []

    def spy(variant, grid, table, integers):
        pairs_at = (
            {"interleave_tiles": "dst", "deinterleave_tiles": "src"}.get(variant.kernel.name) if variant.pairs else ""
        )
        src, dst = (
            nbytes * vector * (2 if pairs_at == side else 1)
            for side, nbytes, vector in (
                ("src", 1 if variant.bytewise else BYTES[variant.src], variant.src_vector),
                ("dst", BYTES[variant.dst], variant.dst_vector),
            )
        )
        destinations = 2 if variant.kernel.name == "deinterleave_tiles" else 1
        assert not (table[:, :destinations] % dst).any()
        assert not (table[:, destinations:] % src).any()
        seen.append((variant, grid[1]))
        return real(variant, grid, table, integers)

    real = launch.queue
    with mock.patch.object(launch, "queue", spy):
        yield seen


@needs_triton
@pytest.mark.parametrize("name", VERBS)
def test_every_variant_of_a_verb_moves_right_and_its_machine_code_is_checked(name, launched):
    verb, dst_count, src_count = VERBS[name]
    known = set(launchable())
    cases = itertools.product(DTYPES_CHECKED, PHASES, PHASES, [(16, 16), (3, 48)])
    for (dst_dtype, src_dtype), dst_phase, src_phase, (rows, columns) in cases:
        if dst_phase % dst_dtype.itemsize and (name != "strided_copy" or dst_dtype != src_dtype):
            continue
        dst_shape, src_shape = shapes(name, rows, columns)
        dst = [lot(dst_shape, dst_dtype, [dst_phase], 0, poisoned=True) for _ in range(dst_count)]
        src = [lot(src_shape, src_dtype, [src_phase], 0) for _ in range(src_count)]
        before = len(launched)
        with mock.patch.object(launch, "queue", lambda variant, *_: launched.append((variant, 1))):
            verb(*(d.matrices for d in dst), *(s.matrices for s in src))
        if launched[-1] not in launched[:before]:
            run(verb, dst, src, ELEMENTS[name])
    kernels = {"transpose": {"transpose_tiles", "interleave_tiles"}, "strided_copy": {"copy_tiles"}}
    expected = {variant for variant in known if variant.kernel.name in kernels.get(name, {f"{name}_tiles"})}
    found = {variant for variant, _ in launched}
    assert found <= expected
    assert {variant for variant in expected if not (name == "transpose" and "inter" in variant.kernel.name)} <= found


@needs_triton
def test_one_odd_address_costs_the_others_nothing(launched):
    src = lot((16, 16), torch.bfloat16, [0, 0, 1, 0, 8, 1], 0)
    dst = lot((16, 16), torch.bfloat16, [0, 0, 0, 0, 0, 0], 0, poisoned=True)
    with mock.patch.object(launch, "upload", wraps=launch.upload) as upload:
        run(transpose.transpose, [dst], [src], ELEMENTS["transpose"])
    assert sorted((v.src_vector, v.bytewise, count) for v, count in launched) == [
        (1, True, 2),
        (4, False, 1),
        (8, False, 3),
    ]
    assert upload.call_count == 1


@needs_triton
def test_more_matrices_than_a_grid_has_rows_take_more_launches(launched):
    src = lot((2, 3), torch.float32, [0] * 7, 0)
    dst = lot((2, 3), torch.float32, [0] * 7, 0, poisoned=True)
    with mock.patch.object(launch, "_MAX_ROWS", 3):
        run(strided_copy.strided_copy, [dst], [src], ELEMENTS["strided_copy"])
    assert [count for _, count in launched] == [3, 3, 1]


@needs_triton
def test_a_grid_of_more_programs_than_triton_counts_takes_more_launches(launched):
    src = lot((40, 20), torch.uint8, [0] * 5, 1)
    dst = lot((40, 20), torch.uint8, [0] * 5, 1, poisoned=True)
    with mock.patch.object(launch, "_MAX_PROGRAMS", 25):  # tiles are 4 x 32: 10 for a matrix
        run(strided_copy.strided_copy, [dst], [src], ELEMENTS["strided_copy"])
    assert [count for _, count in launched] == [2, 2, 1]


@needs_triton
@pytest.mark.parametrize("shape", [(3, 300_000_001), (300_000_001, 3), (1, 2**30 - 1)])
def test_a_run_of_any_shape_is_taken_up_to_the_length_promised(shape):
    # Addresses that nothing looks at: the launch is left out.
    runs = at_addresses(np.array([64]), shape, shape[1], torch.uint8, torch.device("cpu"))
    assert strided_copy.MAX_RUN_BYTES - runs.nbytes < 2**28
    with mock.patch.object(launch, "queue") as launched:
        strided_copy.strided_copy(runs, runs)
    assert launched.call_count == 1


@needs_triton
def test_runs_without_gaps_are_cut_into_full_tiles_whatever_their_shape(launched):
    for shape in [(1, 128), (128, 1), (8, 16)]:
        src = lot(shape, torch.float32, [0], 0)
        dst = lot(shape, torch.bfloat16, [0], 0, poisoned=True)
        run(strided_copy.strided_copy, [dst], [src], ELEMENTS["strided_copy"])
    assert {variant.src_vector for variant, _ in launched} == {4}


@needs_triton
@pytest.mark.parametrize(("dst_dtype", "src_dtype"), [(d, s) for d in CASTABLE for s in CASTABLE if d != s], ids=str)
def test_casts_round_to_nearest_even(dst_dtype, src_dtype):
    src = casting_cases(src_dtype)
    dst = torch.full(src.shape, -1, dtype=torch.int32 if dst_dtype.itemsize == 4 else torch.int16).view(dst_dtype)
    with mock.patch.multiple(strided_copy, _WIDE=(16, 4096)):
        strided_copy.strided_copy([dst], [src])
    size = src_dtype.itemsize
    raw = src.reshape(-1).view(torch.uint8).numpy().tobytes()
    made = dst.reshape(-1).view(torch.uint8).numpy().tobytes()
    for at in range(src.numel()):
        value = raw[size * at : size * (at + 1)]
        found = made[dst_dtype.itemsize * at : dst_dtype.itemsize * (at + 1)]
        assert same(found, rounded(value, src_dtype, dst_dtype), dst_dtype), value.hex()


@needs_triton
@pytest.mark.parametrize("name", VERBS)
def test_loose_tensors_are_moved_as_their_twin_moves_them(name):
    verb, dst_count, src_count = VERBS[name]
    twin = {
        "strided_copy": strided_copy.strided_copy_torch,
        "transpose": transpose.transpose_torch,
        "interleave": interleaving.interleave_torch,
        "deinterleave": deinterleaving.deinterleave_torch,
    }[name]
    dst_shape, src_shape = shapes(name, 6, 20)
    sources = [
        [address_valued((src_shape[0], src_shape[1] + 5), torch.bfloat16, 1000 * k)[:, 2:-3] for k in range(3)]
        for _ in range(src_count)
    ]
    made, expected = (
        [[torch.zeros(dst_shape, dtype=torch.bfloat16) for _ in range(3)] for _ in range(dst_count)] for _ in range(2)
    )
    verb(*made, *sources)
    twin(*expected, *sources)
    for some, others in zip(made, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert_bytes_equal(one, other)


@needs_triton
def test_what_lies_beyond_4_gib_is_reached():
    code = """
import torch
from automodel_conv.kernels.deinterleave import deinterleave
from automodel_conv.kernels.interleave import interleave
from automodel_conv.kernels.strided_copy import strided_copy
from automodel_conv.kernels.transpose import transpose

ROWS, COLUMNS, STRIDE = 1100, 8, 2**21
memory = torch.empty(ROWS * STRIDE, dtype=torch.bfloat16)  # pages that nobody touches are never there
far = memory.as_strided((ROWS, COLUMNS), (STRIDE, 1))
assert (ROWS - 1) * STRIDE > 2**31 and (ROWS - 64) * STRIDE * 2 > 2**32
numbers = torch.arange(ROWS * COLUMNS, dtype=torch.int16).view(torch.bfloat16).reshape(ROWS, COLUMNS)
same = lambda a, b: torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))
near = torch.zeros_like(numbers)
turned = numbers.t().contiguous()
for verb, operands in (
    (strided_copy, ([far], [numbers])),
    (transpose, ([far], [turned])),
    (interleave, ([far], [turned[0::2].contiguous()], [turned[1::2].contiguous()])),
):
    far.zero_()
    verb(*operands)
    assert same(far, numbers), verb
strided_copy([near], [far])
assert same(near, numbers)
# Words of 2 bytes now, so that their number too leaves 32 bits.
strided_copy([near.zero_()[:, 1:]], [far[:, 1:]])
assert same(near[:, 1:], numbers[:, 1:])
far.zero_()
strided_copy([far[:, 1:]], [numbers[:, 1:]])
assert same(far[:, 1:], numbers[:, 1:])
strided_copy([far], [numbers])
transpose([turned.zero_()], [far])
assert same(turned, numbers.t())
first, second = torch.zeros(4, ROWS, dtype=torch.bfloat16), torch.zeros(4, ROWS, dtype=torch.bfloat16)
deinterleave([first], [second], [far])
assert same(first, numbers[:, 0::2].t()) and same(second, numbers[:, 1::2].t())
far.zero_(), near.zero_()
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- refusals ---------------------------------------------------------------------------------------------------------


def zeros(*shape, dtype=torch.bfloat16, count=2):
    return [torch.zeros(shape, dtype=dtype) for _ in range(count)]


MISFITS = {
    "one more source": ("strided_copy", lambda: (zeros(2, 3), zeros(2, 3, count=3))),
    "another shape": ("strided_copy", lambda: (zeros(2, 3), zeros(3, 2))),
    "not turned": ("transpose", lambda: (zeros(2, 3), zeros(2, 3))),
    "one dimension": ("strided_copy", lambda: (zeros(6), zeros(6))),
    "elements apart": ("strided_copy", lambda: (zeros(2, 3), [t[:, ::2] for t in zeros(2, 6)])),
    "two shapes": ("strided_copy", lambda: (zeros(2, 3), [*zeros(2, 3, count=1), *zeros(3, 2, count=1)])),
    "two dtypes": (
        "strided_copy",
        lambda: (zeros(2, 3), [*zeros(2, 3, count=1), *zeros(2, 3, count=1, dtype=torch.float32)]),
    ),
    "two strides": ("strided_copy", lambda: (zeros(2, 3), [*zeros(2, 3, count=1), zeros(2, 4)[0][:, :3]])),
    "half as wide": ("interleave", lambda: (zeros(3, 2), zeros(2, 3), zeros(2, 3))),
    "unlike halves": ("interleave", lambda: (zeros(3, 4), zeros(2, 3), zeros(2, 3, dtype=torch.float32))),
    "an odd source": ("deinterleave", lambda: (zeros(3, 2), zeros(3, 2), zeros(2, 7))),
    "a meta tensor": ("strided_copy", lambda: (zeros(2, 3), [t.to("meta") for t in zeros(2, 3)])),
    "too wide": (
        "strided_copy",
        lambda: ([torch.empty(9 * 2**26).as_strided((9, 1), (2**26, 1)).zero_()], [torch.zeros(1).expand(9, 1)]),
    ),
}


@needs_triton
@pytest.mark.parametrize("misfit", MISFITS)
def test_operands_that_do_not_fit_are_refused_before_anything_is_written(misfit):
    name, operands = MISFITS[misfit]
    made = operands()
    with pytest.raises(ConversionError, match="expected"):
        VERBS[name][0](*made)
    assert all(not bool(t.any()) for some in made for t in some if t.device.type == "cpu")


@needs_triton
@pytest.mark.parametrize("name", ["strided_copy", "transpose"])
@pytest.mark.parametrize(
    ("dst", "src"),
    [(torch.bfloat16, torch.float64), (torch.int32, torch.float32), (torch.int16, torch.bfloat16)],
    ids=str,
)
def test_casts_that_kernels_do_not_know_are_refused(name, dst, src):
    with pytest.raises(UnsupportedError, match="between these dtypes"):
        VERBS[name][0](zeros(3, 3, dtype=dst), zeros(3, 3, dtype=src))


@needs_triton
def test_transposes_between_elements_are_refused():
    dst = lot((8, 8), torch.bfloat16, [1], 0, poisoned=True)
    src = lot((8, 8), torch.bfloat16, [0], 0)
    with pytest.raises(ConversionError, match="whole elements"):
        transpose.transpose(dst.matrices, src.matrices)


def test_matrices_that_leave_their_memory_are_refused():
    memory = torch.zeros(100, dtype=torch.uint8)
    matrices_at(memory, [0, 64], (2, 3), 12, torch.bfloat16)
    for offsets, stride in (([0, 71], 12), ([-1], 12), ([0], -1)):
        with pytest.raises(ConversionError, match="leaves the tensor"):
            matrices_at(memory, offsets, (2, 3), stride, torch.bfloat16)
    with pytest.raises(ConversionError, match="contiguous"):
        matrices_at(memory[::2], [0], (2, 3), 3, torch.bfloat16)


def test_host_tensors_are_refused_where_the_interpreter_is_off():
    code = """
import torch
from automodel_conv.errors import UnsupportedError
from automodel_conv.kernels.transpose import transpose
try:
    transpose([torch.zeros(2, 3)], [torch.ones(3, 2)])
except UnsupportedError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "interpreter, which is off" in done.stdout or "not installed" in done.stdout


@needs_triton
def test_what_triton_lacks_on_a_gpu_is_told_beforehand(monkeypatch):
    class Driver:
        def __init__(self, *errors):
            self.active = mock.Mock(**{"get_current_target.side_effect": errors or None})

    def reason(driver):
        with mock.patch("triton.runtime.driver", driver), mock.patch.object(jit, "INTERPRETED", False):
            return launch.why_not.__wrapped__(torch.device("cuda", 0))

    monkeypatch.setenv("CC", sys.executable)
    assert reason(Driver()) is None
    no_headers = subprocess.CalledProcessError(1, ["gcc", "main.c"])
    for error in (no_headers, RuntimeError("0 active drivers"), AssertionError("libcuda.so cannot found!")):
        assert str(error) in reason(Driver(error))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in reason(Driver())
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", {"cc": "/usr/bin/cc"}.get)  # which Triton does not look for
    assert "gcc and clang" in reason(Driver())


# --- counting ---------------------------------------------------------------------------------------------------------


def test_every_byte_of_every_operand_counts_as_moved_once():
    assert bytes_moved(zeros(3, 4), zeros(2, 3, dtype=torch.float32), zeros(2, 3)) == 2 * (24 + 24 + 12)
    assert bytes_moved(zeros(0, 4), []) == 0


def test_alignment_is_the_largest_power_of_two_that_divides():
    numbers = np.arange(1, 200)
    assert alignment(numbers).tolist() == [max(a for a in (1, 2, 4, 8, 16) if n % a == 0) for n in numbers.tolist()]
