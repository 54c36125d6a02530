"""Load a published checkpoint into a module of your own, with experts in NeMo AutoModel's layout, ``[E, H, 2I]``.

    python examples/load_nemo_layout.py

Shows that the module needs nothing but parameters of the layout's names and shapes, and that they equal the experts
that transformers has, transposed.
"""

import tempfile

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import automodel_conv as amc

E, INNER, H = 32, 128, 256


class Experts(nn.Module):
    """Grouped experts, transposed: ``x @ gate_and_up_projs[e]``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_and_up_projs = nn.Parameter(torch.empty(E, H, 2 * INNER))
        self.down_projs = nn.Parameter(torch.empty(E, INNER, H))


def main() -> None:
    config = Qwen3MoeConfig(
        hidden_size=H,
        moe_intermediate_size=INNER,
        num_hidden_layers=1,
        num_experts=E,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1000,
    )
    with tempfile.TemporaryDirectory() as directory:
        reference = Qwen3MoeForCausalLM(config)
        reference.save_pretrained(directory)

        # The module's parameters are the targets. It has no config that names its rules, so they are passed.
        # strict=False leaves the checkpoint's other tensors out.
        model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([_layer()])})})
        rules = amc.get_checkpoint_conversion_mapping("qwen3_moe")
        report = amc.load_model(model, directory, rules=rules, layout="nemo", strict=False)

    experts = model["model"]["layers"][0]["mlp"]["experts"]
    grouped = reference.model.layers[0].mlp.experts
    assert torch.equal(experts.gate_and_up_projs, grouped.gate_up_proj.transpose(1, 2))
    assert torch.equal(experts.down_projs, grouped.down_proj.transpose(1, 2))
    print(
        f"read {report.bytes_read / 1e6:.1f} MB of experts, and nothing of {len(report.unexpected_keys)} other tensors"
    )
    print("both parameters equal the experts of transformers, transposed")


def _layer() -> nn.Module:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Experts()})})


if __name__ == "__main__":
    main()
