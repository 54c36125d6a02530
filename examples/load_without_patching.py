"""Load a model of transformers, and save it again, without replacing any function of transformers.

    python examples/load_without_patching.py [PATH]

Shows how to pass tensors through ``from_pretrained``'s own ``state_dict=``, and that ``save_pretrained`` writes the
published tensors again if they are reverted first. Without a path, the script writes a small Qwen3-MoE checkpoint
first.
"""

import sys
import tempfile
from pathlib import Path

import transformers
from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

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
        config = AutoConfig.from_pretrained(path)
        model_class = getattr(transformers, config.architectures[0])  # Auto classes accept no state dict

        # from_pretrained does the rest as usual: non-persistent buffers, ties, missing parameters, its report.
        model = model_class.from_pretrained(None, config=config, state_dict=amc.load_state_dict(path))
        print(f"loaded {sum(p.numel() for p in model.parameters()):,} parameters")

        # The model has no record of the per-expert tensors, so it would save grouped experts.
        published = amc.revert_state_dict(model.state_dict(), model, reference=path)
        count, out = len(published), Path(directory, "out")
        model.save_pretrained(out, state_dict=published, save_original_format=False)
        nbytes = amc.verify_checkpoint(path, out, rules=[])
        print(f"saved {count} tensors: {nbytes / 1e6:.1f} MB are the published tensors again, bit for bit")


if __name__ == "__main__":
    main()
