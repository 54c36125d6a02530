"""Experts as vLLM arranges them for kernels, and the order of FlashInfer's TRT-LLM kernel, element by element."""

import torch
from torch.nn.functional import pad

# The row of 32 that each row of 32 becomes.
# Source: flashinfer-python 0.7.2.post1, `srcToDstBlk32RowMap` in utils.py; vLLM 0.33.0 chooses blocks of 32 rows by
# `epilogue_tile_m = 128` in `convert_moe_weights_to_flashinfer_trtllm_block_layout`.
# fmt: off
PLACE_OF_ROW = [
    0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
    4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31,
]
# fmt: on

BLOCK = 64
"""Columns of a block: 128 bytes of bfloat16."""


def alternating(rows):
    """Return the rows of gate and up, which follow each other, as up and gate alternate in the kernel.

    Source: flashinfer-python 0.7.2.post1, `get_reorder_rows_for_gated_act_gemm_row_indices`, whose result vLLM 0.33.0
    moves by half of the rows.
    """
    half = len(rows) // 2
    result = []
    for i in range(half):
        result += [rows[half + i], rows[i]]
    return result


def in_blocks(rows):
    """Return the elements of the rows of one expert in the order in which the kernel reads them.

    Source: flashinfer-python 0.7.2.post1, `get_shuffle_matrix_a_row_indices` and `convert_to_block_layout`.
    """
    shuffled = [None] * len(rows)
    for r, row in enumerate(rows):
        shuffled[r // 32 * 32 + PLACE_OF_ROW[r % 32]] = row
    columns = len(rows[0]) if rows else 0
    return [row[start + k] for start in range(0, columns, BLOCK) for row in shuffled for k in range(BLOCK)]


def kernel_tensors(layout, gate, up, down):
    """Return w13_weight and w2_weight of experts in a layout, from ``[E, I, H]``, ``[E, I, H]`` and ``[E, H, I]``.

    Args:
        layout: name of a layout of vLLM.
        gate: None for experts without a gate.
        up, down: the other projections.
    """
    more_i = -up.shape[1] % 128 if layout == "vllm_trtllm_padded" else 0
    more_h = -up.shape[2] % 256 if layout == "vllm_deepep" else 0
    gate = None if gate is None else pad(gate, (0, more_h, 0, more_i))
    up, down = pad(up, (0, more_h, 0, more_i)), pad(down, (0, more_i, 0, more_h))
    first = [part for part in (gate, up) if part is not None]
    w13 = torch.cat(first[::-1] if layout == "vllm_w31" else first, 1)
    if layout in ("vllm_trtllm", "vllm_trtllm_padded"):
        return in_order(w13, gate is not None), in_order(down, False)
    return w13, down


def in_order(weight, gated):
    """Return a weight ``[E, rows, columns]`` with the elements of each expert in the order of the TRT-LLM kernel."""
    _, rows, columns = weight.shape
    numbers = [list(range(row * columns, (row + 1) * columns)) for row in range(rows)]
    order = in_blocks(alternating(numbers) if gated else numbers)
    return weight.flatten(1)[:, order].reshape(weight.shape)
