"""Ranks in this process: one rank of a mesh with a group that sends nothing, or threads that communicate."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def rank_of_mesh(rank: int, shape: tuple[int, ...], *names: str) -> Iterator[DeviceMesh]:
    """Return the mesh of all ranks as rank ``rank`` sees it; its collectives send nothing."""
    world = 1
    for size in shape:
        world *= size
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=names or None)
    finally:
        dist.destroy_process_group()


class Group:
    """A process group of threads."""

    def __init__(self, ranks: Sequence[int]):
        self.ranks = list(ranks)
        self.barrier = threading.Barrier(len(ranks), timeout=10)
        self.texts: dict[int, Any] = {}


class Ranks:
    """A ``torch.distributed`` with threads as ranks. A broken barrier is a RuntimeError, as backends raise it."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def is_initialized(self) -> bool:
        return hasattr(self._thread, "rank")

    def get_rank(self) -> int:
        return self._thread.rank

    def get_world_size(self, group: Group) -> int:
        return len(group.ranks)

    def get_global_rank(self, group: Group, index: int) -> int:
        return group.ranks[index]

    def all_gather_object(self, gathered: list[Any], thing: Any, group: Group) -> None:
        group.texts[self.get_rank()] = copy.deepcopy(thing)
        group.barrier.wait()
        gathered[:] = [copy.deepcopy(group.texts[rank]) for rank in group.ranks]
        group.barrier.wait()

    def broadcast(self, tensor: Any, src: int, group: Group) -> None:
        if self.get_rank() == src:
            group.texts[src] = tensor.clone()
        group.barrier.wait()
        tensor.copy_(group.texts[src])
        group.barrier.wait()

    def run(self, world: int, call: Callable[[int], Any]) -> list[Any]:
        """Return what each rank returns or raises."""
        ended: list[Any] = [None] * world

        def work(rank: int) -> None:
            self._thread.rank = rank
            try:
                ended[rank] = call(rank)
            except BaseException as error:
                ended[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ended
