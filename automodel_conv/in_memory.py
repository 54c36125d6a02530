"""The front doors for tensors that are in memory already: a state dict in, a state dict out, on the device it is on.

For weight refit in RL (trainer layout to inference layout and back), and wherever a checkpoint is not a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.destinations.ties import in_order, unequal_ties, with_tied
from automodel_conv.distributed.placements import is_distributed
from automodel_conv.doors import door
from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.copy_batch import takes_kernels
from automodel_conv.execution.cores import cores
from automodel_conv.execution.memory import convert_tensors
from automodel_conv.execution.new_memory import NewMemory
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.publishing.saved import not_saved
from automodel_conv.upstream.models import state_table, tied_names
from automodel_conv.upstream.wrappers import plain_model


@dataclass(frozen=True)
class StateDictReport:
    """The outcome of a conversion in memory."""

    left_out: tuple[str, ...]
    """Tensors of the state dict, and of a ``reference``, that are not in the result in any form."""
    carried: tuple[str, ...] = ()
    """Always empty: nothing is passed on that the model or the rules have no place for."""


class ConvertedStateDict(dict[str, Tensor]):
    """A state dict that also carries the report of how it was made."""

    report: StateDictReport


@door("converting")
def convert_state_dict(
    state_dict: Mapping[str, Tensor],
    model: nn.Module | None = None,
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    out: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> ConvertedStateDict:
    """Checkpoint-named tensors to model-named ones, grouped experts included.

    Tensors that nothing converts are returned by reference, unless ``out`` is given. The dict has a ``report``.

    Args:
        model: whose names, dtypes and rules to take; its tensors are neither read nor written. See ``compile_plan`` for
            models that torch has wrapped, and for tensors that have such names.
        rules: transformers' rule objects; None takes the model's. One of model, rules, layout, source_layout is needed.
        layout: how routed experts shall lie; None: as the model has them.
        source_layout: how grouped experts in ``state_dict`` lie; never guessed from shapes.
        out: tensors to write, by target name; every target needs one, of its shape and dtype.
        backend: "triton": kernels, and torch on the same device for copies that no kernel fits; "torch"; "auto":
            "triton" for tensors of one GPU where Triton can run.

    Raises:
        NameProblems: names or shapes do not fit; lists all of them.
        ConversionError: a tensor of ``out`` is missing, does not fit, or shares memory with a source or
            with another one.
        UnsupportedError: an unknown layout or backend, "triton" for tensors that kernels cannot reach, or a model with
            adapters of PEFT or names of its layers.
    """
    _require_any(model, rules, layout, source_layout)
    model = None if model is None else plain_model(model)
    plan, problems = loading_plan(
        state_table(state_dict), model=model, rules=rules, layout=layout, source_layout=source_layout
    )
    problems.raise_unless_fit("the state dict")
    converted = _run(plan, state_dict, out, backend)
    if model is not None:
        ties = tied_names(model)
        converted = in_order(with_tied(converted, ties, unequal_ties(converted, ties)), model.state_dict())
    return _reported(converted, plan.left_out)


@door("converting")
def revert_state_dict(
    state_dict: Mapping[str, Tensor],
    model: nn.Module | None = None,
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    out: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> ConvertedStateDict:
    """Model-named tensors back to checkpoint-named ones, grouped experts taken apart.

    Names come from reversing all rules, in upstream's saving order, or from a ``reference`` checkpoint. Tensors keep
    their dtype. The dict has a ``report``, which names what a reference has and the tensors do not make.

    Args:
        layout: how the experts in ``state_dict`` lie; None: as the model has them.
        reference: a checkpoint (headers only are read) whose names to restore exactly.
        model, rules, out, backend: see ``convert_state_dict``.

    Raises:
        NameProblems: the tensors do not fit the reference or the rules.
        CoverageError: a tensor of the reference is only partly in ``state_dict``.
        UnsupportedError: grouped experts that the rules are for have names that these do not meet.
        ConversionError, UnsupportedError: see ``convert_state_dict``.
    """
    _require_any(model, rules, layout, reference)
    model = None if model is None else plain_model(model)
    like = None if reference is None else open_checkpoint(reference)
    plan = saving_plan(state_table(state_dict), model=model, rules=rules, layout=layout, reference=like)
    reverted = _run(plan, state_dict, out, backend)
    return _reported(reverted, [*_without_ties(plan, state_dict), *not_saved(None, like, reverted)])


def _without_ties(plan: CopyPlan, state_dict: Mapping[str, Tensor]) -> list[str]:
    """What a plan leaves out, but for second names of tensors that it takes under another name."""
    memory = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in state_dict.values()]
    taken = {memory[row] for row in plan.used_sources}
    return [plan.sources.names[row] for row in plan.unused_sources if memory[row] not in taken or not memory[row][0]]


def _reported(tensors: dict[str, Tensor], left_out: Iterable[str]) -> ConvertedStateDict:
    made = ConvertedStateDict(tensors)
    made.report = StateDictReport(tuple(left_out))
    return made


def _require_any(*said: object) -> None:
    if all(thing is None for thing in said):
        raise UnsupportedError(message("tensors in memory come without a config", do="pass model=, rules= or a layout"))


def _run(
    plan: CopyPlan, state_dict: Mapping[str, Tensor], out: Mapping[str, Tensor] | None, backend: str
) -> dict[str, Tensor]:
    sources = list(state_dict.values())
    for name, source in state_dict.items():
        if is_distributed(source):
            raise UnsupportedError(
                message(f"{name} is a distributed tensor", do="convert its local shards, or save and load the model")
            )
    takes_kernels(backend, sources)  # refuses, even where nothing is to be moved
    if out is not None:
        convert_tensors(plan, sources, out, backend=backend)
        return {target.name: out[target.name] for target in plan.targets}
    passed = {target.name: sources[target.sources[0]] for target in plan.targets if _passes_through(plan, target)}
    made = [target for target in plan.targets if target.name not in passed]
    device = sources[0].device if sources else torch.device("cpu")
    if any(source.device != device for source in sources):
        raise ConversionError(
            message(
                "the tensors are on several devices",
                found=sorted({str(source.device) for source in sources}),
            )
        )
    buffers = allocate(made, device)
    if device.type == "cpu":
        NewMemory(list(buffers.values())).populate_all(cores())
    convert_tensors(CopyPlan(plan.sources, tuple(made), plan.rules), sources, buffers, backend=backend)
    return {target.name: passed.get(target.name, buffers.get(target.name)) for target in plan.targets}  # type: ignore[misc]


def _passes_through(plan: CopyPlan, target: Target) -> bool:
    """True if the target is one source, whole and as it is."""
    if len(target.sources) != 1 or target.fallback is not None:
        return False
    row = target.sources[0]
    return target.is_whole and (plan.sources.dtypes[row], plan.sources.shapes[row]) == (target.dtype, target.shape)
