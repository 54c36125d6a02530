"""Forecasts of what a refit would cost for ranks that are not here, from ``config.json`` only."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from automodel_conv.cli.engine_mesh import Division, EngineMesh
from automodel_conv.cli.refit_sides import EngineTensors, engine_tensors, trainer_parts
from automodel_conv.dtypes import itemsize
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.files.choosing import INDEX_SUFFIX
from automodel_conv.files.config import CONFIG_NAME, stated_dtype
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.refitting.agreement import Roles
from automodel_conv.refitting.costs import RefitForecast
from automodel_conv.refitting.elsewhere import forecast_elsewhere
from automodel_conv.refitting.planned import bucket_for
from automodel_conv.upstream.from_config import meta_model


class Divided(NamedTuple):
    """Tensors of the engine that are divided in the same way."""

    division: Division
    modules: tuple[str, ...]
    """Last part of the names of their modules."""
    nbytes: int
    """Bytes of the whole tensors."""
    most_bytes: int
    """Most bytes that a rank holds of them."""


@dataclass(frozen=True)
class RefitPlan:
    """Costs of a refit, and the division of the tensors of the engine.

    Attributes:
        forecast: as ``Refit.forecast`` would return it.
        divided: the divisions of the engine's tensors.
        busiest_link: the sender and the receiver between which most bytes are sent; None if nothing is.
    """

    forecast: RefitForecast
    divided: tuple[Divided, ...]

    @property
    def busiest_link(self) -> tuple[int, int] | None:
        links = self.forecast.links
        return max(links, key=links.__getitem__) if links else None


def described_model(path: str, source: SourceOptions, dtype: torch.dtype | str | None) -> nn.Module:
    """Return the model of a ``config.json`` on the meta device.

    Args:
        path: a checkpoint, of which headers are read; or a directory that has a ``config.json`` and no weights.
        source: how to reach it.
        dtype: dtype of the model; None or "auto": the config's.

    Raises:
        CheckpointError, UnsupportedError: see ``open_checkpoint`` and ``meta_model``; or nothing states a dtype.
    """
    checkpoint = _opened(os.path.expanduser(path), source)
    dtype = None if isinstance(dtype, str) else dtype
    if dtype is None and not checkpoint.names and stated_dtype(checkpoint.directory) is None:
        raise UnsupportedError(
            message(
                "config.json states no dtype, and there are no weights that have one",
                where=checkpoint.path,
                do="pass {dtype=}, that of the engine",
            )
        )
    return meta_model(checkpoint, dtype)


def _opened(path: str, source: SourceOptions) -> Checkpoint:
    directory = os.path.join(path, *filter(None, SourceSettings(**source).subfolder.split("/")))
    if system.is_directory(directory) and system.is_file(os.path.join(directory, CONFIG_NAME)):
        names = system.list_names(directory)
        if not any(name.endswith((".safetensors", INDEX_SUFFIX)) for name in names):
            return Checkpoint(directory, directory, (), [], [], [], [], [], [], {}, {})
    return open_checkpoint(path, **source)


def refit_plan(
    model: nn.Module,
    trainer: Mapping[str, int],
    engine: EngineMesh,
    bucket_bytes: int,
    begin_step: Callable[[str], None] = lambda step: None,
) -> RefitPlan:
    """Return what a refit between the ranks of two meshes would cost.

    The trainer holds the parameters and persistent buffers of the model, divided as ``forecast`` states. The engine
    holds the same tensors in the same dtypes, with routed experts in the layout of vLLM, divided as ``engine_mesh``
    states. A trainer that holds other dtypes sends the same bytes, since it casts before it sends.

    Args:
        model: the model, even on the meta device.
        trainer: size of each dimension of the trainer's mesh by name.
        engine: the ranks of the engine.
        bucket_bytes: most bytes of a bucket.
        begin_step: function that is called with the name of each step before it begins.

    Raises:
        UnsupportedError: the engine's ranks do not divide a tensor, or copies cannot fill one.
        NameProblems: the rules of the model do not fit its names.
    """
    begin_step("plan")
    senders = prod(trainer.values())
    roles = Roles(tuple(range(senders)), tuple(range(senders, senders + engine.ranks)))
    published = trainer_parts(model, trainer, bucket_for(bucket_bytes, roles).least_bytes)
    tensors = engine_tensors(model, published, engine)
    forecast = forecast_elsewhere(published, tensors.plan, tensors.regions, senders, bucket_bytes, begin_step)
    return RefitPlan(forecast, _divided(tensors))


def _divided(tensors: EngineTensors) -> tuple[Divided, ...]:
    parts = []
    for division in Division:
        targets = [target for target in tensors.plan.targets if tensors.divisions[target.name] is division]
        if not targets:
            continue
        modules = dict.fromkeys(target.name.rpartition(".")[0].rpartition(".")[2] or target.name for target in targets)
        held = (
            sum(prod(regions[target.name].local_shape) * itemsize(target.dtype) for target in targets)
            for regions in tensors.regions
        )
        parts.append(Divided(division, tuple(modules), sum(target.nbytes for target in targets), max(held)))
    return tuple(parts)
