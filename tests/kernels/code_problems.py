"""Codes and tables to decode, with the results by the definition."""

import pytest
import torch
from hypothesis import strategies as st

from automodel_conv.kernels import jit
from automodel_conv.testing import address_valued, assert_bytes_equal, guarded

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
    """Operands of a call, with the results by the definition."""

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
        decoded = []
        (rows, columns), (block_rows, block_columns), (r0, c0) = self.shape, self.how["block"], self.how["start"]
        for codes, table_rows in zip(self.codes, self.table_rows, strict=True):
            numbers = codes.long()
            if self.how["bits"] == 4:
                numbers = torch.stack([numbers % 16, numbers // 16], 2).flatten(1)
            of_rows, of_columns = (torch.arange(rows) + r0) // block_rows, (torch.arange(columns) + c0) // block_columns
            decoded.append(self.table[table_rows.long()[of_rows][:, of_columns], numbers])
        return decoded

    def check(self, verb, layout):
        """Call a verb on poisoned destinations between guards, and check the results."""
        strides = LAYOUTS[layout](*self.shape)
        decoded = [guarded(self.shape, self.dtype, strides=strides) for _ in self.codes]
        before = [codes.clone() for codes in self.codes]
        verb([out for out, _ in decoded], self.codes, self.table_rows, self.table, **self.how)
        for (out, check), expected in zip(decoded, self.expected(), strict=True):
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
        draw(st.integers(1, 100) | st.sampled_from([1, 16, 32, 128])),
    )
    start = draw(st.integers(0, block[0] - 1)), draw(st.integers(0, block[1] - 1))
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
