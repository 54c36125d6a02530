"""A rank of ``test_sharded``: loads a checkpoint without and under the hook, sharded; compares; prints a line a kind.

python -m tests.integrations.ranks PATH SQUARE, with the environment of ``torch.distributed``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3VLMoeForConditionalGeneration
from transformers.distributed import DistributedConfig

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal


def options(kind: str) -> dict | None:
    """What shards a load that way over two ranks; None if the installed transformers cannot."""
    known = {field.name for field in dataclasses.fields(DistributedConfig)}
    if "tp_size" not in known:  # before 5.17
        return {
            "tensor": {"tp_plan": "auto"},
            "expert": {"distributed_config": DistributedConfig(enable_expert_parallel=True)},
        }.get(kind)
    expert = {"ep_size": 2} if "ep_size" in known else {"enable_expert_parallel": True}
    fields = {
        "tensor": {"tp_plan": "auto"},
        "expert": {"tp_size": 2} | expert,
        "data": {"fsdp_size": 2},
        "pipeline": {"pp_size": 2},
    }
    return {"distributed_config": DistributedConfig(**fields[kind])}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def loaded(path: str, how: dict) -> dict:
    """What the hook did, after comparing with the load without it."""
    stock, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **how)
    with amc.accelerate_transformers() as acceleration:
        hooked, hooked_info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **how)
    assert hooked_info == info
    found, wanted = hooked.state_dict(), stock.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert type(found[name]) is type(tensor)
        assert getattr(found[name], "placements", None) == getattr(tensor, "placements", None)
        assert_bytes_equal(local(found[name]), local(tensor), strides=True)
    [load] = acceleration.loads
    shapes = {name: list(local(tensor).shape) for name, tensor in wanted.items()}
    return {"lowered": load.lowered, "left": dict(load.left), "shapes": shapes}


def square(path: str, how: dict) -> dict:
    """Of square experts that are published transposed: why they are refused, or which are not as they should be."""
    model_class = Qwen3VLMoeForConditionalGeneration
    try:
        with amc.accelerate_transformers():
            found = model_class.from_pretrained(path, **how).state_dict()
    except amc.UnsupportedError as error:
        return {"refused": str(error), "wrong": []}
    right = amc.load_state_dict(path)
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in found.items() if ".experts." in n}
    return {"refused": "", "wrong": [n for n, t in whole.items() if not torch.equal(t, right[n])]}


def main() -> None:
    dist.init_process_group("gloo")
    for kind in ("tensor", "expert", "data", "pipeline"):
        how = options(kind)
        if how is not None:
            print(json.dumps({"kind": kind} | loaded(sys.argv[1], how)), flush=True)
        if how is not None and kind != "pipeline":
            print(json.dumps({"kind": f"square, {kind}"} | square(sys.argv[2], how)), flush=True)
    dist.barrier()
    time.sleep(0.2)  # for gloo's threads, as in examples/load_sharded.py
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
