"""Load a published checkpoint on two expert-parallel processes, and save it again from both.

    python examples/load_sharded.py [PATH]

Shows that each process reads only its own experts, and that the files they save together hold the published tensors,
bit for bit. The script does it twice: with ``load_model`` and ``save_checkpoint``, and with
``torch.distributed.checkpoint``, for code that already calls ``dcp.load`` and ``dcp.save``. Without a path, it writes a
small Qwen3-MoE checkpoint first. All output goes to a temporary directory.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import automodel_conv as amc
from automodel_conv.integrations.dcp import HuggingFaceReader, HuggingFaceWriter

RANKS = 2
SMALL = Qwen3MoeConfig(
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
        published = sys.argv[1] if len(sys.argv) > 1 else str(Path(directory, "published"))
        if len(sys.argv) == 1:
            Qwen3MoeForCausalLM(SMALL).to(torch.bfloat16).save_pretrained(published)
        mp.spawn(run_rank, args=(published, directory), nprocs=RANKS)

        # Both methods have written each published tensor exactly once.
        for saved in ("saved", "saved by dcp"):
            nbytes = amc.verify_checkpoint(published, Path(directory, saved), rules=[])
            print(f"{saved}: {nbytes / 1e6:.1f} MB are the published tensors again, bit for bit")


def run_rank(rank: int, published: str, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("ep",))

    # The placements of the model's DTensors determine which bytes a rank reads.
    model = expert_parallel(published, mesh)
    report = amc.load_model(model, published)
    print(f"rank {rank} has read {report.bytes_read / 1e6:.1f} MB", flush=True)
    amc.save_checkpoint(model, Path(directory, "saved"))

    # Repeat this with torch.distributed.checkpoint, into a model that has memory already. load_model also computes
    # buffers that no checkpoint holds, such as rotary frequencies; dcp.load does not.
    other = expert_parallel(published, mesh).to_empty(device="cpu")
    dcp.load(other.state_dict(), storage_reader=HuggingFaceReader(published))
    for (name, tensor), loaded in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(tensor.to_local(), loaded.to_local()), name
    dcp.save(other.state_dict(), storage_writer=HuggingFaceWriter(Path(directory, "saved by dcp"), other))

    # Caches of DTensor keep gloo's threads alive past this call. A thread that still releases a tensor while Python
    # exits aborts the process (https://github.com/pytorch/pytorch/issues/190489), so give them a moment.
    time.sleep(0.2)
    dist.destroy_process_group()


def expert_parallel(path: str, mesh) -> nn.Module:
    """Build a model on the meta device, with experts sharded over the ranks and all other parameters replicated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    for name, module in model.named_modules():
        placements = [Shard(0) if name.endswith(".experts") else Replicate()]
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(leaf, nn.Parameter(distribute_tensor(parameter, mesh, placements)))
    return model


if __name__ == "__main__":
    main()
