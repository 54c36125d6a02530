"""Refit an inference engine with a trainer's weights after every step of RL, in memory, into the same buffers.

    python examples/rl_refit.py

Shows that the engine's tensors have the trainer's new values after each step, in vLLM's layout, and that none of them
was allocated again. Runs on a GPU if there is one.
"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import automodel_conv as amc

CONFIG = Qwen3MoeConfig(
    hidden_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    num_experts=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1000,
)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Qwen3MoeForCausalLM(CONFIG).to(device)

    # Once: convert to the names of the checkpoint, and allocate the engine's buffers, with experts in vLLM's layout.
    per_expert = amc.revert_state_dict(trainer.state_dict(), trainer)
    engine = {
        name: torch.empty_like(t) for name, t in amc.convert_state_dict(per_expert, trainer, layout="vllm").items()
    }

    addresses = [tensor.data_ptr() for tensor in engine.values()]

    for step in range(3):
        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter.add_(0.01)
        # Every step: refill the engine's tensors. Nothing leaves the device.
        per_expert = amc.revert_state_dict(trainer.state_dict(), trainer)
        amc.convert_state_dict(per_expert, trainer, layout="vllm", out=engine)
        for number, layer in enumerate(trainer.model.layers):
            assert torch.equal(engine[f"model.layers.{number}.mlp.experts.w13_weight"], layer.mlp.experts.gate_up_proj)
            assert torch.equal(engine[f"model.layers.{number}.mlp.experts.w2_weight"], layer.mlp.experts.down_proj)
        print(f"step {step}: {sum(tensor.nbytes for tensor in engine.values()) / 1e6:.1f} MB on {device}")

    assert addresses == [tensor.data_ptr() for tensor in engine.values()]
    print(f"all {len(engine)} tensors of the engine are where they were, and their experts have the trainer's values")


if __name__ == "__main__":
    main()
