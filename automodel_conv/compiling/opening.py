"""Open a checkpoint for a load, and compile a plan or fit the caller's plan."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from automodel_conv.compiling.decoded import decoded_table
from automodel_conv.compiling.marks import stated_layout
from automodel_conv.compiling.options import LoadSettings
from automodel_conv.compiling.planned import check_options, load_plan
from automodel_conv.compiling.to_model import shapes_to_make, without_tied
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.cores import rank_on_this_node, ranks_on_this_node
from automodel_conv.execution.report import Clock
from automodel_conv.files.checkpoint import Checkpoint, open_source
from automodel_conv.files.hub import with_repository
from automodel_conv.files.reading_ahead import reading_ahead
from automodel_conv.files.remote.urls import refuse_url
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.given_plan import Misfits, as_plan, fit_sources, fit_targets
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems
from automodel_conv.upstream.models import tied_names
from automodel_conv.upstream.registry import models_are_imported, without_ignored

_LOG = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A checkpoint and the plan that loads it."""

    checkpoint: Checkpoint
    plan: CopyPlan
    """Plan of the whole model."""
    problems: Problems
    """Tensors that do not fit."""
    model: nn.Module | None
    """The caller's model, or the one that was built from ``config.json``."""


def open_to_load(
    path: str | os.PathLike[str],
    model: nn.Module | None,
    state: Mapping[str, Tensor],
    settings: LoadSettings,
    clock: Clock,
    *,
    in_place: bool = False,
) -> Opened:
    """Open a checkpoint and compile the plan that loads it, or fit the caller's plan to it.

    Args:
        path: see ``load_state_dict``.
        model: the model, or None.
        state: the model's state dict.
        settings: the options of the load.
        clock: measures the time of each phase.
        in_place: see ``loading_plan``.

    Raises:
        CheckpointError, NameProblems, QuantizationError, UnsupportedError: see ``load_state_dict``.
    """
    given = None if settings.plan is None else as_plan(settings.plan, settings.given())
    check_options(settings)  # before a download
    clock.lap("plan")
    if settings.memory_map:
        refuse_url(path, ["download the files first", "{memory_map=False} reads URLs"])
    checkpoint = open_source(path, settings, whole=settings.memory_map)
    clock.lap("open")
    if given is not None:
        fitted, problems = fitted_plan(given, checkpoint, model, state, settings.strict, in_place)
        _warn_of_unfilled(problems, checkpoint)
        return Opened(checkpoint, fitted, problems, model)
    builds = model is None and settings.rules is None
    with while_importing(checkpoint) if builds else nullcontext():
        plan, problems, model = load_plan(checkpoint, model, settings, in_place)
    problems.raise_unless_fit(
        with_repository(checkpoint.path),
        settings.strict,
        checkpoint.unindexed,
        in_files=checkpoint.position,
        model_is_built=builds,
    )
    _warn_of_unfilled(problems, checkpoint)
    return Opened(checkpoint, plan, problems, model)


def _warn_of_unfilled(problems: Problems, checkpoint: Checkpoint) -> None:
    """Log the number of targets that a load leaves as they are; with ``strict`` they are an error instead."""
    unfilled = [*problems.missing, *(name for name, *_ in problems.mismatched)]
    if unfilled:
        text = "%d targets keep their values, because no tensor of %s fits them; the first is %s"
        _LOG.warning(text, len(unfilled), checkpoint.path, unfilled[0])


def while_importing(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """Return a context that reads ahead while transformers is imported; it does nothing if that is done already."""
    if models_are_imported():
        return nullcontext()
    return reading_ahead(checkpoint, (rank_on_this_node(), ranks_on_this_node()))


def fitted_plan(
    plan: CopyPlan,
    checkpoint: Checkpoint,
    model: nn.Module | None,
    state: Mapping[str, Tensor],
    strict: bool,
    in_place: bool = False,
) -> tuple[CopyPlan, Problems]:
    """Return the caller's plan, fitted to the rows of this checkpoint, and the problems that remain.

    Args:
        plan: the caller's plan.
        model: the model, or None.
        state: the model's state dict.
        strict: whether every difference is an error.
        in_place: see ``loading_plan``.

    Raises:
        UnsupportedError: the files state another layout of experts than the plan was compiled for, or the model's
            experts are in another layout than the plan's.
        NameProblems: the plan does not fit the checkpoint or the model.
    """
    stated = stated_layout(checkpoint, None)
    if stated not in (None, plan.source_layout):
        raise UnsupportedError(
            message(
                "the files state another layout of experts than the plan was compiled for",
                where=checkpoint.path,
                expected=repr(plan.source_layout) if plan.source_layout else "files that state no layout",
                found=repr(stated),
                do=["compile a plan for this checkpoint: {compile_plan(...)}", "leave {plan} out"],
            )
        )
    misfits = Misfits()
    table = (
        decoded_table(checkpoint, needs_values=False)
        if plan.sources.decodes
        else SourceTable.from_checkpoint(checkpoint)
    )
    fitted = fit_sources(plan, table, misfits, strict)
    problems = Problems(list(plan.missing), list(plan.unexpected), list(plan.mismatched))
    if model is not None:
        missing = fit_targets(plan, shapes_to_make(model, state, plan.layout, in_place=in_place), misfits)
        fitted = replace(fitted, tied=tuple(tied_names(model)))
        missing = without_tied(missing, plan, fitted.tied)
        problems.missing, problems.unexpected = without_ignored(model, missing, problems.unexpected)
    misfits.raise_if_any(with_repository(checkpoint.path), plan, problems.missing if strict else [])
    problems.raise_unless_fit(with_repository(checkpoint.path), strict, checkpoint.unindexed)
    return fitted, problems
