"""Suite: refits of small modules with unusual tensors, buckets, groups and places; four ranks.

A variant is the name of a function here. Most have two ranks of the trainer, then two of the engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_conv.distributed.point_to_point import exchange_bytes
from automodel_conv.errors import UnsupportedError
from automodel_conv.refit import Refit
from automodel_conv.testing import POISON, Guarded, assert_bytes_equal, guarded
from tests.distributed.starting import send

TRAINERS = 2
SHAPES = {
    "square": (6, 6),
    "equal": (4, 4, 4),
    "single": (1,),
    "of ones": (1, 1, 1),
    "scalar": (),
    "nothing": (0,),
    "no rows": (0, 5),
    "no columns": (5, 0),
    "rows": (7, 3),
    "prime": (13, 11),
}
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def prepare(directory: Path, world: int) -> None:
    """Import what DTensors import when they are first used, before ranks are forked."""
    importlib.import_module("torch._dynamo")


def rank(common: None, variant: str, directory: Path) -> None:
    VARIANTS[variant]()
    dist.barrier()  # a rank that ends while others still connect would fail them
    send(variant)


def module(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a module with these tensors: floats are parameters, others persistent buffers."""
    made = nn.Module()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            made.register_parameter(name.replace(" ", "_"), nn.Parameter(tensor))
        else:
            made.register_buffer(name.replace(" ", "_"), tensor)
    return made


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return random values, the same on all ranks; wide floats have bits that narrow ones lose."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def sends() -> bool:
    return dist.get_rank() < TRAINERS


def refit_and_compare(trainer: nn.Module, engine: nn.Module, steps: int = 3, **options: Any) -> Any:
    """Refit with new values a few times, and compare each tensor of the engine with the trainer's, cast."""
    own = trainer if sends() else engine
    refit = Refit(own, sends=sends(), **options)
    report = None
    for step in range(steps):
        for number, (name, tensor) in enumerate(trainer.state_dict().items()):
            tensor.copy_(values(tuple(tensor.shape), tensor.dtype, 100 * step + number))
            engine.state_dict()[name].fill_(0)
        kept = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
        report = refit()
        for name, tensor in engine.state_dict().items():
            if not sends():
                assert_same(name, tensor, kept[name].to(tensor.dtype))
        for name, tensor in trainer.state_dict().items():
            assert_same(name, tensor, kept[name])
    return report


def assert_same(name: str, actual: Tensor, expected: Tensor) -> None:
    try:
        assert_bytes_equal(actual, expected)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def all_shapes_and_dtypes() -> None:
    """Cast each dtype of the trainer to each of the engine; integers and bools keep theirs."""
    of_trainer, of_engine = {}, {}
    for shape_name, shape in SHAPES.items():
        for wide in DTYPES:
            for narrow in DTYPES:
                name = f"{shape_name} {wide} {narrow}".replace("torch.", "")
                of_trainer[name], of_engine[name] = torch.zeros(shape, dtype=wide), torch.zeros(shape, dtype=narrow)
        for dtype in (torch.int64, torch.bool, torch.uint8):
            name = f"{shape_name} {dtype}".replace("torch.", "")
            of_trainer[name] = of_engine[name] = torch.zeros(shape, dtype=dtype)
    for bucket_bytes in (200, 1 << 20):
        report = refit_and_compare(module(of_trainer), module(of_engine), rules=[], bucket_bytes=bucket_bytes)
        wanted = 0 if sends() else sum(tensor.nbytes for tensor in of_engine.values())
        assert report.bytes_received == wanted
        assert report.peak_extra_bytes <= 2 * bucket_bytes


def smallest_buckets() -> None:
    """Try all sizes from one that is too small: it is refused on all ranks, and all others work."""
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    refused: dict[int, str] = {}
    for bucket_bytes in range(30, 130, 3):
        try:
            report = refit_and_compare(module(tensors), module(tensors), 1, rules=[], bucket_bytes=bucket_bytes)
        except UnsupportedError as error:
            refused[bucket_bytes] = str(error)
        else:
            assert report.peak_extra_bytes <= 2 * bucket_bytes
    assert [*refused] == [size for size in range(30, 130, 3) if size < 64]  # 16 for each of two messages and two units
    for bucket_bytes, text in refused.items():
        assert "bucket_bytes= is too small" in text
        assert f"{bucket_bytes} bytes for 2 ranks that send and 2 that receive" in text


def other_strides() -> None:
    """Read and write tensors that are not contiguous; nothing is written to the memory between the elements."""
    shapes = {"transposed": (6, 4), "spread": (5, 3), "both": (4, 6), "whole": (3, 4), "permuted": (2, 3, 4)}
    of_trainer = {
        "transposed": torch.zeros(4, 6).t(),
        "spread": torch.zeros(10, 6)[::2, ::2],
        "both": torch.zeros(12, 8)[::2, ::2].t(),
        "whole": torch.zeros(3, 4),
        "permuted": torch.zeros(4, 2, 3).permute(1, 2, 0),
    }
    strides = {"transposed": (1, 6), "spread": (7, 2), "both": (1, 9), "whole": (5, 1), "permuted": (1, 2, 6)}
    guards: dict[str, Guarded] = {n: guarded(shapes[n], torch.bfloat16, strides=strides[n]) for n in shapes}
    engine = module({name: guard.tensor for name, guard in guards.items()})
    trainer = module(of_trainer)
    assert not any(t.is_contiguous() for n, t in trainer.state_dict().items() if n != "whole")
    for bucket_bytes in (100, 1 << 20):
        refit_and_compare(trainer, engine, rules=[], bucket_bytes=bucket_bytes)
        for guard in guards.values():
            guard.check()


def shards_of_other_strides() -> None:
    """Read and write the local parts of DTensors, which are transposed in memory."""
    whole = values((9, 4), torch.float32, 1)
    mesh = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])][not sends()]
    placement = Shard(0) if sends() else Shard(1)
    part = distribute_tensor(whole.clone(), mesh, [placement], src_data_rank=None).to_local()
    local = part.t().contiguous().t()
    assert not local.is_contiguous()
    if not sends():
        local.fill_(0)
    tensor = DTensor.from_local(local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())
    Refit(module({"a": tensor}), sends=sends(), rules=[], bucket_bytes=128)()
    assert_bytes_equal(local, part)


def tied() -> None:
    """Fill a parameter with two names once, and send it once."""
    sizes = []
    for _ in range(2):
        made = module({"a": torch.zeros(5, 3), "b": torch.zeros(2)})
        made.register_parameter("c", made.a)
        sizes.append(made)
    report = refit_and_compare(*sizes, rules=[])
    assert report.bytes_received == (0 if sends() else 4 * (15 + 2))


def buffers() -> None:
    """Fill persistent buffers; others keep their values."""
    trainer, engine = (module({"steps": torch.zeros(3, dtype=torch.int32)}) for _ in range(2))
    for made in (trainer, engine):
        made.register_buffer("scale", torch.zeros(2))
        made.register_buffer("cache", torch.full((2,), float(dist.get_rank())), persistent=False)
    refit_and_compare(trainer, engine, rules=[])
    assert_bytes_equal(engine.cache, torch.full((2,), float(dist.get_rank())))


def moved_tensors() -> None:
    """Give both modules new memory between calls, without new plans."""
    made = module({"a": torch.zeros(6, 4), "b": torch.zeros(3)})
    refit = Refit(made, sends=sends(), rules=[])
    for step in range(4):
        for number, parameter in enumerate(made.parameters()):
            fresh = values(tuple(parameter.shape), torch.float32, 10 * step + number)
            if step % 2:
                fresh = fresh.t().contiguous().t() if fresh.ndim > 1 else fresh
            parameter.data = fresh if sends() else torch.empty_like(fresh).fill_(0)
        refit()
        for number, parameter in enumerate(made.parameters()):
            assert_bytes_equal(parameter.data, values(tuple(parameter.shape), torch.float32, 10 * step + number))


def some_of_the_ranks() -> None:
    """Use a group in which ranks have other numbers than in the world, and trainers and engines are mixed."""
    group = dist.new_group([0, 2, 3])
    own = dist.get_rank()
    if own == 1:
        return
    whole = values((7, 3), torch.float32, 5)
    made = module({"a": torch.zeros(7, 3) if own == 0 else whole.clone()})
    refit = Refit(made, sends=own != 0, group=group, rules=[], bucket_bytes=100)
    report = refit()
    assert_bytes_equal(made.a.data, whole)
    forecast = refit.forecast()
    assert (forecast.senders, forecast.receivers) == ((1, 2), (0,))
    assert {*forecast.links} == {(1, 0), (2, 0)}
    assert report.bytes_sent == forecast.bytes_sent.get(dist.get_rank(group), 0)
    assert report.bytes_received == (84 if own == 0 else 0)


def replicas_share() -> None:
    """Divide the sending evenly among ranks that hold the same, for each receiver and in all."""
    tensors = {f"t{number}": torch.zeros(size, 16) for number, size in enumerate((64, 3, 17, 1, 40, 9))}
    refit = Refit(module(tensors), sends=dist.get_rank() < 3, rules=[], bucket_bytes=512)
    forecast = refit.forecast()
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(forecast.bytes_sent.values()) == total
    assert forecast.bytes_received == {3: total}
    assert max(forecast.bytes_sent.values()) - min(forecast.bytes_sent.values()) <= 512
    assert 1 <= forecast.imbalance < 1.1
    assert refit().bytes_sent == forecast.bytes_sent.get(dist.get_rank(), 0)


def colocated() -> None:
    """Fill an engine in the process of a trainer: what it holds itself is copied without a message."""
    mesh = DeviceMesh("cpu", [0, 1, 2, 3])
    whole = values((8, 6), torch.float32, 3)
    for engines in ((0,), (0, 1, 2, 3), (1, 3)):
        trainer = module({"a": distribute_tensor(whole.clone(), mesh, [Shard(0)], src_data_rank=None)})
        engine = module({"a": torch.zeros(8, 6, dtype=torch.bfloat16)}) if dist.get_rank() in engines else None
        refit = Refit(trainer, sends=True, engine=engine, rules=[], bucket_bytes=400)
        for step in range(2):
            now = values((8, 6), torch.float32, 50 + step)
            part = distribute_tensor(now.clone(), mesh, [Shard(0)], src_data_rank=None)
            trainer.a.detach().to_local().copy_(part.to_local())
            report = refit()
            if engine is not None:
                assert_bytes_equal(engine.a.data, now.bfloat16())
        assert report.bytes_received == (72 if engine is not None else 0)  # 6 of 8 rows
        assert report.bytes_sent == 24 * (len(engines) - (engine is not None))
        assert report.peak_extra_bytes <= 2 * 400
        forecast = refit.forecast()
        assert all(sender != receiver for sender, receiver in forecast.links)
        assert forecast.receivers == engines


def colocated_with_others() -> None:
    """Let rank 0 do both, while rank 1 only sends, and ranks 2 and 3 only receive."""
    own = dist.get_rank()
    whole = values((8, 6), torch.float32, 3)
    mesh = DeviceMesh("cpu", [0, 1])
    engine = module({"a": torch.zeros(8, 6)}) if own != 1 else None
    if own < 2:
        trainer = module({"a": distribute_tensor(whole.clone(), mesh, [Shard(0)], src_data_rank=None)})
        refit = Refit(trainer, sends=True, engine=engine, rules=[])
    else:
        refit = Refit(engine, sends=False, rules=[])
    report = refit()
    if engine is not None:
        assert_bytes_equal(engine.a.data, whole)
    assert report.bytes_sent == {0: 2 * 96, 1: 3 * 96}.get(own, 0)
    assert report.bytes_received == {0: 96, 1: 0, 2: 192, 3: 192}[own]


def colocated_replicas() -> None:
    """Let ranks 0 and 1 hold all of the trainer, rank 0 an engine too, and cut what they share in two."""
    own = dist.get_rank()
    shapes = {"a": (9, 5), "b": (1, 7), "c": ()}
    engine = module({name: torch.zeros(shape) for name, shape in shapes.items()}) if own != 1 else None
    trainer = module({name: torch.zeros(shape) for name, shape in shapes.items()}) if own < 2 else None
    first = trainer if trainer is not None else engine
    assert first is not None
    options = {"engine": engine} if trainer is not None else {}
    refit = Refit(first, sends=own < 2, rules=[], bucket_bytes=300, **options)
    for step in range(2):
        now = {
            name: values(shape, torch.float32, 10 * step + number)
            for number, (name, shape) in enumerate(shapes.items())
        }
        for name, tensor in trainer.state_dict().items() if trainer is not None else ():
            tensor.copy_(now[name])
        report = refit()
        for name, tensor in engine.state_dict().items() if engine is not None else ():
            assert_same(name, tensor, now[name])
    total = 4 * (45 + 7 + 1)
    assert report.bytes_received == {0: 0, 1: 0, 2: total, 3: total}[own]
    forecast = refit.forecast()
    assert sum(forecast.bytes_sent.values()) == 2 * total
    assert 0 < min(forecast.bytes_sent[0], forecast.bytes_sent[1])
    assert 0 not in forecast.bytes_received or not forecast.bytes_received[0]


def exchanged_bytes() -> None:
    """Send bytes of any length from each rank to some others and to itself; empty ones do not arrive."""

    def sent(sender: int, receiver: int) -> bytes:
        return bytes([sender, receiver]) * ((sender * 3 + receiver * 5) % 7)

    own, ranks = dist.get_rank(), range(4)
    outgoing = {rank: sent(own, rank) for rank in ranks if rank != own - 1}
    incoming = exchange_bytes(dist.group.WORLD, outgoing, torch.device("cpu"), "a test")
    wanted = {rank: sent(rank, own) for rank in ranks if own != rank - 1}
    assert incoming == {rank: data for rank, data in wanted.items() if data}


def replicas_of_the_engine() -> None:
    """Send each element to each rank of the engine that holds it, from one rank."""
    whole = values((8, 6), torch.float32, 3)
    mesh = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])][not sends()]
    tensor = distribute_tensor(whole.clone(), mesh, [Shard(1) if sends() else Replicate()], src_data_rank=None)
    if not sends():
        tensor.to_local().fill_(0)
    report = Refit(module({"a": tensor}), sends=sends(), rules=[])()
    assert_bytes_equal(
        tensor.to_local(), distribute_tensor(whole, mesh, tensor.placements, src_data_rank=None).to_local()
    )
    assert report.bytes_sent == (192 if sends() else 0)
    assert report.messages == 2


def memory_is_that_of_the_buckets() -> None:
    """Count the tensors that a refit allocates: two buckets in the first call, and none later."""
    bucket_bytes = 1 << 16
    tensors = {f"t{number}": torch.zeros(512, 200) for number in range(4)}
    tensors = {name: tensor if sends() else tensor.bfloat16() for name, tensor in tensors.items()}
    refit = Refit(module(tensors), sends=sends(), rules=[], bucket_bytes=bucket_bytes)
    for step in range(3):
        with Allocations() as allocations:
            report = refit()
        exchanged = 4096  # texts about failures
        assert report.peak_extra_bytes <= 2 * bucket_bytes
        assert report.peak_extra_bytes > bucket_bytes
        assert allocations.nbytes <= (report.peak_extra_bytes if step == 0 else 0) + exchanged


class Allocations(TorchDispatchMode):
    """Counts the bytes of new memory that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() not in before:
                self.nbytes += tensor.untyped_storage().nbytes()
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def forecast_costs_nothing() -> None:
    """Forecast on all ranks alike, before any call; no bytes move and nothing is written."""
    made = module({"a": torch.full((7, 3), float(POISON))})
    refit = Refit(made, sends=sends(), rules=[], bucket_bytes=100)
    gathered: list[Any] = [None] * 4
    dist.all_gather_object(gathered, repr(refit.forecast()))
    assert len(set(gathered)) == 1
    assert bool((made.a == POISON).all())
    assert str(refit.forecast())


FUNCTIONS: tuple[Callable[[], None], ...] = (
    all_shapes_and_dtypes,
    smallest_buckets,
    other_strides,
    shards_of_other_strides,
    tied,
    buffers,
    moved_tensors,
    some_of_the_ranks,
    replicas_share,
    colocated,
    colocated_with_others,
    colocated_replicas,
    exchanged_bytes,
    replicas_of_the_engine,
    memory_is_that_of_the_buckets,
    forecast_costs_nothing,
)
VARIANTS = {function.__name__.replace("_", " "): function for function in FUNCTIONS}
