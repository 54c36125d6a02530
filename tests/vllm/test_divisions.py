"""Tests that ``refit-plan`` divides tensors as vLLM's own classes do: each rank holds the same bytes of each module."""

from __future__ import annotations

from math import prod

import pytest

pytest.importorskip("vllm")

from automodel_conv.cli.engine_mesh import parse_engine_mesh
from automodel_conv.cli.refit_plan import described_model
from automodel_conv.cli.refit_sides import engine_tensors, trainer_parts
from automodel_conv.dtypes import itemsize
from tests.distributed.starting import results, run_suite
from tests.vllm.cases import write
from tests.vllm.divisions import ARCHITECTURES, VARIANTS, by_kind


@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_holds_what_a_rank_of_vllm_holds(world, tmp_path):
    variants = [name for name, (tp, dp, _) in VARIANTS.items() if tp * dp == world]
    ended = run_suite("tests.vllm.divisions", world, tmp_path, variants)
    for number, architecture in enumerate(ARCHITECTURES):
        write(architecture, tmp_path / architecture)
        model = described_model(str(tmp_path / architecture), {}, None)
        for variant in variants:
            tensors = engine_tensors(model, trainer_parts(model, {}, 1 << 20), parse_engine_mesh(variant))
            sizes = {target.name: itemsize(target.dtype) for target in tensors.plan.targets}
            for rank, held in enumerate(results(ended[variant])):
                regions = tensors.regions[rank].items()
                own = by_kind((name, prod(region.local_shape) * sizes[name]) for name, region in regions)
                assert own == held[number], (architecture, variant, rank)
