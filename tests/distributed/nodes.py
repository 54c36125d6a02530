"""Suite: replicas are read once per node; what tells the nodes apart is simulated."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import automodel_conv as amc
from automodel_conv.distributed import node_replicas
from automodel_conv.testing import assert_bytes_equal
from tests.distributed.failures import run_and_send
from tests.distributed.starting import send

TIMEOUT_S = 20
R, S = Replicate(), Shard(0)
DIVISIONS = {
    "one": "aaaa",
    "halves": "aabb",
    "turns": "abab",
    "three and one": "aaba",
    "four": "abcd",
}
PLACEMENTS = {
    "r": (4, [R]),
    "rs": ((2, 2), [R, S]),
    "sr": ((2, 2), [S, R]),
    "rr": ((2, 2), [R, R]),
    "ss": ((2, 2), [S, S]),
    "columns": ((2, 2), [R, Shard(1)]),
}
VALUES = {name: torch.arange(40.0).reshape(8, 5) + 100 * number for number, name in enumerate(PLACEMENTS)}
VALUES |= {"plain": torch.arange(3.0), "empty": torch.empty(0, 3)}


def prepare(directory: Path, world: int) -> str:
    for name, tensor in VALUES.items():  # a file for each, so that no read continues to the next tensor
        save_file({name: tensor}, directory / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in VALUES}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(directory)


def rank(path: str, variant: str, directory: Path) -> None:
    if variant == "dies":
        return dies(path)
    if variant == "kept":
        return kept(path, directory)
    nodes = DIVISIONS[variant]
    node_replicas.host_name = lambda: nodes[dist.get_rank()]
    module = model()
    for tensor in module.state_dict().values():
        local(tensor).fill_(-1)
    report = amc.load_model(module, path, broadcast="node", rules=[])
    holds(module.state_dict())
    loaded = amc.load_state_dict(path, module, broadcast="node", rules=[])
    holds(loaded)
    mapped = amc.load_state_dict(path, module, broadcast="node", rules=[], memory_map=True)
    holds(mapped)
    assert loaded.report.bytes_read == report.bytes_read
    send(report.bytes_read)
    send(sum(part_bytes(name, tensor) for name, tensor in module.state_dict().items() if reads(tensor, nodes)))


def model() -> nn.Module:
    meshes = {4: init_device_mesh("cpu", (4,)), (2, 2): init_device_mesh("cpu", (2, 2), mesh_dim_names=("o", "i"))}
    module = nn.Module()
    for name, (shape, placements) in PLACEMENTS.items():
        tensor = distribute_tensor(VALUES[name].clone(), meshes[shape], placements)
        module.register_parameter(name, nn.Parameter(tensor))
    module.register_parameter("plain", nn.Parameter(torch.zeros(3)))
    empty = distribute_tensor(torch.empty(0, 3), meshes[4], [R])
    module.register_parameter("empty", nn.Parameter(empty))
    return module


def local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor.detach(), "to_local", tensor.detach)()


def part_bytes(name: str, tensor: torch.Tensor) -> int:
    """Return the bytes that a read of a part takes, with the small gaps between rows that are cut."""
    part = local(tensor)
    cut = tensor.shape[1] - part.shape[1] if name == "columns" else 0
    return part.nbytes + (part.shape[0] - 1) * cut * part.element_size()


def holds(state) -> None:
    for name, tensor in state.items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert_bytes_equal(full.detach(), VALUES[name])


def reads(tensor: torch.Tensor, nodes: str) -> bool:
    """Return whether this rank reads its part: no earlier rank on its node holds it. Written element by element."""
    own = dist.get_rank()
    if not hasattr(tensor, "placements"):
        return True
    mesh = tensor.device_mesh.mesh.tolist()
    if tensor.device_mesh.ndim == 1:
        mesh = [mesh]
        kinds = [True, *(p.is_replicate() for p in tensor.placements)]
    else:
        kinds = [p.is_replicate() for p in tensor.placements]
    at = {other: (i, j) for i, row in enumerate(mesh) for j, other in enumerate(row)}
    for other in range(own):
        same = all(kind or x == y for kind, x, y in zip(kinds, at[own], at[other], strict=True))
        if same and nodes[other] == nodes[own]:
            return False
    return True


def kept(path: str, directory: Path) -> None:
    """Load from a server; the ranks of a node share the bytes that they read, or send them."""
    url = Path(path, "url").read_text()
    node = DIVISIONS["halves"][dist.get_rank()]
    node_replicas.host_name = lambda: node
    for broadcast in (False, "node"):
        module = model()
        for tensor in module.state_dict().values():
            local(tensor).fill_(-1)
        amc.load_model(module, url, rules=[], broadcast=broadcast, node_cache=directory / f"{node} {broadcast}")
        holds(module.state_dict())


def dies(path: str) -> None:
    """End one rank after all have read, before it sends."""
    node_replicas.host_name = lambda: "a"
    module = model()
    if dist.get_rank() == 0:
        node_replicas.start_batch = lambda *arguments: os._exit(0)
    run_and_send(lambda: amc.load_model(module, path, broadcast="node", rules=[]))
