"""A forecast of what ranks read is what they then read, call by call."""

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

THREADS = 8  # as the forecast has it: the number decides how jobs are cut

# Placements of grouped experts, and of all else, by dimension of the mesh.
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
    """Every call that reads: its file and its bytes."""

    def __init__(self):
        self.calls = []

    def preadv(self, fd, views, offset):
        done = os.preadv(fd, views, offset)
        self.calls.append((os.fstat(fd).st_ino, done))  # by threads, so in one step
        return done


def assert_foretold(checkpoint, plan, mesh: str, monkeypatch) -> Forecast:
    """Compare the cost of every rank with a load of that rank's parts."""
    sizes = parse_mesh(mesh)
    found = forecast(checkpoint, plan, sizes)
    assert found.world_size == len(found.ranks) == math.prod(sizes.values())
    assert len({rank.coordinate for rank in found.ranks}) == found.world_size
    experts, others = MESHES[mesh]
    for rank in found.ranks:
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
    return found


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "qwen3_vl_moe"])
def test_every_rank_of_a_small_mesh_reads_what_was_foretold(name, mesh, tmp_path, monkeypatch):
    if not transformers_available():
        pytest.skip("builds models of transformers")
    from tests.model_zoo import build_model, write_checkpoint

    write_checkpoint(build_model(name), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    plan = compile_plan(checkpoint)
    found = assert_foretold(checkpoint, plan, mesh, monkeypatch)
    owned = sum(rank.owned_bytes for rank in found.ranks)
    sizes = parse_mesh(mesh)
    if "fsdp" in sizes:  # then all is divided
        assert owned == sizes.get("replicate", 1) * plan.bytes_written
    else:
        assert owned > plan.bytes_written


@pytest.mark.parametrize("mesh", ["ep=2", "fsdp=3", "ep=2,fsdp=2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_of_many_megabytes_in_other_layouts_are_foretold_too(layout, mesh, tmp_path, monkeypatch):
    """So large that what is permuted comes in slabs, and that gaps are not read through."""
    _, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(4, 768, 512))
    *experts, norm = plan.targets
    named = [target._replace(name=f"experts.{target.name}") for target in experts]
    assert_foretold(checkpoint, CopyPlan(plan.sources, (*named, norm)), mesh, monkeypatch)


def test_what_transformers_own_code_makes_is_read_whole_and_not_divided(tmp_path, monkeypatch):
    tensors, checkpoint, plan = moe(tmp_path)
    row = plan.sources.names.index("norm.weight")
    *experts, norm = plan.targets
    named = [target._replace(name=f"experts.{target.name}") for target in experts]
    own = norm._replace(copies=(), fallback=Fallback("a test says so", lambda sources: {"norm": sources[row]}))
    plan = CopyPlan(plan.sources, (*named, own))
    found = assert_foretold(checkpoint, plan, "ep=2", monkeypatch)
    assert all(rank.read_bytes >= rank.owned_bytes > tensors["norm.weight"].nbytes for rank in found.ranks)
    with pytest.raises(UnsupportedError, match="transformers' own code"):
        forecast(checkpoint, plan, {"fsdp": 2})


def test_of_many_ranks_some_are_looked_at_the_first_and_the_last_among_them(tmp_path):
    _, checkpoint, plan = moe(tmp_path)
    found = forecast(checkpoint, plan, {"replicate": 10_000_000, "ep": 3, "fsdp": 7})
    assert found.world_size == 210_000_000
    assert len(found.ranks) == len({rank.coordinate for rank in found.ranks}) == 64
    assert found.ranks[0].coordinate == (0, 0, 0)
    assert found.ranks[-1].coordinate == (9_999_999, 2, 6)
    places = [(at[0] * 3 + at[1]) * 7 + at[2] for at in (rank.coordinate for rank in found.ranks)]
    steps = [after - before for before, after in itertools.pairwise(places)]
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("mesh", [{}, {"ep": 1}, {"replicate": 1}])
def test_one_rank_has_and_reads_all(mesh, tmp_path):
    _, checkpoint, plan = moe(tmp_path)
    [rank] = forecast(checkpoint, plan, mesh).ranks
    assert (rank.owned_bytes, rank.read_bytes, rank.files) == (plan.bytes_written, plan.bytes_read, 2)


def test_sizes_keep_the_order_in_which_they_are_given():
    assert list(parse_mesh(" fsdp = 8, ep=64 ").items()) == [("fsdp", 8), ("ep", 64)]
    with pytest.raises(UnsupportedError, match="not a mesh"):
        parse_mesh("ep=64,pp=2")
