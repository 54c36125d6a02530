"""State dicts with experts in which every value is distinct."""

import torch
from torch import nn

from automodel_conv.testing import address_valued

try:
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
except ModuleNotFoundError:
    pass

LAYOUTS = ("transformers", "nemo", "gpt_oss", "vllm", "vllm_w31")
PATH = "model.layers.3.mlp.experts"
E, I, H = 3, 5, 7  # noqa: E741


def distinct(shapes, dtype=torch.bfloat16):
    tensors, start = {}, 0
    for name, shape in shapes.items():
        tensors[name] = address_valued(shape, dtype, start)
        start += tensors[name].numel()
    return tensors


def grouped(gated=True, dtype=torch.bfloat16):
    """Return experts with biases in transformers' layout, and one other tensor."""
    first, rows = ("gate_up_proj", 2 * I) if gated else ("up_proj", I)
    return distinct(
        {
            f"{PATH}.{first}": (E, rows, H),
            f"{PATH}.{first}_bias": (E, rows),
            f"{PATH}.down_proj": (E, H, I),
            f"{PATH}.down_proj_bias": (E, H),
            "model.norm.weight": (H,),
        },
        dtype,
    )


def projections(layers=2, dtype=torch.float32):
    """Return a checkpoint with one tensor per expert, in an arbitrary order."""
    return distinct(
        {
            f"layers.{n}.experts.{e}.{w}.weight": (H, I) if w == "w2" else (I, H)
            for e in (2, 0, 1)
            for n in range(layers)
            for w in ("w3", "w1", "w2")
        }
        | {"norm": (H,)},
        dtype,
    )


def merging():
    return [
        WeightConverter(
            ["experts.*.w1.weight", "experts.*.w3.weight"],
            "experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("experts.*.w2.weight", "experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


class Experts(nn.Module):
    def __init__(self, dtype, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.layers:
            layer.experts = nn.Module()
            layer.experts.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H, dtype=dtype, device="meta"))
            layer.experts.down_proj = nn.Parameter(torch.empty(E, H, I, dtype=dtype, device="meta"))
        self.norm = nn.Parameter(torch.empty(H, device="meta"))
        self.config = None
