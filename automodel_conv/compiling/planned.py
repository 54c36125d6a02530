"""Plan the load of a checkpoint from its headers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from typing_extensions import Unpack

from automodel_conv.compiling.decoded import decoded_table
from automodel_conv.compiling.keeping import keeping_plan, only_renames
from automodel_conv.compiling.marks import layout_to_read, stated_layout
from automodel_conv.compiling.options import CompileOptions, CompileSettings, PlanSettings
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.doors import door, keyword_options
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.files.config import quantization_config
from automodel_conv.files.hub import with_repository
from automodel_conv.planning.code_names import has_codes
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.kept_codes import refuse_codes_without_scales
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT, get_layout
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems
from automodel_conv.planning.wanted import AsStored
from automodel_conv.upstream.from_config import meta_model
from automodel_conv.upstream.given_dtypes import dtype_for, given_dtype
from automodel_conv.upstream.given_rules import given_rules
from automodel_conv.upstream.stored_dtypes import dequantizer, left_as_stored
from automodel_conv.upstream.wrappers import plain_model

_LOG = logging.getLogger(__name__)


def check_options(settings: PlanSettings) -> None:
    """Raise UnsupportedError for a layout or a dtype that no checkpoint and no model can have."""
    given_dtype(settings.dtype)
    if not isinstance(settings.rules, Iterator):  # which can be read only once
        given_rules(settings.rules)
    for name, others in ((settings.layout, ()), (settings.source_layout, (PER_EXPERT,))):
        if name is not None and name not in others:
            get_layout(name, *others)


def load_plan(
    checkpoint: Checkpoint,
    model: nn.Module | None,
    settings: PlanSettings,
    in_place: bool = False,
) -> tuple[CopyPlan, Problems, nn.Module | None]:
    """Plan a load.

    Returns:
        The plan, the problems of its fit, and the model: the one that is given, or one built from ``config.json`` if
        there are neither a model nor rules.
    """
    check_options(settings)
    layout, source_layout = settings.layout, settings.source_layout
    rules = given_rules(settings.rules)
    if model is None and rules is None:
        given = given_dtype(settings.dtype)
        model, dtype = meta_model(checkpoint, None if isinstance(given, str) else given), None
    else:
        dtype = dtype_for(settings.dtype, checkpoint)
    if settings.dequantize:
        table = decoded_table(checkpoint, needs_values=model is not None)
    else:
        table = SourceTable.from_checkpoint(checkpoint)
    quantizer = None if settings.dequantize else getattr(model, "hf_quantizer", None)
    keeps_names = model is None and not rules and layout is None
    layout_read = layout_to_read(checkpoint, source_layout, keeps_names=keeps_names)
    plan_of = partial(
        loading_plan,
        model=model,
        rules=rules,
        layout=layout,
        source_layout=layout_read,
        key_mapping=settings.key_mapping,
        in_place=in_place,
        quantizer=quantizer,
        as_stored=_left_as_stored(checkpoint, model, settings, table, quantizer) if rules is None else None,
    )
    # A quantizer has rules for scales of its own.
    codes = None if settings.dequantize or (quantizer is not None and rules is None) else has_codes(table)
    if codes is not None and model is None:
        renames = only_renames(rules, layout, layout_read)
        plan, problems = keeping_plan(checkpoint, codes, dtype, plan_of, renames=renames)
    else:
        plan, problems = plan_of(table, dtype=dtype)
        if codes is not None:
            refuse_codes_without_scales(plan)
            problems.keeps_codes = True
    stated = stated_layout(checkpoint, source_layout)
    if keeps_names:
        layout = "transformers" if source_layout in LAYOUTS else stated
    _LOG.info("planned the load of %s: %d targets of %d sources", checkpoint.path, len(plan.targets), len(table.names))
    if plan.fallbacks:
        first, count = plan.fallbacks[0], len(plan.fallbacks)
        _LOG.info("transformers' own code computes %d targets, the first is %s", count, first)
    return replace(plan, layout=layout, source_layout=stated), problems, model


def _left_as_stored(
    checkpoint: Checkpoint, model: nn.Module | None, settings: PlanSettings, table: SourceTable, quantizer: Any
) -> AsStored | None:
    """Return the function that determines which sources keep their dtype; None if ``from_pretrained`` casts all.

    Args:
        checkpoint: the checkpoint.
        model: the model, or None.
        settings: the options of the load.
        table: the sources; those that are decoded keep no dtype.
        quantizer: quantizer of a model that keeps codes.
    """
    quantization = quantization_config(checkpoint.directory) if table.decodes and model is not None else None
    casting = quantizer if quantization is None else dequantizer(quantization)
    return left_as_stored(model, casting, settings.key_mapping, {table.names[row] for row in table.decodes})


@door("planning")
@keyword_options(CompileOptions, CompileSettings)
def compile_plan(
    checkpoint: Checkpoint | str | os.PathLike[str], model: nn.Module | None = None, **options: Unpack[CompileOptions]
) -> CopyPlan:
    """Plan the load of a checkpoint from its headers, without reading tensor data.

    Two kinds of small tensors are exceptions, because only they state a fact that the plan needs:

    - ``weight_shape`` of packed INT4 codes states whether rows end in padding. It is read if a row has one scale, or
      if its last group is smaller than the others.
    - ``g_idx`` of GPTQ states whether groups are in order.

    A plan of a repository whose files are not in the cache reads neither, and counts padding as columns. A load reads
    both, and refuses such a plan if rows end in padding.

    Args:
        checkpoint: an opened checkpoint, or a path that ``open_checkpoint`` accepts; only for a path do the options of
            ``SourceOptions`` count. No weights are downloaded.
        model: any module, even on the meta device. torch may have wrapped it, whole or in parts (``torch.compile``,
            data parallelism, activation checkpointing); names are those of the model itself, without the additions of
            wrappers. A checkpoint of a wrapped model, with ``_orig_mod`` in its names or ``module`` at the start of all
            of them, is read as a checkpoint of the model itself. None: the model that the checkpoint's ``config.json``
            describes, built on the meta device, unless ``rules`` are given. Its class is the one in ``architectures``
            that belongs to the config's type. Otherwise it is the first that transformers has for the type, in this
            order: image and text to text, any modality, causal language model, sequence to sequence, speech, masked
            language model, bare model, other heads.
        **options: see ``CompileOptions``.

    Returns:
        The proved plan: each element of each target is written exactly once.

    Raises:
        CheckpointError: the checkpoint is missing or broken.
        NameProblems: names or shapes do not fit; lists all of them.
        QuantizationError: parts of quantized tensors are missing, or contradict each other or the config; lists all of
            them.
        UnsupportedError: a layout is unknown, the layout of experts is ambiguous, a quantization is not supported,
            codes would fill a target that expects values, or their scales cannot follow them; or the model has PEFT
            adapters, or flat FSDP1 parameters.

    Example:
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, f"{directory}/model.safetensors")
        ...     plan = compile_plan(directory, nn.Linear(3, 2), dtype=torch.bfloat16)
        >>> [(target.name, target.dtype, target.shape) for target in plan.targets]
        [('weight', 'BF16', (2, 3)), ('bias', 'BF16', (2,))]
        >>> plan.bytes_read, plan.bytes_written
        (32, 16)
    """
    settings = CompileSettings(**options)
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint, **settings.source())
    model = None if model is None else plain_model(model)
    plan, problems, _ = load_plan(checkpoint, model, settings)
    problems.raise_unless_fit(
        with_repository(checkpoint.path),
        unindexed=checkpoint.unindexed,
        in_files=checkpoint.position,
        model_is_built=model is None and settings.rules is None,
    )
    return plan
