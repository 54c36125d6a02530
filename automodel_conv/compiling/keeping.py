"""Plan loads and conversions that keep codes, so that their scales move with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from automodel_conv.compiling.decoded import codes_without_config, decoded_table, quantization_of
from automodel_conv.compiling.stages import without_casts
from automodel_conv.errors import QuantizationError, UnsupportedError
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.config import Quantization
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.kept_codes import codes_without_scales, keep_codes
from automodel_conv.planning.layouts import PER_EXPERT
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems
from automodel_conv.planning.quantization import quantized_table
from automodel_conv.planning.schemes import read_config
from automodel_conv.upstream.rules import RuleSet


def only_renames(rules: Sequence[Any] | None, layout: str | None, source_layout: str | None) -> bool:
    """Return whether each target has one source, so that codes in any format can keep their scales.

    Args:
        rules: rules of a load or conversion without a model.
        layout: its layout.
        source_layout: layout of the sources.
    """
    return layout is None and source_layout in (None, PER_EXPERT) and not RuleSet(rules).converters


def keeps_parts(checkpoint: Checkpoint, plan: CopyPlan) -> bool:
    """Return whether codes have all their parts, such as zero points, under the names that a plan gives them."""
    if codes_without_scales(plan) is not None:
        return False
    config = quantization_of(checkpoint)
    try:
        if config is not None:
            quantized_table(table_of(plan.targets), config.settings, where=config.path)
    except QuantizationError:
        return False
    except UnsupportedError:  # codes of unknown parts
        return True
    return True


def keeping_plan(
    checkpoint: Checkpoint,
    codes: str,
    dtype: torch.dtype | None,
    plan_of: Callable[..., tuple[CopyPlan, Problems]],
    *,
    renames: bool,
) -> tuple[CopyPlan, Problems]:
    """Return the plan of a load without a model that keeps codes, and the problems of its fit.

    Args:
        checkpoint: the checkpoint.
        codes: name of the first tensor that looks like codes.
        dtype: dtype of floating tensors; None: as stored.
        plan_of: ``loading_plan`` for these rules and layouts. It takes a table, ``dtype`` and ``produce_all``.
        renames: see ``only_renames``. Scales that follow their codes by name need no config that describes them.

    Raises:
        QuantizationError: see ``decoded_table``.
        UnsupportedError: see ``keep_codes``.
    """
    stored = SourceTable.from_checkpoint(checkpoint)
    if renames:
        plan, problems = plan_of(stored, dtype=dtype)
        if codes_without_scales(plan) is None:
            return plan, problems
    config = quantization_of(checkpoint)
    if config is None:
        raise codes_without_config(codes, checkpoint)
    decoded = decoded_table(checkpoint, needs_values=True)
    values, problems = plan_of(decoded, dtype=dtype)
    coded = [target for target in values.targets if not decoded.decodes.keys().isdisjoint(target.sources)]
    if all(target.rule == -1 and target.name == decoded.names[target.sources[0]] for target in coded):
        return plan_of(stored, dtype=dtype)  # all codes stay as stored, in any format

    def plan_of_scales(scales: SourceTable) -> CopyPlan:
        return without_casts(plan_of(scales, dtype=None, produce_all=True)[0])

    return kept_plan(config, stored, decoded, values, plan_of_scales), problems


def kept_plan(
    config: Quantization,
    stored: SourceTable,
    decoded: SourceTable,
    values: CopyPlan,
    plan_of: Callable[[SourceTable], CopyPlan],
) -> CopyPlan:
    """Return the plan that produces codes and scales where ``values`` produces decoded values.

    Args:
        config: how the checkpoint is quantized.
        stored: its tensors as stored.
        decoded: see ``decoded_table``.
        values: a plan whose sources are ``decoded``.
        plan_of: see ``keep_codes``.

    Raises:
        UnsupportedError: see ``keep_codes``.
    """
    method, _ = read_config(config.settings, config.path)
    return keep_codes(
        stored,
        decoded,
        values,
        plan_of,
        lambda converted: quantized_table(converted, config.settings, where=config.path),
        method.whole_name,
    )
