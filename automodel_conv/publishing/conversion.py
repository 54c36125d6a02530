"""Plan a conversion from files to files, reading only headers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from automodel_conv.compiling.carrying import carried_targets, checked_patterns, dropped_rows, refuse_halves
from automodel_conv.compiling.decoded import codes_without_config, decoded_table, quantization_of
from automodel_conv.compiling.keeping import keeps_parts, kept_plan, only_renames
from automodel_conv.compiling.marks import layout_to_read, naming_of_conversion, stated_layout
from automodel_conv.compiling.stages import without_casts
from automodel_conv.compiling.to_checkpoint import in_saving_order, saving_plan
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.doors import door, keyword_options
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import (
    UnsupportedError,
    listing,
    message,
)
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.files.hub import with_repository
from automodel_conv.files.shards import Naming, Shard, divide, parse_size
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.planning.code_names import has_codes, names_of_codes
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.layouts import PER_EXPERT, get_layout, holds_grouped_experts
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.unmarked import unsplit_experts_error
from automodel_conv.publishing.saved import specs_of, with_dtype
from automodel_conv.upstream.from_config import meta_model
from automodel_conv.upstream.given_dtypes import dtype_for, given_dtype
from automodel_conv.upstream.given_rules import given_rules

DEFAULT_SCRATCH_BYTES = 256 << 20
"""Default limit in bytes for the memory of a conversion, or of a comparison of two checkpoints."""


@dataclass(frozen=True)
class Conversion:
    """A conversion from files to files, planned from headers only."""

    checkpoint: Checkpoint
    """The source checkpoint."""
    plan: CopyPlan
    """The plan of all tensors that are written."""
    shards: tuple[Shard, ...]
    """The output files."""
    naming: Naming
    """Names of the output files, and the layout that they record."""
    carried: tuple[str, ...]
    """Names of source tensors that the model has no place for, copied unchanged."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of source tensors that are not converted: dropped, or, if codes are decoded, activation scales."""
        return self.checkpoint.left_out(self.plan.unused_sources)

    @property
    def kept_codes(self) -> tuple[str, ...]:
        """Names of the tensors that are written as codes, with scales next to them."""
        return names_of_codes(table_of(self.plan.targets))

    @property
    def is_copy(self) -> bool:
        """Whether each tensor is written with the name, dtype, shape and bytes of one source tensor."""
        return all(self._is_copied(target) for target in self.plan.targets)

    def _is_copied(self, target: Target) -> bool:
        if target.fallback is not None or not target.is_whole or len(target.sources) != 1:
            return False
        [row] = target.sources
        source = self.checkpoint.names[row], self.checkpoint.dtypes[row], self.checkpoint.shapes[row]
        return row not in self.plan.sources.decodes and source == (target.name, target.dtype, target.shape)

    @property
    def bytes_needed(self) -> int:
        """Size in bytes of the output files."""
        return sum(shard.nbytes for shard in self.shards)


def check_arguments(
    layout: str | None, source_layout: str | None, dtype: torch.dtype | str | None, max_shard_size: int | str
) -> None:
    """Raise UnsupportedError for arguments of ``compile_conversion`` that no checkpoint can fit."""
    given_dtype(dtype)
    parse_size(max_shard_size)
    for name in (layout, source_layout):
        if name not in (None, PER_EXPERT):
            get_layout(name, PER_EXPERT)


@door("planning")
@keyword_options(SourceOptions, SourceSettings)
def compile_conversion(
    source: Checkpoint | str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    dequantize: bool = False,
    drop: str | Iterable[str] = (),
    max_shard_size: int | str = "5GB",
    **options: Unpack[SourceOptions],
) -> Conversion:
    """Plan a ``convert_checkpoint`` with the same arguments, reading no more than ``compile_plan`` does."""
    drop = checked_patterns(drop)
    check_arguments(layout, source_layout, dtype, max_shard_size)
    if isinstance(source, Checkpoint):
        checkpoint = source
    else:
        checkpoint = open_checkpoint(source, **SourceSettings(**options).shared(source).source())
    dtype = dtype_for(dtype, checkpoint)
    most_bytes = parse_size(max_shard_size)
    rules = given_rules(rules)
    keeps_names = layout is None and source_layout is None and rules == []
    source_layout = layout_to_read(checkpoint, source_layout, keeps_names=keeps_names)
    table = decoded_table(checkpoint, needs_values=True) if dequantize else SourceTable.from_checkpoint(checkpoint)
    dropped = dropped_rows(checkpoint.names, drop)
    table = replace(table, hidden=table.hidden | dropped)
    model = meta_model(checkpoint, dtype) if rules is None else None
    # Codes of separate experts are copied unchanged: no model accepts them, and there is nothing to split.
    codes = None if dequantize else has_codes(table)
    keeps_codes = layout == PER_EXPERT and codes is not None and not any(map(holds_grouped_experts, table.names))
    stays = codes is None or keeps_codes or keeps_names
    renames = model is None and not dropped and only_renames(rules, layout, source_layout)

    def plan_for(
        sources: SourceTable, dtype: torch.dtype | None, *, produce_all: bool = False
    ) -> tuple[CopyPlan, frozenset[int]]:
        """Return the plan, and the rows of carried tensors."""
        plan, problems = loading_plan(
            sources,
            model=None if keeps_codes else model,
            rules=[] if keeps_codes else rules,
            layout=None if layout == PER_EXPERT else layout,
            source_layout=source_layout,
            dtype=None if model is not None else dtype,
            produce_all=produce_all,
        )
        carried = problems.accept_unclaimed()
        if not dequantize:
            carried |= plan.sources.hidden - sources.hidden  # tensors of KV caches
        problems.raise_unless_fit(
            with_repository(checkpoint.path),
            unindexed=checkpoint.unindexed,
            in_files=checkpoint.position,
            model_is_built=model is not None,
        )
        if layout == PER_EXPERT:
            split = _split_plan(plan, carried, model, rules, None if source_layout == PER_EXPERT else source_layout)
            return with_dtype(split, dtype, model, rules), carried
        return (without_casts(plan) if dtype is None else plan), carried

    planned = plan_for(table, dtype) if stays or renames else None
    if not stays and planned is not None and not keeps_parts(checkpoint, planned[0]):
        planned = None
    quantized = quantization_of(checkpoint) if planned is None else None
    if codes is not None and planned is None and quantized is None and rules != []:
        raise codes_without_config(codes, checkpoint)
    if quantized is None:
        plan, carried = planned or plan_for(table, dtype)
        table = replace(table, names=plan.sources.names)  # without the prefixes of torch's wrappers
    else:
        decoded = decoded_table(checkpoint, needs_values=True)
        refuse_halves(checkpoint.names, decoded.decodes, dropped)
        decoded = replace(decoded, hidden=decoded.hidden | table.hidden)
        value_plan, carried = plan_for(decoded, dtype)
        carried |= {part for row in carried & decoded.decodes.keys() for part in decoded.decodes[row].parts}
        stored = replace(table, hidden=table.hidden | carried)
        plan = kept_plan(
            quantized, stored, decoded, value_plan, lambda scales: plan_for(scales, None, produce_all=True)[0]
        )
    if layout == PER_EXPERT:
        _refuse_grouped(plan, model)
    _refuse_fallbacks(plan)
    if keeps_names:
        layout = stated_layout(checkpoint, None)
    elif layout is None and model is None and source_layout is not None:
        layout = PER_EXPERT if source_layout == PER_EXPERT else "transformers"  # the layout that the rules produce
    naming = naming_of_conversion(checkpoint, plan, model, layout)
    extra_targets = carried_targets(table, carried, None if dtype is None else dtype_code(dtype), plan.targets)
    plan = CopyPlan(table, (*plan.targets, *extra_targets), plan.rules)
    shards = tuple(divide(specs_of(plan.targets), most_bytes, naming))
    return Conversion(checkpoint, plan, shards, naming, tuple(checkpoint.names[row] for row in sorted(carried)))


def _split_plan(
    plan: CopyPlan,
    carried: frozenset[int],
    model: nn.Module | None,
    rules: list[Any] | None,
    grouped_layout: str | None,
) -> CopyPlan:
    """Return the plan from the sources to the published form, with one tensor for each expert.

    Args:
        plan: plan from the sources to the model.
        carried: rows of carried tensors, which it leaves out.
        model: the model, or None.
        rules: the rules; None: the model's own.
        grouped_layout: layout of grouped experts in the sources; None if they are not grouped, or as the model has
            them.
    """
    published = _published_rows(plan, grouped_layout)
    saved = replace(plan.sources, hidden=plan.sources.hidden | carried | published)
    split = saving_plan(saved, model=model, rules=rules, layout=grouped_layout, checked=True)
    targets = (*split.targets, *carried_targets(plan.sources, published, None, split.targets))
    return in_saving_order(CopyPlan(plan.sources, targets, split.rules), model)


def _published_rows(plan: CopyPlan, grouped_layout: str | None) -> frozenset[int]:
    """Return the rows of sources under names that the rules have changed, which are those of the published form.

    Reversed rules are for the names of the model. They could match these names too, and change them again.

    Args:
        plan: plan from the sources to the model.
        grouped_layout: layout of grouped experts in the sources. Their names are neither the model's nor published.
    """
    produced = {target.name for target in plan.targets}
    names = plan.sources.names
    return frozenset(
        row
        for target in plan.targets
        for row in target.sources
        if names[row] not in produced and not (grouped_layout is not None and holds_grouped_experts(names[row]))
    )


def _refuse_fallbacks(plan: CopyPlan) -> None:
    """Raise UnsupportedError if a plan for files has targets that only transformers' own code can fill."""
    if plan.fallbacks:
        raise UnsupportedError(
            message(
                f"only transformers' own code can convert {len(plan.fallbacks)} tensors, and it needs them in memory",
                found="\n" + listing(plan.fallbacks),
                do="load the model and save it",
            )
        )


def _refuse_grouped(plan: CopyPlan, model: nn.Module | None) -> None:
    """Raise UnsupportedError if no rule splits grouped experts and no model shows that they are published grouped."""
    grouped = (
        [] if model is not None else [target.name for target in plan.targets if holds_grouped_experts(target.name)]
    )
    if grouped:
        do = ["leave {rules} out to use the rules of the model", "leave {layout} out to keep the experts grouped"]
        raise unsplit_experts_error(grouped, do)
