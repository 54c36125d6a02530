"""What a door opens before it executes: a checkpoint's tensors, decoded if need be, the model, and their plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from automodel_conv.compiling.marks import layout_to_read, stated_layout
from automodel_conv.compiling.pipeline import loading_plan, shapes_to_make, without_tied
from automodel_conv.errors import QuantizationError, UnsupportedError, message
from automodel_conv.execution.cores import rank_on_this_node, ranks_on_this_node
from automodel_conv.execution.reading import read_whole
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.config import MODELOPT_NAME, quantization, quantization_config
from automodel_conv.files.reading_ahead import reading_ahead
from automodel_conv.planning.code_names import has_codes
from automodel_conv.planning.compiler import Problems
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.given import Misfits, fit_sources, fit_targets
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT, get_layout
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import quantized_table, tellers_of_padding
from automodel_conv.planning.schemes import KEEP
from automodel_conv.upstream.from_config import meta_model
from automodel_conv.upstream.models import checked_dtype, tied_names
from automodel_conv.upstream.registry import models_are_imported, without_ignored
from automodel_conv.upstream.stored_dtypes import dequantizer, left_as_stored


def load_plan(
    checkpoint: Checkpoint,
    model: nn.Module | None,
    rules: Iterable[Any] | None,
    layout: str | None,
    source_layout: str | None,
    key_mapping: Mapping[str, str] | None,
    dtype: torch.dtype | None,
    dequantize: bool = True,
    in_place: bool = False,
) -> tuple[CopyPlan, Problems, nn.Module | None]:
    """The plan of a load, what does not fit, and the model, made from ``config.json`` if none is given and no rules."""
    checked_dtype(dtype)
    for name, others in ((layout, ()), (source_layout, (PER_EXPERT,))):
        if name is not None and name not in others:
            get_layout(name, *others)
    rules = None if rules is None else list(rules)
    if model is None and rules is None:
        model, dtype = meta_model(checkpoint, dtype), None
    quantizer = None if dequantize else getattr(model, "hf_quantizer", None)
    if dequantize:
        table = decoded_table(checkpoint, wants_numbers=model is not None)
    else:
        table = SourceTable.of(checkpoint)
    settings = quantization_config(checkpoint.directory) if table.decodes and model is not None else None
    casting = quantizer if settings is None else dequantizer(settings)
    decoded = {table.names[row] for row in table.decodes}
    keeps_names = model is None and not rules and layout is None
    plan, problems = loading_plan(
        table,
        model=model,
        rules=rules,
        layout=layout,
        source_layout=layout_to_read(checkpoint, source_layout, keeps_names=keeps_names),
        key_mapping=key_mapping,
        dtype=dtype,
        in_place=in_place,
        quantizer=quantizer,
        as_stored=left_as_stored(model, casting, key_mapping, decoded) if rules is None else None,
    )
    said = stated_layout(checkpoint, source_layout)
    if keeps_names:
        layout = "transformers" if source_layout in LAYOUTS else said
    return replace(plan, layout=layout, source_layout=said), problems, model


def while_importing(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """The time in which transformers is imported to build a model, spent on reading ahead; none if it is imported."""
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
    """A plan that the caller hands in, on the rows of this checkpoint, and what it leaves out.

    Args:
        state: the model's state dict.

    Raises:
        UnsupportedError: the files say another layout of their experts than those that the plan was made for, or the
            model's experts do not lie as the plan says.
        NameProblems: it does not fit the checkpoint or the model.
    """
    said = stated_layout(checkpoint, None)
    if said not in (None, plan.source_layout):
        raise UnsupportedError(
            message(
                "the files say a layout of their experts that the plan was not made for",
                where=checkpoint.path,
                expected=repr(plan.source_layout) if plan.source_layout else "files that say none",
                found=repr(said),
                do=["make the plan of this checkpoint: {compile_plan(...)}", "leave {plan} out"],
            )
        )
    misfits = Misfits()
    table = decoded_table(checkpoint, wants_numbers=False) if plan.sources.decodes else SourceTable.of(checkpoint)
    fitted = fit_sources(plan, table, misfits, strict)
    problems = Problems(list(plan.missing), list(plan.unexpected), list(plan.mismatched))
    if model is not None:
        missing = fit_targets(plan, shapes_to_make(model, state, plan.layout, in_place=in_place), misfits)
        fitted = replace(fitted, tied=tuple(tied_names(model)))
        missing = without_tied(missing, plan, fitted.tied)
        problems.missing, problems.unexpected = without_ignored(model, missing, problems.unexpected)
    misfits.raise_if_any(checkpoint.path, plan, problems.missing if strict else [])
    problems.raise_unless_fit(checkpoint.path, strict, checkpoint.unindexed)
    return fitted, problems


def decoded_table(checkpoint: Checkpoint, wants_numbers: bool) -> SourceTable:
    """The tensors that a checkpoint offers; quantized ones as the numbers that they stand for.

    Args:
        wants_numbers: whether codes that nothing says how to decode are an error.

    Raises:
        CheckpointError: ``config.json``, or modelopt's own file, is malformed.
        QuantizationError: see ``quantized_table``; or codes and scales without a config, where numbers are wanted.
    """
    table = SourceTable.of(checkpoint)
    told = quantization(checkpoint.directory)
    if told is not None:
        decoded = quantized_table(table, told.settings, where=told.path)
        _check_padding(checkpoint, tellers_of_padding(table, decoded, told.settings), decoded)
        return decoded
    codes = has_codes(table) if wants_numbers else None
    if codes is not None:
        raise untold(codes, checkpoint)
    return table


def untold(codes: str, checkpoint: Checkpoint) -> QuantizationError:
    """The error for codes of which no config says how they decode."""
    return QuantizationError(
        message(
            f"{codes} has the form of quantized codes, and nothing says how they decode",
            where=checkpoint.path,
            expected=f"a quantization_config in the config.json beside the files, or modelopt's {MODELOPT_NAME}",
            do=["put there what the release has of the two", KEEP],
        )
    )


def _check_padding(checkpoint: Checkpoint, tellers: Iterable[tuple[int, str]], table: SourceTable) -> None:
    """Rows of packed codes may end in padding, which is not left out here.

    A plan of what is not on this machine comes from headers alone; who reads the data makes another one.

    Args:
        tellers: rows, and the names of the tensors that tell their shapes.

    Raises:
        QuantizationError: they do.
    """
    if checkpoint.is_remote:
        return
    for row, teller in tellers:
        shape = checkpoint.position.get(teller)
        if shape is None:
            continue
        is_shape = checkpoint.shapes[shape] == (len(table.shapes[row]),)
        said = read_whole(shape, checkpoint).tolist() if is_shape else checkpoint.shapes[shape]
        if said != list(table.shapes[row]):
            name = checkpoint.names[row]
            text = "the rows of packed codes end in padding, which is not left out here"
            raise QuantizationError(message(text, where=name, expected=list(table.shapes[row]), found=said))
