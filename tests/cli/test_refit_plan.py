"""Tests of ``refit_plan``: its parts are exact, and it needs no weights."""

import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="builds transformers models")

from automodel_conv.cli.engine_mesh import Division, parse_engine_mesh
from automodel_conv.cli.forecast import parse_mesh
from automodel_conv.cli.refit_plan import described_model, refit_plan
from automodel_conv.errors import CheckpointError
from tests.model_zoo import build_on_meta

BUCKET_BYTES = 1 << 16


def plan_of(trainer, engine, name="qwen3_moe"):
    return refit_plan(build_on_meta(name), parse_mesh(trainer), parse_engine_mesh(engine), BUCKET_BYTES)


@pytest.fixture(scope="module")
def config(moe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("config")
    shutil.copy(moe / "config.json", directory)
    return directory


def test_each_rank_receives_what_it_holds():
    """No rank is on both sides, so all bytes that an engine holds are sent."""
    for engine in ("tp=2", "tp=2,ep=4", "dp=2", "replicate=3"):
        plan = plan_of("fsdp=2,ep=2", engine)
        held = [part.most_bytes for part in plan.divided]
        assert max(plan.forecast.bytes_received.values()) <= sum(held)
        assert len(plan.forecast.bytes_received) == parse_engine_mesh(engine).ranks
    [(division, modules, nbytes, most_bytes), *_] = plan.divided
    assert division is Division.INTERMEDIATE
    assert modules == ("experts",)
    assert nbytes == most_bytes > 0


def test_equal_engines_receive_the_same():
    one, two = plan_of("fsdp=2", "tp=2").forecast, plan_of("fsdp=2", "tp=2,replicate=2").forecast
    received = list(two.bytes_received.values())
    assert received == 2 * list(one.bytes_received.values())
    assert one.senders == two.senders == (0, 1)
    assert two.receivers == (2, 3, 4, 5)


def test_the_busiest_link_has_most_bytes():
    plan = plan_of("fsdp=3", "tp=2")
    assert plan.forecast.links[plan.busiest_link] == max(plan.forecast.links.values())


def test_steps_are_named():
    named = []
    refit_plan(build_on_meta("qwen3_moe"), {"fsdp": 2}, parse_engine_mesh("tp=2"), BUCKET_BYTES, named.append)
    assert named == ["plan", "rank 1 of 2 of the engine", "rank 2 of 2 of the engine", "rounds"]


def test_a_config_is_enough(config, moe):
    names = described_model(str(config), {}, None).state_dict().keys()
    assert names == described_model(str(moe), {}, None).state_dict().keys()


def test_a_checkpoint_is_read_by_its_headers(moe, no_tensor_data):
    model = described_model(str(moe), {}, torch.float32)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_a_directory_without_config_and_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        described_model(str(tmp_path), {}, None)
