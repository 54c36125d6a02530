"""Models that these tests load, convert and save, the contents of their checkpoints, and experts in each layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from automodel_conv.kernels import launch
from automodel_conv.testing import assert_bytes_equal
from benchmarks import shapes
from tests.gpu.place import FULL_SIZES, PLACE, Place
from tests.planning.kernel_orders import kernel_tensors

LAYOUTS = ("transformers", "nemo", "gpt_oss", "vllm", "vllm_w31")
# Far less than the size of a checkpoint, so that loads use many windows.
SCRATCH_BYTES = 1 << 20 if FULL_SIZES else 1 << 14
LARGE = shapes.SMALL.config | {"num_experts": 24, "hidden_size": 512, "moe_intermediate_size": 328}
SHAPE = (
    shapes.Shape("large", "as SMALL", "qwen3_moe", LARGE, keys=2 * (24 * 3 + 9) + 3, files=3)
    if FULL_SIZES
    else shapes.SMALL
)


def model():
    return shapes.meta_model(SHAPE)


def on(device):
    """Return the arguments that load to a device with little memory."""
    arguments = {"device": str(device), "threads": 2, "scratch_bytes": SCRATCH_BYTES}
    return arguments | ({} if PLACE is Place.INTERPRETER else {"device_scratch_bytes": SCRATCH_BYTES})


def tensors_of(directory):
    """Return the tensors in the files of a directory, on the CPU."""
    tensors = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def grouped(per_expert, layout):
    """Return experts by stack, cat and transpose, under the names of a layout, and the other tensors unchanged."""
    gate_up, down = {
        "transformers": ("gate_up_proj", "down_proj"),
        "nemo": ("gate_and_up_projs", "down_projs"),
        "gpt_oss": ("gate_up_proj", "down_proj"),
    }.get(layout, ("w13_weight", "w2_weight"))
    tensors = {name: tensor for name, tensor in per_expert.items() if ".experts." not in name}
    for path in sorted({name.partition(".experts.")[0] for name in per_expert if ".experts." in name}):
        gate, up, downs = (
            torch.stack([per_expert[f"{path}.experts.{e}.{part}.weight"] for e in range(SHAPE.config["num_experts"])])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        both = torch.cat([gate, up], 1)
        if layout == "nemo":
            both, downs = both.transpose(1, 2), downs.transpose(1, 2)
        if layout == "gpt_oss":
            both, downs = torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2), downs.transpose(1, 2)
        if layout.startswith("vllm"):
            both, downs = kernel_tensors(layout, gate, up, downs)
        tensors[f"{path}.experts.{gate_up}"] = both.contiguous()
        tensors[f"{path}.experts.{down}"] = downs.contiguous()
    return tensors


def assert_same(actual, wanted, device):
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert actual[name].device == device, name
        assert_bytes_equal(actual[name], tensor)


def launched(patch: pytest.MonkeyPatch) -> list:
    """Record the variants that are launched from now on; none if loads to the device are loads to the CPU."""
    variants, queue = [], launch.queue

    def spy(variant, *rest):
        variants.append(variant)
        queue(variant, *rest)

    patch.setattr(launch, "queue", spy)
    return variants


def write_fp8(plain, directory):
    """Write the checkpoint ``plain`` with e4m3 projections and a scale for each 128 x 128, as DeepSeek and Qwen do."""
    from tests.quantized.producers import block_wise

    stored = {}
    for name, tensor in tensors_of(plain).items():
        if name.endswith("_proj.weight"):
            stored |= {name + suffix: part.contiguous() for suffix, part in block_wise(tensor, (128, 128))[0].items()}
        else:
            stored[name] = tensor
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    _write(stored, json.loads(Path(plain, "config.json").read_text()), method, directory)


def write_mxfp4(directory):
    """Write a gpt-oss whose experts have random 4-bit codes, and scales that bfloat16 can hold."""
    from transformers import GptOssConfig, GptOssForCausalLM

    hidden, intermediate, experts = (512, 352, 8) if FULL_SIZES else (64, 96, 4)
    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_local_experts=experts,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
    )
    stored = {name: tensor.contiguous() for name, tensor in GptOssForCausalLM(config).bfloat16().state_dict().items()}
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        _, columns, rows = stored.pop(name).shape
        shape = experts, rows, columns // 32
        stored[name + "_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        stored[name + "_scales"] = torch.randint(100, 140, shape, dtype=torch.uint8)
    config.architectures, config.dtype = ["GptOssForCausalLM"], torch.bfloat16
    _write(stored, json.loads(config.to_json_string()), {"quant_method": "mxfp4"}, directory)


def _write(stored, config, method, directory):
    Path(directory).mkdir(exist_ok=True)
    save_file(stored, Path(directory, "model.safetensors"), metadata={"format": "pt"})
    Path(directory, "config.json").write_text(json.dumps(config | {"quantization_config": method}))
