"""Quantized experts of one layer, dequantized and merged: gate and up of each expert, as calls of ``dequantize``.

Scales are bfloat16 values or powers of two, so that float32 holds every product. The usual code in torch therefore
computes the same bytes, and a ``Quantized`` is verified against it, expert by expert, on a poisoned output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.kernels.code_tables import CODE_VALUES, CodeTable, bits_of, code_table
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from automodel_conv.testing import POISON
from benchmarks.operations import Experts, Mismatch, Way


class Quantized(NamedTuple):
    """Gate and up ``[I, H]`` of each expert to ``out``, ``[E, 2I, H]`` or ``[E, H, 2I]`` in bfloat16."""

    code_format: str
    block: tuple[int, int]
    out: Tensor
    codes: Tensor  # uint8 [2E, I, bytes of H codes], gate before up for each expert
    scales: Tensor  # [2E, SR, SC]
    made: CodeTable
    is_transposed: bool

    @property
    def bytes_moved(self) -> int:
        """Number of bytes read and written, with each value of the table counted once."""
        return sum(tensor.nbytes for tensor in (self.out, self.codes, *self.made))

    def table(self) -> CodeTable:
        return code_table(self.code_format, self.scales.flatten(0, 1), torch.bfloat16)

    def decode(self, verb: Callable[..., None], table: CodeTable) -> Tensor:
        halves = [half for whole in self.out.unbind() for half in whole.chunk(2, int(self.is_transposed))]
        verb(
            [half.t() for half in halves] if self.is_transposed else halves,
            [*self.codes.unbind()],
            [*table.table_rows.view(self.scales.shape).unbind()],
            table.table,
            bits=bits_of(self.code_format),
            block=self.block,
        )
        return self.out

    def ways(self) -> dict[str, Way]:
        from automodel_conv.kernels.dequantize import dequantize  # imports Triton

        return {
            "ours": lambda: self.decode(dequantize, self.made),
            "ours, tables too": lambda: self.decode(dequantize, self.table()),
            "torch, by fp32": self.idiom,
        }

    def twin(self) -> Tensor:
        return self.decode(dequantize_torch, self.made)

    def idiom(self) -> Tensor:
        """Decode one expert after another, as transformers dequantizes fp8."""
        return torch.stack([self.expected(expert) for expert in range(len(self.out))])

    def expected(self, expert: int) -> Tensor:
        both = torch.cat([self._product(2 * expert), self._product(2 * expert + 1)])
        return both.t().contiguous() if self.is_transposed else both

    def _product(self, matrix: int) -> Tensor:
        codes, scales = self.codes[matrix], self.scales[matrix]
        if self.code_format == "e4m3":
            numbers = codes.view(torch.float8_e4m3fn).float()
        else:
            values = torch.tensor(CODE_VALUES[self.code_format], device=codes.device)
            numbers = torch.stack([values[(codes & 15).int()], values[(codes >> 4).int()]], 2).flatten(1)
        if scales.dtype == torch.uint8:
            scales = (scales.float() - 127).exp2()
        rows, columns = numbers.shape
        wide = scales.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[:, :columns]
        return (numbers * wide).to(torch.bfloat16)

    def verify(self, name: str, way: Way) -> None:
        """Run a way on a poisoned output and compare every byte.

        Raises:
            Mismatch: a byte differs; with the expert.
        """
        self.out.view(torch.uint8).fill_(POISON)
        result = way()
        for expert in range(len(self.out)):
            if not torch.equal(result[expert].view(torch.int16), self.expected(expert).view(torch.int16)):
                raise Mismatch(f"{name}: expert {expert} is not what torch makes")


def fp8(size: Experts, device: torch.device, *, is_transposed: bool = False) -> Quantized:
    """Return e4m3 codes with a float32 scale per block of 128 x 128, as DeepSeek-V3 is published."""
    codes = _random_bytes(size, size.hidden, device)
    codes.masked_fill_(codes & 127 == 127, 0)  # torch does not define which NaN a NaN becomes
    grid = 2 * size.experts, -(-size.intermediate // 128), -(-size.hidden // 128)
    scales = torch.rand(grid, device=device).to(torch.bfloat16).float()
    return _quantized("e4m3", (128, 128), size, codes, scales, is_transposed)


def mxfp4(size: Experts, device: torch.device, *, is_transposed: bool = False) -> Quantized:
    """Return e2m1 codes with an e8m0 scale per 32 codes of a row, as gpt-oss is published."""
    codes = _random_bytes(size, size.hidden // 2, device)
    grid = 2 * size.experts, size.intermediate, -(-size.hidden // 32)
    scales = torch.randint(110, 130, grid, dtype=torch.uint8, device=device)
    return _quantized("e2m1", (1, 32), size, codes, scales, is_transposed)


QUANTIZED: Mapping[str, Callable[[Experts, torch.device], Quantized]] = {
    "dequantize fp8": fp8,
    "dequantize fp8 transposed": lambda size, device: fp8(size, device, is_transposed=True),
    "dequantize mxfp4": mxfp4,
    "dequantize mxfp4 transposed": lambda size, device: mxfp4(size, device, is_transposed=True),
}


def _random_bytes(size: Experts, row_nbytes: int, device: torch.device) -> Tensor:
    shape = 2 * size.experts, size.intermediate, row_nbytes
    memory = torch.randint(0, 256, (torch.Size(shape).numel() + 16,), dtype=torch.uint8, device=device)
    return memory[size.phase_bytes : size.phase_bytes - 16].view(shape)


def _quantized(
    code_format: str, block: tuple[int, int], size: Experts, codes: Tensor, scales: Tensor, is_transposed: bool
) -> Quantized:
    shape = (size.hidden, 2 * size.intermediate) if is_transposed else (2 * size.intermediate, size.hidden)
    out = torch.empty((size.experts, *shape), dtype=torch.bfloat16, device=codes.device)
    made = code_table(code_format, scales.flatten(0, 1), torch.bfloat16)
    return Quantized(code_format, block, out, codes, scales, made, is_transposed)
