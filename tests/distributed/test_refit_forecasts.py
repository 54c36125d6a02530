"""Tests that a forecast for meshes equals the forecast of a refit between real ranks of these meshes."""

import pytest

pytest.importorskip("transformers", reason="builds transformers models")

from automodel_conv.cli.engine_mesh import parse_engine_mesh
from automodel_conv.cli.forecast import parse_mesh
from automodel_conv.cli.refit_plan import refit_plan
from tests.distributed.refit_forecasts import BUCKET_BYTES, build
from tests.distributed.starting import results, run_suite

TIED, UNEVEN, LATENT = "qwen3_moe, tied", "qwen3_moe", "deepseek_v3"
OF_FOUR = [
    f"{UNEVEN}; fsdp=2; tp=2,ep=2",
    f"{UNEVEN}; ep=2; tp=2",
    f"{UNEVEN}; ep=2; ep=2",
    f"{TIED}; fsdp=2; dp=2",
    f"{TIED}; ep=2; tp=2",
    f"{TIED}; replicate=2; replicate=2",
    f"{LATENT}; fsdp=2; tp=2",
    f"{LATENT}; fsdp=2; ep=2",
    f"{LATENT}; ep=2; tp=2,ep=2",
    f"{LATENT}; replicate=2; tp=2",
]
OF_SIX = [
    f"{TIED}; fsdp=2,ep=2; dp=2",
    f"{UNEVEN}; fsdp=2,ep=2; tp=2",
    f"{LATENT}; fsdp=2,ep=2; tp=2",
    f"{LATENT}; fsdp=2,ep=2; tp=2,ep=2",
]


@pytest.mark.parametrize(("world", "variants"), [(4, OF_FOUR), (6, OF_SIX)], ids=["2 + 2", "4 + 2"])
def test_forecast_equals_that_of_real_ranks(world, variants, tmp_path):
    ended = run_suite("refit_forecasts", world, tmp_path, variants)
    for variant in variants:
        [real] = results(ended[variant])[0]
        name, trainer, engine = variant.split("; ")
        plan = refit_plan(build(name, "meta"), parse_mesh(trainer), parse_engine_mesh(engine), BUCKET_BYTES)
        links = [[*link, nbytes] for link, nbytes in sorted(plan.forecast.links.items())]
        forecast = plan.forecast
        left_out = list(forecast.left_out)
        assert [links, forecast.messages, forecast.rounds, forecast.peak_extra_bytes, left_out] == real, variant
        assert forecast.rounds > 3
