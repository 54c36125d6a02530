"""Tensors of an adapter in memory, for tests."""

import torch

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class Held:
    """The tensors of an adapter in memory; counts reads."""

    def __init__(self, *tensors):
        self.tensors = tensors
        self.names = [str(row) for row in range(len(tensors))]
        self.dtypes = [CODES[tensor.dtype] for tensor in tensors]
        self.shapes = [tuple(tensor.shape) for tensor in tensors]
        self.reads = []

    def read(self, rows):
        self.reads.append(list(rows))
        return [self.tensors[row] for row in rows]
