"""Tests of ``forecast``: ranks read exactly the forecast bytes, call by call."""

import itertools
import math
import os

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from automodel_conv.cli.forecast import Forecast, forecast, parse_mesh
from automodel_conv.compiling.planned import compile_plan
from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import UnsupportedError
from automodel_conv.execution.host import load_to_host
from automodel_conv.files import system
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.planning.copies import Fallback
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.sharding import placed
from automodel_conv.upstream.registry import transformers_available
from tests.execution.support import LAYOUTS, moe

THREADS = 8  # the forecast assumes this number, which decides how jobs are cut

# Placements of grouped experts, and of all other tensors, by mesh dimension.
MESHES = {
    "ep=2": ([Shard(0)], [Replicate()]),
    "ep=3": ([Shard(0)], [Replicate()]),
    "ep=8": ([Shard(0)], [Replicate()]),
    "fsdp=3": ([Shard(0)], [Shard(0)]),
    "ep=2,fsdp=2": ([Shard(0), Shard(1)], [Shard(0), Shard(0)]),
    "fsdp=2,ep=2": ([Shard(1), Shard(0)], [Shard(0), Shard(0)]),
    "replicate=2,ep=2": ([Replicate(), Shard(0)], [Replicate(), Replicate()]),
    "replicate=2,ep=2,fsdp=3": ([Replicate(), Shard(0), Shard(1)], [Replicate(), Shard(0), Shard(0)]),
}


class Read:
    """A recorder of all reads: the file and the number of bytes of each."""

    def __init__(self):
        self.calls = []

    def preadv(self, fd, views, offset):
        done = os.preadv(fd, views, offset)
        self.calls.append((os.fstat(fd).st_ino, done))  # threads append, so in one step
        return done


def assert_forecast_matches(checkpoint, plan, mesh: str, monkeypatch) -> Forecast:
    """Compare the forecast cost of every rank with a load of that rank's parts."""
    sizes = parse_mesh(mesh)
    result = forecast(checkpoint, plan, sizes)
    assert result.world_size == len(result.ranks) == math.prod(sizes.values())
    assert len({rank.coordinate for rank in result.ranks}) == result.world_size
    experts, others = MESHES[mesh]
    for rank in result.ranks:
        regions = {}
        for target in plan.targets:
            grouped = target.name.split(".")[-2:-1] == ["experts"]
            placements = experts if grouped and len(target.shape) > 1 else others
            regions[target.name] = placed(target.shape, tuple(sizes.values()), rank.coordinate, placements)
        mine = plan.shard(regions)
        buffers = {t.name: torch.empty(t.shape, dtype=torch_dtype(t.dtype)) for t in mine.targets}
        read = Read()
        with monkeypatch.context() as patched:
            patched.setattr(system, "preadv", read.preadv)
            load_to_host(mine, checkpoint, buffers, threads=THREADS)
        owned = sum(buffer.nbytes for buffer in buffers.values())
        files, nbytes = zip(*read.calls, strict=True) if read.calls else ((), ())
        assert rank[1:] == (owned, sum(nbytes), len(nbytes), len(set(files))), rank
    return result


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "qwen3_vl_moe"])
def test_every_rank_of_a_small_mesh_reads_as_forecast(name, mesh, tmp_path, monkeypatch):
    if not transformers_available():
        pytest.skip("builds transformers models")
    from tests.model_zoo import build_model, write_checkpoint

    write_checkpoint(build_model(name), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    plan = compile_plan(checkpoint)
    result = assert_forecast_matches(checkpoint, plan, mesh, monkeypatch)
    owned = sum(rank.owned_bytes for rank in result.ranks)
    sizes = parse_mesh(mesh)
    if "fsdp" in sizes:  # then every tensor is divided
        assert owned == sizes.get("replicate", 1) * plan.bytes_written
    else:
        assert owned > plan.bytes_written


@pytest.mark.parametrize("mesh", ["ep=2", "fsdp=3", "ep=2,fsdp=2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_experts_in_other_layouts_are_read_as_forecast(layout, mesh, tmp_path, monkeypatch):
    """Use tensors large enough that permuted ones come in slabs and gaps are not read through."""
    _, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(4, 768, 512))
    *experts, norm = plan.targets
    named = [target._replace(name=f"experts.{target.name}") for target in experts]
    assert_forecast_matches(checkpoint, CopyPlan(plan.sources, (*named, norm)), mesh, monkeypatch)


def test_targets_computed_by_transformers_are_read_whole(tmp_path, monkeypatch):
    tensors, checkpoint, plan = moe(tmp_path)
    row = plan.sources.names.index("norm.weight")
    *experts, norm = plan.targets
    named = [target._replace(name=f"experts.{target.name}") for target in experts]
    own = norm._replace(copies=(), fallback=Fallback("a test says so", lambda sources: {"norm": sources[row]}))
    plan = CopyPlan(plan.sources, (*named, own))
    result = assert_forecast_matches(checkpoint, plan, "ep=2", monkeypatch)
    assert all(rank.read_bytes >= rank.owned_bytes > tensors["norm.weight"].nbytes for rank in result.ranks)
    with pytest.raises(UnsupportedError, match="transformers' own code"):
        forecast(checkpoint, plan, {"fsdp": 2})


def test_many_ranks_are_sampled_with_the_first_and_last(tmp_path):
    _, checkpoint, plan = moe(tmp_path)
    result = forecast(checkpoint, plan, {"replicate": 10_000_000, "ep": 3, "fsdp": 7})
    assert result.world_size == 210_000_000
    assert len(result.ranks) == len({rank.coordinate for rank in result.ranks}) == 64
    assert result.ranks[0].coordinate == (0, 0, 0)
    assert result.ranks[-1].coordinate == (9_999_999, 2, 6)
    places = [(at[0] * 3 + at[1]) * 7 + at[2] for at in (rank.coordinate for rank in result.ranks)]
    steps = [after - before for before, after in itertools.pairwise(places)]
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("mesh", [{}, {"ep": 1}, {"replicate": 1}])
def test_one_rank_reads_everything(mesh, tmp_path):
    _, checkpoint, plan = moe(tmp_path)
    [rank] = forecast(checkpoint, plan, mesh).ranks
    assert (rank.owned_bytes, rank.read_bytes, rank.files) == (plan.bytes_written, plan.bytes_read, 2)


def test_mesh_sizes_keep_their_order():
    assert list(parse_mesh(" fsdp = 8, ep=64 ").items()) == [("fsdp", 8), ("ep", 64)]
    with pytest.raises(UnsupportedError, match="not a mesh"):
        parse_mesh("ep=64,pp=2")
