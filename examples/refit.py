"""Move the weights of a trainer on two processes into an engine on two others, after every step of training.

    python examples/refit.py

Shows that the engine has the trainer's new weights after each step, and that each of its elements is sent once, from
the shard that has it straight to its place. No parameter is gathered. The trainer has float32 shards under FSDP2. Each
process of the engine has half of the experts, in bfloat16 and in vLLM's layout. The processes use the CPU and gloo.
"""

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import automodel_conv as amc

TRAINERS, ENGINES, STEPS = 2, 2, 3
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
    with tempfile.TemporaryDirectory() as directory:
        mp.start_processes(run_rank, args=(directory,), nprocs=TRAINERS + ENGINES, start_method="fork")


def run_rank(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=TRAINERS + ENGINES)
    mesh = DeviceMesh("cpu", list(range(TRAINERS)))
    if rank < TRAINERS:
        train(rank, mesh, directory)
    else:
        serve(rank - TRAINERS, directory)

    # Caches of DTensor keep gloo's threads alive past this call. A thread that still releases a tensor while Python
    # exits aborts the process (https://github.com/pytorch/pytorch/issues/190489), so give them a moment.
    time.sleep(0.2)
    dist.destroy_process_group()


def train(rank: int, mesh: DeviceMesh, directory: str) -> None:
    torch.manual_seed(0)
    trainer = Qwen3MoeForCausalLM(CONFIG)
    for layer in trainer.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(trainer, mesh=mesh)
    optimizer = torch.optim.AdamW(trainer.parameters())

    # Once, on all processes together: exchange who has what and who needs what, and plan.
    refit = amc.Refit(trainer, sends=True)
    if rank == 0:
        print(f"each refit costs:\n{refit.forecast()}", flush=True)

    for step in range(STEPS):
        tokens = torch.arange(32)[None] + 32 * (step + rank)
        trainer(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        refit()

        # Only to show that the engine has the same weights: gather them, and leave them in a file.
        whole = {name: parameter.detach().full_tensor() for name, parameter in trainer.named_parameters()}
        if rank == 0:
            torch.save(whole, Path(directory, "whole"))
        dist.barrier()
        dist.barrier()


def serve(rank: int, directory: str) -> None:
    experts = range(rank * 16, rank * 16 + 16)
    engine = engine_with(len(experts))
    refit = amc.Refit(engine, sends=False, layout="vllm", experts=experts)
    for step in range(STEPS):
        report = refit()

        dist.barrier()
        whole = torch.load(Path(directory, "whole"))
        for name, parameter in engine.named_parameters():
            expected = whole[name.replace("w13_weight", "gate_up_proj").replace("w2_weight", "down_proj")]
            if ".experts." in name:
                expected = expected[experts]
            assert torch.equal(parameter, expected.to(torch.bfloat16)), name
        print(f"step {step}: process {rank} of the engine has the trainer's weights", flush=True)
        dist.barrier()
    if rank == 0:
        print(f"the last refit of this process:\n{report}", flush=True)


def engine_with(experts: int) -> nn.Module:
    """Return a model with some of the experts, in the layout of vLLM."""
    model = Qwen3MoeForCausalLM(CONFIG).to(torch.bfloat16)
    for layer in model.model.layers:
        w13, w2 = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
        layer.mlp.experts = nn.Module()
        layer.mlp.experts.w13_weight = nn.Parameter(torch.empty_like(w13[:experts]))
        layer.mlp.experts.w2_weight = nn.Parameter(torch.empty_like(w2[:experts]))
    return model


if __name__ == "__main__":
    main()
