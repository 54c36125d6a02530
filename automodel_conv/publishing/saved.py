"""Determine what a save writes: the tensors of a model, their dtypes, and the files that hold them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from automodel_conv.distributed.placements import local_of, meshes_of
from automodel_conv.dtypes import FLOATING, dtype_code
from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.execution.buffers import dtype_of
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.shards import Naming, Shard, Spec, divide, divide_like, parse_size
from automodel_conv.planning.code_names import parts_of_codes
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.resolve import resolve
from automodel_conv.upstream.models import model_targets, tied_names
from automodel_conv.upstream.registry import is_pretrained_model, model_rules
from automodel_conv.upstream.rules import RuleSet


def not_saved(model: nn.Module | None, reference: Checkpoint | None, written: Iterable[str]) -> list[str]:
    """Return the names in a reference, and the names that a model excludes from saving, without those written."""
    names = [] if model is None else list(model.state_dict().keys() & set(_ignored_on_save(model)))
    names += [] if reference is None else [*reference.names, *reference.left_out(())]
    written = set(written)
    return [name for name in dict.fromkeys(sorted(names)) if name not in written]


def with_dtype(
    plan: CopyPlan, dtype: torch.dtype | None, model: nn.Module | None, rules: Iterable[Any] | None = None
) -> CopyPlan:
    """Return the plan with its floating-point targets in ``dtype``, except scales and what a model keeps in float32.

    Names in a checkpoint may differ from those of the model. The rules determine the parameter that a target is loaded
    into, and the target gets the dtype of that parameter.

    Args:
        plan: plan that writes the tensors of a checkpoint.
        dtype: dtype of the targets; None: the plan is returned unchanged.
        model: model that keeps some parameters in float32.
        rules: rules by which the checkpoint is loaded; None: the rules of the model.
    """
    code = None if dtype is None else dtype_code(dtype)
    if code is None:
        return plan
    wanted: dict[int, str] = {}
    if model is not None:
        specs = model_targets(model, dtype)
        rule_set = RuleSet(model_rules(model) if rules is None else rules, model)
        assignments = resolve([target.name for target in plan.targets], rule_set, specs).assignments
        wanted = {row: specs[each.target].dtype for each in assignments for row in chain(*each.slots.values())}
    kept = parts_of_codes(table_of(plan.targets))
    targets = [
        target._replace(dtype=wanted.get(row, code)) if target.dtype in FLOATING and target.name not in kept else target
        for row, target in enumerate(plan.targets)
    ]
    return CopyPlan(plan.sources, tuple(targets), plan.rules)


def specs_of(targets: Iterable[Target]) -> list[Spec]:
    """Return the name, dtype and shape of each target.

    Raises:
        UnsupportedError: torch does not support a dtype, or there are no targets.
    """
    specs = []
    for target in targets:
        dtype_of(target.dtype, target.name)
        specs.append(Spec(target.name, target.dtype, target.shape))
    if not specs:
        raise UnsupportedError(
            message("there are no tensors to write", do="pass a model or a state dict that has tensors")
        )
    return specs


def places_in(shards: Sequence[Shard], targets: Iterable[Target]) -> list[tuple[int, int]]:
    """Return the index of each target's file, and the offset in bytes of its data in that file."""
    places = {
        spec.name: (file, offset)
        for file, shard in enumerate(shards)
        for spec, offset in zip(shard.specs, shard.offsets, strict=True)
    }
    return [places[target.name] for target in targets]


def shards_for(
    targets: Iterable[Target], reference: Checkpoint | None, max_shard_size: int | str, naming: Naming
) -> list[Shard]:
    """Divide targets among files as a reference does, or by size without a reference.

    Targets that the reference does not name are written to its last file.

    Raises:
        UnsupportedError: ``max_shard_size`` is not a size, or torch does not support a dtype.
    """
    specs = specs_of(targets)
    if reference is None:
        return divide(specs, parse_size(max_shard_size), naming)
    files = [os.path.basename(file) for file in reference.files]
    file_of = dict.fromkeys((spec.name for spec in specs), files[-1])
    file_of |= {name: files[file] for name, file in zip(reference.names, reference.file_ids, strict=True)}
    return divide_like(specs, file_of, naming.layout)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model that belong in a checkpoint, tied ones once under the name that transformers keeps.

    Raises:
        UnsupportedError: this process does not hold all tensors, or only transformers can save them.
    """
    if is_pretrained_model(model):
        if getattr(model, "hf_quantizer", None):
            text = "this package cannot save this model: it is quantized by transformers"
            raise UnsupportedError(message(text, do="use its save_pretrained"))
    tensors = model.state_dict()
    if (getattr(model, "_tp_size", None) or 1) > 1 and not meshes_of(tensors.values()):
        raise UnsupportedError(
            message(
                "this package cannot save this model: its tensors are shards that are not DTensors",
                found="tensor parallelism of a version of transformers before 5.17",
                do="use its save_pretrained",
            )
        )
    for name in _ignored_on_save(model):
        tensors.pop(name, None)
    others = [f"{name}: {type(value).__name__}" for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others:
        raise UnsupportedError(
            message(
                "this model has extra state that is not a tensor, which no checkpoint can hold",
                found="\n" + listing(others),
                do="save it separately, and pass the state dict without it, with rules=, layout= or reference=",
            )
        )
    tied = getattr(model, "all_tied_weights_keys", {})
    for group in tied_names(model):
        names = [name for name in group if name in tensors]
        kept = next((name for name in names if name not in tied), names[0] if names else None)
        for name in names:
            if name != kept and _is_same(tensors[name], tensors[kept]):  # type: ignore[index]
                del tensors[name]
    return dict(tensors)


def refuse_unlike_stored(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that have no data, or bytes in memory that differ from their values.

    Raises:
        UnsupportedError: a tensor is on the meta device, or is conjugated or negated only when it is read.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise UnsupportedError(
                message(
                    f"{name} has no data", found="it is on the meta device", do="load or materialize the model first"
                )
            )
        if tensor.is_conj() or tensor.is_neg():
            found = "a view that is conjugated or negated when it is read"
            raise UnsupportedError(
                message(
                    f"{name} cannot be saved as it is stored",
                    found=found,
                    do="call resolve_conj() and resolve_neg() first",
                )
            )


def _ignored_on_save(model: nn.Module) -> Iterable[str]:
    return getattr(model, "_keys_to_ignore_on_save", None) or ()


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    tensor, other = local_of(tensor), local_of(other)
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) == (other.data_ptr(), other.shape, other.stride())
