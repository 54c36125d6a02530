"""Plan the load of a checkpoint from its headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from automodel_conv.compiling.decoded import decoded_table
from automodel_conv.compiling.marks import layout_to_read, stated_layout
from automodel_conv.compiling.options import PlanOptions
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.doors import door
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.files.config import quantization_config
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT, get_layout
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems
from automodel_conv.upstream.from_config import meta_model
from automodel_conv.upstream.models import checked_dtype
from automodel_conv.upstream.stored_dtypes import dequantizer, left_as_stored
from automodel_conv.upstream.wrappers import plain_model


def load_plan(
    checkpoint: Checkpoint,
    model: nn.Module | None,
    options: PlanOptions,
    in_place: bool = False,
) -> tuple[CopyPlan, Problems, nn.Module | None]:
    """The plan of a load, what does not fit, and the model, made from ``config.json`` if none is given and no rules."""
    layout, source_layout, dtype = options.layout, options.source_layout, options.dtype
    checked_dtype(dtype)
    for name, others in ((layout, ()), (source_layout, (PER_EXPERT,))):
        if name is not None and name not in others:
            get_layout(name, *others)
    rules = None if options.rules is None else list(options.rules)
    if model is None and rules is None:
        model, dtype = meta_model(checkpoint, dtype), None
    quantizer = None if options.dequantize else getattr(model, "hf_quantizer", None)
    if options.dequantize:
        table = decoded_table(checkpoint, needs_values=model is not None)
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
        key_mapping=options.key_mapping,
        dtype=dtype,
        in_place=in_place,
        quantizer=quantizer,
        as_stored=left_as_stored(model, casting, options.key_mapping, decoded) if rules is None else None,
    )
    said = stated_layout(checkpoint, source_layout)
    if keeps_names:
        layout = "transformers" if source_layout in LAYOUTS else said
    return replace(plan, layout=layout, source_layout=said), problems, model


@door("planning")
def compile_plan(
    checkpoint: Checkpoint | str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = True,
) -> CopyPlan:
    """The plan that loads a checkpoint, from its headers alone.

    The few bytes of ``weight_shape`` are read besides, for INT4 codes with one scale for a whole row: nothing else
    tells whether rows end in padding. Of a repository that is not in the cache they are not; loads of it look at them.

    Args:
        checkpoint: an opened checkpoint, or what ``open_checkpoint`` takes; no weights of ``org/name`` are downloaded.
        model: any module, on the meta device too, and as torch wraps it (``torch.compile``, data parallelism,
            activation checkpointing, whole or in parts): names are then those of the model itself, without what
            wrappers add, and a checkpoint of a wrapped model, whose names have ``_orig_mod`` or all begin with
            ``module``, is read as one of the model itself. None builds the model of the checkpoint's ``config.json`` on
            the meta device, unless ``rules`` are given. Its class is the one that ``architectures`` name of the
            config's type, else the first that transformers has for the type: image and text to text, any modality,
            causal language model, sequence to sequence, speech, masked language model, other heads only where there is
            no bare model.
        rules: transformers' rule objects; None takes the model's own. ``[]`` keeps the checkpoint's names.
        layout: how routed experts shall lie: "transformers", "nemo", "gpt_oss", "vllm"; None: as the model has them.
        source_layout: how grouped experts in the checkpoint lie: a layout, or "per_expert", as the type is published.
            None: as the files say, which this package writes, or else as the model has them; where the model's shapes
            contradict that, or leave it open, this is an error.
        key_mapping: ``{pattern: replacement}`` applied to names before the rules, as in ``from_pretrained``.
        dtype: dtype of the floating targets; None keeps each parameter's own (without a model: the source's). A new
            parameter, or one on the meta device, gets what ``from_pretrained`` gives it: its model's dtype, which
            without one in ``config.json`` is that of the first tensor by name; float32 where the model keeps it in
            that; all targets of a rule the first one's; the file's in quantized checkpoints, where transformers casts
            nothing.
        dequantize: what the ``quantization_config`` in the checkpoint's ``config.json`` says is quantized is decoded,
            each element rounded once to its target's dtype; False takes codes and scales for tensors of their own, as
            a model of transformers that keeps them wants (its ``hf_quantizer`` knows the rules).

    Raises:
        CheckpointError: the checkpoint is broken.
        NameProblems: names or shapes do not fit; lists all of them.
        QuantizationError: parts of quantized tensors are missing, or do not fit each other or the config; lists all.
        UnsupportedError: an unknown layout, experts whose layout cannot be told, a quantization that is not decoded, or
            codes where numbers are wanted; or a model with adapters of PEFT, or one that FSDP1 keeps flat.
    """
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    model = None if model is None else plain_model(model)
    options = PlanOptions(rules, layout, source_layout, key_mapping, dtype, dequantize)
    plan, problems, _ = load_plan(checkpoint, model, options)
    problems.raise_unless_fit(checkpoint.path, unindexed=checkpoint.unindexed)
    return plan
