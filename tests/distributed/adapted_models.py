"""Suite: adapters are merged while a sharded model is loaded; each rank has its part of the merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import automodel_conv as amc
from automodel_conv.errors import NameProblems
from tests.distributed.models import Meshes, Published, assert_holds, sharded
from tests.distributed.starting import send
from tests.doors.adapters.support import MODULES, factors, merged, published, write_base
from tests.lora.support import write_adapter

CHECKS = [["experts", "per_expert"], ["experts", "transformers"], ["columns", "per_expert"], ["fsdp", "transformers"]]
"""Ways to divide a model, with the form of the adapter; three experts on two ranks are two and one."""


class Common(NamedTuple):
    """A published base, its adapter in both forms, and the merged model in two dtypes."""

    base: str
    adapters: dict[str, Path]
    misfit: Path
    sources: dict[torch.dtype, Published]


def prepare(directory: Path, world: int) -> Common:
    base = write_base(directory / "base", published())
    lora = factors(*MODULES)
    adapters = {form: directory / form for _, form in CHECKS}
    write_adapter(adapters["per_expert"], lora)
    amc.convert_adapter(adapters["per_expert"], adapters["transformers"], base=base, layout="transformers")
    misfit = write_adapter(directory / "misfit", lora | factors(MODULES[0], rank=4))
    sources = {}
    for dtype in (torch.bfloat16, torch.float32):
        path = write_base(directory / f"merged {dtype}", merged(published(), lora, dtype=dtype))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        sources[dtype] = Published(str(base), "", model, model.state_dict())
    return Common(str(base), adapters, misfit, sources)


def rank(common: Common, variant: str, directory: Path) -> None:
    meshes = Meshes()
    for kind, form in CHECKS:
        _loads(common, kind, meshes, common.adapters[form])
        send([kind, form])
    _misfit_fails_on_all_ranks(common, meshes)


def _loads(common: Common, kind: str, meshes: Meshes, adapter: Path) -> None:
    for source in common.sources.values():
        model = sharded(source, kind, meshes)
        report = amc.load_model(model, common.base, adapter=adapter)
        assert_holds(model.state_dict(), source)
        assert report.adapted
    source = common.sources[torch.bfloat16]
    for options in ({}, {"broadcast": True}, {"memory_map": True}):
        model = sharded(source, kind, meshes)
        loaded = amc.load_state_dict(common.base, model, adapter=adapter, **options)
        assert_holds(dict(loaded), source)
    for options in ({"broadcast": True}, {"memory_map": True}):
        new = sharded(source, kind, meshes, meta=True)
        amc.load_model(new, common.base, adapter=adapter, **options)
        assert_holds(new.state_dict(), source)


def _misfit_fails_on_all_ranks(common: Common, meshes: Meshes) -> None:
    """Load an adapter that changes expert 0 wrongly, which only the first rank holds: all ranks refuse it."""
    model = sharded(common.sources[torch.bfloat16], "experts", meshes)
    with pytest.raises(NameProblems, match=MODULES[0]):
        amc.load_model(model, common.base, adapter=common.misfit)
    dist.barrier()
