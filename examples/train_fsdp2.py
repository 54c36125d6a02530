"""Load a published checkpoint into a model under FSDP2 on two processes, train a step, and save published names again.

    python examples/train_fsdp2.py [PATH]

Shows that each process reads only its shards, that the plan of the first load serves for the next checkpoint of the
run, and that the saved files load into a model without FSDP. Without a path, the script writes a small Qwen3-MoE
checkpoint first. All output goes to a temporary directory. The processes use the CPU and gloo.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import automodel_conv as amc

RANKS = 2
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
        published = sys.argv[1] if len(sys.argv) > 1 else str(Path(directory, "published"))
        if len(sys.argv) == 1:
            Qwen3MoeForCausalLM(SMALL).save_pretrained(published)
        mp.spawn(run_rank, args=(published, directory), nprocs=RANKS)

        trained = AutoModelForCausalLM.from_pretrained(Path(directory, "step 1"))
        before = amc.load_state_dict(published)
        changed = [name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])]
        print(f"the saved step loads without FSDP; {len(changed)} of {len(before)} tensors have changed")


def run_rank(rank: int, published: str, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))

    # Compile the plan once, from headers. Each load checks that its checkpoint fits.
    model = sharded(published, mesh)
    plan = amc.compile_plan(published, model)
    report = amc.load_model(model, published, plan=plan)
    print(f"rank {rank} has read {report.bytes_read / 1e6:.1f} MB", flush=True)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(32)[None] + 32 * rank
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    amc.save_checkpoint(model, Path(directory, "step 1"))

    # Continue in a new model.
    resumed = sharded(published, mesh)
    amc.load_model(resumed, Path(directory, "step 1"), plan=plan)
    for (name, tensor), loaded in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(tensor.to_local(), loaded.to_local()), name
    print(f"rank {rank}: its shards are those that it saved, bit for bit", flush=True)

    # Caches of DTensor keep gloo's threads alive past this call. A thread that still releases a tensor while Python
    # exits aborts the process (https://github.com/pytorch/pytorch/issues/190489), so give them a moment.
    time.sleep(0.2)
    dist.destroy_process_group()


def sharded(path: str, mesh) -> nn.Module:
    """Build a model on the meta device, whose parameters are divided among the ranks."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


if __name__ == "__main__":
    main()
