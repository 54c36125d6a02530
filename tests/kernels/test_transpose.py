"""Tests of transpose in Triton's interpreter: against loops over coordinates, at any address, between guards."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from automodel_conv.kernels.transpose import transpose
from tests.kernels.lots import lot, phases, problems, run

pytestmark = pytest.mark.usefixtures("small_tiles", "launched")


@settings(max_examples=100)
@given(problem=problems(), data=st.data())
def test_transpose_puts_every_element_where_loops_put_it(problem, data):
    dtype, src_dtype, rows, columns, count, dst_gap, src_gap = problem
    src = lot((rows, columns), src_dtype, data.draw(phases(count, src_dtype)), src_gap)
    dst = lot((columns, rows), dtype, data.draw(phases(count, dtype, whole=True)), dst_gap, poisoned=True)
    run(transpose, [dst], [src], lambda n, r, c: (0, c, r))
