"""The engine of ``benchmarks.refit``: a model with vLLM's parameters and a loader that fills them tensor by tensor.

As in vLLM's ``Qwen3MoeForCausalLM`` with expert parallelism, a rank has some experts, ``w13_weight [E/ranks, 2I, H]``
and ``w2_weight [E/ranks, H, I]``, and q, k and v are one parameter, ``qkv_proj``. Everything else is as in
transformers, and every rank has all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.shapes import Shape, meta_model

_EXPERT = {"gate_proj": ("w13_weight", 0), "up_proj": ("w13_weight", 1), "down_proj": ("w2_weight", 0)}
"""Parameter and half of the rows of each projection of an expert."""


class Engine(nn.Module):
    """The model of one rank, on the CPU, without values.

    Args:
        shape: the model, of type qwen3_moe.
        rank: number among the ranks of the engine.
        ranks: number of them.
    """

    def __init__(self, shape: Shape, rank: int, ranks: int):
        super().__init__()
        whole: Any = meta_model(shape)
        self.model, self.lm_head = whole.model, whole.lm_head
        self.first_expert = 0
        for layer in self.model.layers:
            attention, experts = layer.self_attn, layer.mlp.experts
            rows = [getattr(attention, name).weight.shape[0] for name in ("q_proj", "k_proj", "v_proj")]
            width = attention.q_proj.weight.shape[1]
            for name in ("q_proj", "k_proj", "v_proj"):
                delattr(attention, name)
            attention.qkv_proj = _parameters(weight=(sum(rows), width))
            number, twice, hidden = experts.gate_up_proj.shape
            own = number // ranks
            self.first_expert = rank * own
            layer.mlp.experts = _parameters(w13_weight=(own, twice, hidden), w2_weight=(own, hidden, twice // 2))
        ends = [sum(rows[:count]) for count in range(4)]
        self.rows = {f"{part}_proj": slice(*ends[place : place + 2]) for place, part in enumerate("qkv")}
        self.to_empty(device="cpu")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the parameters, as vLLM does: with a copy for each tensor of the checkpoint that this rank needs."""
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            place = self.place_of(name, parameters)
            if place is not None:
                place.copy_(tensor)

    def place_of(self, name: str, parameters: dict[str, nn.Parameter]) -> Tensor | None:
        """Return the part of a parameter that a tensor of the checkpoint belongs to; None if another rank has it."""
        path, experts, rest = name.partition(".experts.")
        if experts:
            number, projection, _ = rest.split(".")
            parameter, half = _EXPERT[projection]
            data = parameters[f"{path}.experts.{parameter}"].data
            own = int(number) - self.first_expert
            if not 0 <= own < len(data):
                return None
            return data[own] if parameter == "w2_weight" else data[own].chunk(2)[half]
        path, _, projection = name.removesuffix(".weight").rpartition(".")
        if projection in self.rows:
            return parameters[f"{path}.qkv_proj.weight"].data[self.rows[projection]]
        return parameters[name].data


def _parameters(**shapes: tuple[int, ...]) -> nn.Module:
    module = nn.Module()
    for name, shape in shapes.items():
        empty = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return module


def wrong(engine: Engine, directory: str, flipped: bool) -> list[str]:
    """Return the names of the tensors of a checkpoint whose bytes an engine does not have.

    Args:
        engine: the engine of one rank.
        directory: the checkpoint.
        flipped: whether the sign of each element has to be the other one.

    Raises:
        RuntimeError: nothing in the checkpoint belongs to some element.
    """
    parameters = dict(engine.named_parameters())
    names = []
    elements = 0
    for name, tensor in tensors_in(directory):
        place = engine.place_of(name, parameters)
        if place is None:
            continue
        elements += place.numel()
        bits = tensor.view(torch.int16)
        if not torch.equal(place.view(torch.int16), bits ^ torch.iinfo(torch.int16).min if flipped else bits):
            names.append(name)
    if elements != sum(parameter.numel() for parameter in parameters.values()):
        raise RuntimeError("the checkpoint does not fill all of the engine")
    return names


def tensors_in(directory: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a checkpoint, mapped from its files."""
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
