"""Plan a conversion from files to files, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from automodel_conv.compiling.carrying import carried_targets, dropped_rows, refuse_halves
from automodel_conv.compiling.decoded import codes_without_config, decoded_table
from automodel_conv.compiling.marks import form_of_conversion, layout_to_read, stated_layout
from automodel_conv.compiling.stages import without_casts
from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.doors import door
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import (
    UnsupportedError,
    listing,
    message,
)
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.files.config import quantization
from automodel_conv.files.shards import Form, Shard, divide, parse_size
from automodel_conv.planning.code_names import has_codes
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.kept_codes import keep_codes
from automodel_conv.planning.layouts import PER_EXPERT, any_experts, get_layout
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import quantized_table
from automodel_conv.planning.unmarked import not_taken_apart
from automodel_conv.publishing.saved import specs_of, with_dtype
from automodel_conv.upstream.from_config import meta_model
from automodel_conv.upstream.models import checked_dtype

DEFAULT_SCRATCH_BYTES = 256 << 20
"""Memory that a conversion uses at most, and a comparison of two checkpoints."""


@dataclass(frozen=True)
class Conversion:
    """A conversion from files to files, planned from headers alone."""

    checkpoint: Checkpoint
    plan: CopyPlan
    shards: tuple[Shard, ...]
    form: Form
    carried: tuple[str, ...]
    """Tensors of the source that the model has no place for, passed on as they are."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Tensors of the source that nothing is made of: those to be dropped, and scales of activations if decoded."""
        return self.checkpoint.left_out(self.plan.unused_sources)

    @property
    def bytes_needed(self) -> int:
        """Room on the disk that the weights take."""
        return sum(shard.nbytes for shard in self.shards)


@door("planning")
def compile_conversion(
    source: Checkpoint | str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    drop: str | Iterable[str] = (),
    max_shard_size: int | str = "5GB",
) -> Conversion:
    """The plan of ``convert_checkpoint``, which see; reads no more than ``compile_plan``."""
    checked_dtype(dtype)
    if layout not in (None, PER_EXPERT):
        get_layout(layout, PER_EXPERT)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    most_bytes = parse_size(max_shard_size)
    rules = None if rules is None else list(rules)
    keeps_names = layout is None and source_layout is None and rules == []
    source_layout = layout_to_read(checkpoint, source_layout, keeps_names=keeps_names)
    table = decoded_table(checkpoint, needs_values=True) if dequantize else SourceTable.of(checkpoint)
    dropped = dropped_rows(checkpoint.names, drop)
    table = replace(table, hidden=table.hidden | dropped)
    model = meta_model(checkpoint, dtype) if rules is None else None
    # Codes of experts that lie one by one stay as they are: no model takes them, and nothing is taken apart.
    codes = None if dequantize else has_codes(table)
    stay = layout == PER_EXPERT and codes is not None and not any(map(any_experts, table.names))
    told = quantization(checkpoint.directory) if codes is not None and not stay and not keeps_names else None
    if codes is not None and told is None and not stay and rules != []:
        raise codes_without_config(codes, checkpoint)

    def made_of(
        sources: SourceTable, dtype: torch.dtype | None, *, unbound: bool = False
    ) -> tuple[CopyPlan, frozenset[int]]:
        """The plan, and the rows of what is carried."""
        plan, problems = loading_plan(
            sources,
            model=None if stay else model,
            rules=[] if stay else rules,
            layout=None if layout == PER_EXPERT else layout,
            source_layout=source_layout,
            dtype=None if model is not None else dtype,
            unbound=unbound,
        )
        carried = problems.set_aside()
        if not dequantize:
            carried |= plan.sources.hidden - sources.hidden  # of caches
        problems.raise_unless_fit(checkpoint.path, unindexed=checkpoint.unindexed)
        if layout == PER_EXPERT:
            given = None if source_layout == PER_EXPERT else source_layout
            taken = replace(plan.sources, hidden=plan.sources.hidden | carried)
            back = saving_plan(taken, model=model, rules=rules, layout=given, checked=True)
            return with_dtype(CopyPlan(plan.sources, back.targets, back.rules), dtype, model, rules), carried
        return (without_casts(plan) if dtype is None else plan), carried

    if told is None:
        plan, carried = made_of(table, dtype)
        table = replace(table, names=plan.sources.names)  # without what torch's wrappers add
    else:
        decoded = decoded_table(checkpoint, needs_values=True)
        refuse_halves(checkpoint.names, decoded.decodes, dropped)
        decoded = replace(decoded, hidden=decoded.hidden | table.hidden)
        numbers, carried = made_of(decoded, dtype)
        carried |= {part for row in carried & decoded.decodes.keys() for part in decoded.decodes[row].parts}
        plan = keep_codes(
            replace(table, hidden=table.hidden | carried),
            decoded,
            numbers,
            lambda scales: made_of(scales, None, unbound=True)[0],
            lambda made: quantized_table(made, told.settings, where=told.path),
        )
    if layout == PER_EXPERT:
        _refuse_grouped(plan, model)
    if plan.fallbacks:
        raise UnsupportedError(
            message(
                f"{len(plan.fallbacks)} tensors can only be made by transformers' own code, which needs them in memory",
                found="\n" + listing(plan.fallbacks),
                do="load the model and save it",
            )
        )
    if keeps_names:
        layout = stated_layout(checkpoint, None)
    elif layout is None and model is None and source_layout is not None:
        layout = PER_EXPERT if source_layout == PER_EXPERT else "transformers"  # what rules are given
    form = form_of_conversion(checkpoint, plan, model, layout)
    further = carried_targets(table, carried, None if dtype is None else dtype_code(dtype), plan.targets)
    plan = CopyPlan(table, (*plan.targets, *further), plan.rules)
    shards = tuple(divide(specs_of(plan.targets), most_bytes, form))
    return Conversion(checkpoint, plan, shards, form, tuple(checkpoint.names[row] for row in sorted(carried)))


def _refuse_grouped(plan: CopyPlan, model: nn.Module | None) -> None:
    """Raise UnsupportedError for experts that no rule takes apart, where no model says that they are published so."""
    left = [] if model is not None else [target.name for target in plan.targets if any_experts(target.name)]
    if left:
        do = ["leave {rules} out to take those of the model", "leave {layout} out to keep the experts grouped"]
        raise not_taken_apart(left, do)
