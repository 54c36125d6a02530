"""One line under ``from_pretrained``: everything is as usual, except that its conversions run by plan.

    python examples/accelerate_from_pretrained.py [PATH]

Shows how many tensors were converted by plan, and that the model is the one that ``from_pretrained`` loads without this
package. For that comparison, the model is loaded twice. Without a path, the script writes a small Qwen3-MoE checkpoint
first.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import automodel_conv as amc

SMALL = Qwen3MoeConfig(
    hidden_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_experts=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1000,
)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = sys.argv[1] if len(sys.argv) > 1 else directory
        if path == directory:
            Qwen3MoeForCausalLM(SMALL).save_pretrained(directory)

        with amc.accelerate_transformers() as record:
            model = AutoModelForCausalLM.from_pretrained(path)
        print(record)

        usual = AutoModelForCausalLM.from_pretrained(path).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, usual[name]), name
        print(f"all {len(usual)} tensors equal those of from_pretrained without this package")


if __name__ == "__main__":
    main()
