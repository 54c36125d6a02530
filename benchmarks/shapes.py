"""The shapes that benchmarks use, with their sources, and checkpoints of these shapes.

The models are built from transformers' own config classes on the meta device. Their grouped experts are named one by
one, as the published checkpoints name them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from automodel_conv.cli.demo_process import fill_with_random_bits
from automodel_conv.dtypes import dtype_code
from benchmarks.full_size import write_header


@dataclass(frozen=True)
class Shape:
    """A model by its transformers config, and the files of its checkpoint."""

    name: str
    source: str
    model_type: str
    config: Mapping[str, Any]
    keys: int
    files: int


class TensorSpec(NamedTuple):
    """Name, shape and dtype of a tensor in a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


QWEN3_235B = Shape(
    "Qwen3-235B-A22B",
    "config.json and model.safetensors.index.json of Qwen/Qwen3-235B-A22B",
    "qwen3_moe",
    {
        "num_hidden_layers": 94,
        "num_experts": 128,
        "hidden_size": 4096,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    keys=36_945,
    files=118,
)
DEEPSEEK_V3 = Shape(
    "DeepSeek-V3",
    "config.json of deepseek-ai/DeepSeek-V3; in bfloat16, without the multi-token prediction layer",
    "deepseek_v3",
    {
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "vocab_size": 129280,
    },
    keys=45_395,
    files=163,
)
QWEN3_30B = Shape(
    "Qwen3-30B-A3B",
    "config.json of Qwen/Qwen3-30B-A3B",
    "qwen3_moe",
    {
        "num_hidden_layers": 48,
        "num_experts": 128,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    keys=18_867,
    files=16,
)
TWO_LAYERS = Shape(
    "two layers of Qwen3-30B-A3B",
    QWEN3_30B.source,
    "qwen3_moe",
    {**QWEN3_30B.config, "num_hidden_layers": 2},
    keys=2 * (128 * 3 + 9) + 3,
    files=1,
)
HALF_A_MILLION = Shape(
    "half a million",
    "no published model: layers of Qwen3-MoE with eight times the experts",
    "qwen3_moe",
    {
        **QWEN3_235B.config,
        "num_hidden_layers": 163,
        "num_experts": 1024,
        "moe_intermediate_size": 768,
    },
    keys=502_206,
    files=512,
)
ONE_LAYER = Shape(
    "one layer",
    "no published model: a layer of Qwen3-MoE with 64 times the experts, which no other layer shares a plan with",
    "qwen3_moe",
    {
        **QWEN3_235B.config,
        "num_hidden_layers": 1,
        "num_experts": 8192,
        "moe_intermediate_size": 768,
    },
    keys=8192 * 3 + 9 + 3,
    files=64,
)
SMALL = Shape(
    "small",
    "for tests of the benchmarks",
    "qwen3_moe",
    {
        "num_hidden_layers": 2,
        "num_experts": 4,
        "hidden_size": 64,
        "moe_intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 256,
    },
    keys=2 * (4 * 3 + 9) + 3,
    files=3,
)


def qwen3_30b(layers: int) -> Shape:
    """Return layers with the experts of Qwen3-30B-A3B, with few heads and words, so that only experts count."""
    return Shape(
        f"{layers} layers of Qwen3-30B-A3B",
        "num_experts, hidden_size, moe_intermediate_size of config.json of Qwen/Qwen3-30B-A3B",
        "qwen3_moe",
        {
            **SMALL.config,
            "num_hidden_layers": layers,
            "num_experts": 128,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
        },
        keys=layers * (128 * 3 + 9) + 3,
        files=2 * layers,
    )


def meta_model(shape: Shape) -> nn.Module:
    """Return the model in bfloat16 on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape.model_type, **shape.config, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def checkpoint_tensors(shape: Shape, model: nn.Module) -> list[TensorSpec]:
    """Return the tensors of a published checkpoint of this model, in the order of the model.

    Raises:
        ValueError: their number differs from that of the shape.
    """
    specs = []
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":  # [E, 2I, H]
            experts, rows, columns = tensor.shape
            parts = [(part, (rows // 2, columns)) for part in ("gate_proj", "up_proj")]
        elif leaf == "down_proj":  # [E, H, I]
            experts, *matrix = tensor.shape
            parts = [("down_proj", tuple(matrix))]
        else:
            specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
            continue
        specs += [
            TensorSpec(f"{path}.{expert}.{part}.weight", tensor.dtype, matrix)
            for expert in range(experts)
            for part, matrix in parts
        ]
    if len(specs) != shape.keys:
        raise ValueError(f"{shape.name}: {len(specs)} tensors, expected {shape.keys}")
    return specs


def write_checkpoint(shape: Shape, directory: str) -> None:
    """Write a checkpoint of random values, as transformers would, and wait until it is on the disk."""
    generator = torch.Generator().manual_seed(0)
    for file, specs in _begin(shape, directory).items():
        tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
        for tensor in tensors.values():
            fill_with_random_bits(tensor, generator)
        path = os.path.join(directory, file)
        save_file(tensors, path, metadata={"format": "pt"})
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_sparse_checkpoint(shape: Shape, directory: str) -> None:
    """Write real headers over sparse files, which only use the disk space of their headers."""
    for file, specs in _begin(shape, directory).items():
        write_header(
            os.path.join(directory, file),
            {spec.name: (str(dtype_code(spec.dtype)), spec.shape) for spec in sorted(specs)},
        )


def _begin(shape: Shape, directory: str) -> dict[str, list[TensorSpec]]:
    """Write config and index.

    Return the tensors of each file.
    """
    model = meta_model(shape)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    specs = checkpoint_tensors(shape, model)
    total = sum(spec.nbytes for spec in specs)
    files: dict[str, list[TensorSpec]] = {}
    weight_map = {}
    before = 0
    for spec in specs:
        number = before * shape.files // total + 1
        file = f"model-{number:05d}-of-{shape.files:05d}.safetensors"
        files.setdefault(file, []).append(spec)
        weight_map[spec.name] = file
        before += spec.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    Path(directory, "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return files
