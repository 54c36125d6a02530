"""Load a checkpoint with FP8 weights as bfloat16, and write it as a bfloat16 checkpoint.

    python examples/decode_fp8.py [PATH]

Shows that weights are decoded while they are read: to the product of each code and the scale of its block, rounded once
to bfloat16. No GPU is needed. Without a path, the script writes a small Qwen3-MoE checkpoint with weights as
DeepSeek-V3 and Qwen3-30B-A3B-FP8 store them: codes of e4m3, and a scale for each block of 128x128. All output goes to a
temporary directory.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import automodel_conv as amc

BLOCK = 128
SMALL = Qwen3MoeConfig(
    hidden_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    num_experts=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1000,
)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = sys.argv[1] if len(sys.argv) > 1 else str(Path(directory, "fp8"))
        if len(sys.argv) == 1:
            write_fp8_checkpoint(path)

        # Into memory, with grouped experts. dequantize=False would keep codes and scales.
        tensors = amc.load_state_dict(path)
        dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
        print(f"loaded {len(tensors)} tensors as {', '.join(dtypes)}")

        # Or from file to file, under the published names.
        bf16 = Path(directory, "bf16")
        report = amc.convert_checkpoint(path, bf16, rules=[], dequantize=True)
        print(f"wrote {report.bytes_written / 1e6:.1f} MB of bfloat16")

        if len(sys.argv) == 1:
            stored, written = load_file(f"{path}/model.safetensors"), load_file(bf16 / "model.safetensors")
            scaled = [name for name in stored if f"{name}_scale_inv" in stored]
            for name in scaled:
                assert torch.equal(written[name], decoded(stored[name], stored[f"{name}_scale_inv"])), name
            print(f"all {len(scaled)} decoded weights are codes * scales, rounded once to bfloat16")


def write_fp8_checkpoint(directory: str) -> None:
    """Write a checkpoint as transformers does, then replace the weights of linear layers by codes and scales."""
    model = Qwen3MoeForCausalLM(SMALL).to(torch.bfloat16)
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    model.save_pretrained(directory)
    file = Path(directory, "model.safetensors")
    tensors = {}
    for name, tensor in load_file(file).items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = encoded(tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, file)


def encoded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, of the shape of the weight, and a float32 scale for each block."""
    blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    return (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).reshape(weight.shape), scales


def decoded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the bfloat16 values of codes."""
    blocks = codes.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return (blocks * scales[:, None, :, None]).reshape(codes.shape).to(torch.bfloat16)


if __name__ == "__main__":
    main()
