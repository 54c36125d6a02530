"""A rank of ``test_sharded``: load sharded without and under the hook, compare, and print a JSON line for each kind.

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
    """Return options that shard a load in that way over two ranks, or None if the installed transformers cannot."""
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
    """Return the report of the hook after comparing with the load without it."""
    stock, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **how)
    with amc.accelerate_transformers() as acceleration:
        hooked, hooked_info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **how)
    assert hooked_info == info
    hooked_state, wanted = hooked.state_dict(), stock.state_dict()
    assert list(hooked_state) == list(wanted)
    for name, tensor in wanted.items():
        assert type(hooked_state[name]) is type(tensor)
        assert getattr(hooked_state[name], "placements", None) == getattr(tensor, "placements", None)
        assert_bytes_equal(local(hooked_state[name]), local(tensor), strides=True)
    [load] = acceleration.loads
    shapes = {name: list(local(tensor).shape) for name, tensor in wanted.items()}
    return {"lowered": load.lowered, "left": dict(load.left), "shapes": shapes}


def square(path: str, how: dict) -> dict:
    """Load square experts that are published transposed; return the error, or the names of wrong tensors."""
    model_class = Qwen3VLMoeForConditionalGeneration
    try:
        with amc.accelerate_transformers():
            state = model_class.from_pretrained(path, **how).state_dict()
    except amc.UnsupportedError as error:
        return {"refused": str(error), "wrong": []}
    right = amc.load_state_dict(path)
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items() if ".experts." in n}
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
    time.sleep(0.2)  # time for gloo's threads to end, as in examples/load_sharded.py
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
