"""The tensors of an engine's module that a refit fills, and the plan from the checkpoint's names to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.destinations.model import find_attributes
from automodel_conv.distributed.placements import local_of
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import NameProblems, UnsupportedError, listing, message
from automodel_conv.loading_code.calling import Load
from automodel_conv.loading_code.dry_run import traced
from automodel_conv.loading_code.stand_ins import named_tensors
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.refitting.agreement import Published
from automodel_conv.refitting.held import Held, held


@dataclass(frozen=True)
class Engine:
    """Tensors of a rank of the engine, and the plan that fills them."""

    held: Held
    """The tensors of its module."""
    plan: CopyPlan
    """From the checkpoint's tensors to the whole tensors of the module that a refit fills."""
    unchanged: tuple[str, ...]
    """Names of buffers that the loader writes nothing to."""


def tensors_of_engine(module: nn.Module, loader: Load | None) -> dict[str, Tensor]:
    """Return the tensors that a refit fills in a module of the engine: parameters and persistent buffers.

    With a ``loader`` these are all parameters and buffers, under the names of ``named_parameters``.
    """
    if loader is not None:
        return named_tensors(module)
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _refuse_copies(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedError if ``state_dict()`` returns a tensor that is not one of the module."""
    for name, attributes in find_attributes(module, tensors).items():
        if not attributes:
            raise UnsupportedError(
                message(
                    f"{name} is neither a parameter nor a buffer of the module",
                    found="a tensor that its state_dict() creates, so writing to it changes nothing",
                    do="pass loader=, the code that fills the module",
                )
            )


def engine_of(
    published: Published,
    module: nn.Module,
    rules: Iterable[Any] | None,
    layout: str | None,
    loader: Load | None,
    experts: Sequence[int] | None,
    num_experts: int,
) -> Engine:
    """Return what a module of the engine has to be filled with.

    Args:
        published: what the trainer's ranks hold, and the tensors of the checkpoint that it would save.
        module: the engine's module, without the wrappers of torch unless there is a loader.
        rules, layout: as for ``load_model``.
        loader: code that fills the module; then there are no rules and no layout.
        experts, num_experts: as for ``held``.

    Raises:
        NameProblems: a parameter has no tensor, or a tensor has no place in a module without a loader.
        UnsupportedError: something other than copies fills a parameter.
    """
    table = table_of(published.plan.targets)
    tensors = tensors_of_engine(module, loader)
    of_rank = held(tensors, experts, num_experts)
    if loader is not None:
        plan, unchanged = _by_loader(table, module, loader, tensors)
        return Engine(of_rank, plan, unchanged)
    _refuse_copies(module, tensors)
    specs = None
    if experts is not None:
        own = of_rank.table
        specs = {n: TargetSpec(d, s) for n, d, s in zip(own.names, own.dtypes, own.shapes, strict=True)}
    plan, problems = loading_plan(
        table,
        model=module,
        rules=rules,
        layout=layout,
        source_layout=published.layout,
        in_place=True,
        targets=specs,
    )
    problems.raise_unless_fit("the trainer's tensors and the engine's module")
    if plan.fallbacks:
        raise _not_copied("\n" + listing(plan.fallbacks))
    return Engine(of_rank, _without_aliases(plan, tensors), ())


def _by_loader(
    published: SourceTable, module: nn.Module, loader: Load, tensors: Mapping[str, Tensor]
) -> tuple[CopyPlan, tuple[str, ...]]:
    """Return the plan of a loader, and the names of the buffers that it writes nothing to."""
    trace = traced(loader, published, module, "pairs", _no_values)
    if trace.computed:
        raise _not_copied("\n" + listing(f"{name}: {unknown.reason}" for name, unknown in trace.computed.items()))
    removed = [*trace.changes.removed]
    added = [target.name for target in trace.plan.targets if target.name not in tensors]
    other = [
        (target.name, target.shape, tuple(tensors[target.name].shape))
        for target in trace.plan.targets
        if target.name in tensors
        and (target.dtype, target.shape) != (dtype_code(tensors[target.name].dtype), tuple(tensors[target.name].shape))
    ]
    missing = [name for name in trace.plan.missing if isinstance(tensors.get(name), nn.Parameter)]
    if added or other or missing or removed:
        lines = [
            *(f"the loader removes {name}" for name in removed),
            *(f"the loader adds {name}" for name in added),
            *(f"the loader puts shape {list(found)} in place of {name} {list(own)}" for name, found, own in other),
            *(f"the loader writes nothing to {name}" for name in missing),
        ]
        raise NameProblems(
            message(
                "the loader does not fill the parameters of the engine's module",
                found="\n" + listing(lines),
                do="train and serve the same model; pass the module that the loader has filled before",
            ),
            missing=missing,
            unexpected=added,
            mismatched=other,
        )
    return _without_aliases(trace.plan, tensors), tuple(trace.plan.missing)


def _no_values(rows: Sequence[int]) -> list[Tensor]:
    raise UnsupportedError(
        message(
            "the loader reads values of tensors",
            expected="a loader that only moves tensors: a refit plans before tensors are sent",
            do="compute these values after the refit",
        )
    )


def _not_copied(found: str) -> UnsupportedError:
    return UnsupportedError(
        message(
            "copies do not fill all parameters of the engine",
            found=found,
            do="let the loader fill buffers with the values that it computes from, and compute after each refit; write "
            "padding with zeros in the loader itself",
        )
    )


def _without_aliases(plan: CopyPlan, tensors: Mapping[str, Tensor]) -> CopyPlan:
    """Return the plan with one target for each tensor of the engine that has several names.

    Raises:
        NameProblems: the names get different tensors of the trainer.
    """
    first: dict[object, Any] = {}
    kept = []
    for target in plan.targets:
        own = local_of(tensors[target.name])
        key = (own.data_ptr(), own.shape, own.stride()) if own.numel() else target.name
        other = first.setdefault(key, target)
        if other is target:
            kept.append(target)
        elif (other.sources, other.copies, other.fills) != (target.sources, target.copies, target.fills):
            names = f"{other.name} and {target.name}"
            raise NameProblems(
                message(
                    f"{names} are one tensor of the engine, and different ones of the trainer",
                    do="tie them on both sides or on none, or leave one of them out of the trainer's module, as of "
                    "the last stage of a pipeline",
                ),
                duplicated=[(other.name, (target.name,))],
            )
    return replace(plan, targets=tuple(kept))
