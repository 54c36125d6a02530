"""Read and choose the marks in files that state the layout of experts.

The metadata of every file and of the index states the layout. If transformers cannot load the layout, file names begin
with it: transformers looks for ``model*.safetensors`` and refuses a directory without such files. It cannot load
grouped codes in any layout: on a machine without a GPU it reads them as values, without their scales. The ``format``
entry of the metadata does not prevent that.
Source: transformers 5.12.1, 5.17.0, 5.23.0 and 5.24.0, ``_get_resolved_checkpoint_files`` in modeling_utils.py.
"""

from __future__ import annotations

import os
import re

from torch import nn

from automodel_conv.dtypes import FLOATING
from automodel_conv.errors import CheckpointError, UnsupportedError, message
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.shards import DEFAULT_NAMING, LAYOUT_KEY, Naming
from automodel_conv.planning.layouts import (
    LAYOUTS,
    PER_EXPERT,
    TRANSFORMERS,
    holds_experts,
    holds_grouped_experts,
    own_layout,
    same_names,
)
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.upstream.from_config import meta_model
from automodel_conv.upstream.models import expert_layouts

_FILE = re.compile(r"(\w+?)(-\d{5}-of-\d{5})?\.safetensors")


def stated_layout(checkpoint: Checkpoint, source_layout: str | None) -> str | None:
    """Return the layout of a checkpoint's experts that the caller or the files state; None if neither does.

    Args:
        source_layout: the layout that the caller states, or None.

    Raises:
        UnsupportedError: the caller and the files state different layouts, or the files state an unknown layout.
        CheckpointError: two files state different layouts.
    """
    stated = tuple(dict.fromkeys([*checkpoint.layouts, *_layouts_in_names(checkpoint)]))
    if len(stated) > 1:
        raise CheckpointError(
            message(
                "the files of the checkpoint state different layouts of experts",
                where=checkpoint.path,
                found=", ".join(stated),
                do="do not put files of two conversions into one directory",
            )
        )
    if stated and stated[0] not in (*LAYOUTS, PER_EXPERT):
        newer = "use a newer version of this package if it wrote the files"
        mend = f"correct {LAYOUT_KEY} in the metadata of files and index, or remove it"
        raise UnsupportedError(
            message(
                "the checkpoint states an unknown layout of experts",
                where=checkpoint.path,
                expected=f"{LAYOUT_KEY}: one of {sorted([*LAYOUTS, PER_EXPERT])}",
                found=f"{LAYOUT_KEY}: {stated[0]!r}",
                do=[newer, mend] if stated[0].strip() else mend,
            )
        )
    if source_layout is not None and stated and stated[0] != source_layout:
        raise UnsupportedError(
            message(
                f"the given layout of experts, {source_layout!r}, contradicts the checkpoint",
                where=checkpoint.path,
                found=f"{LAYOUT_KEY}: {stated[0]}",
                do="leave {source_layout} out",
            )
        )
    return stated[0] if stated else source_layout


def layout_to_read(checkpoint: Checkpoint, source_layout: str | None, *, keeps_names: bool) -> str | None:
    """Return the ``source_layout`` to pass to ``loading_plan``; see ``stated_layout``.

    Args:
        source_layout: the layout that the caller states, or None.
        keeps_names: whether there are no rules, model or layout, so that experts stay as stored.
    """
    stated = stated_layout(checkpoint, source_layout)
    return source_layout if keeps_names or stated == PER_EXPERT else stated


def naming_like(checkpoint: Checkpoint) -> Naming:
    """Return the naming that writes a checkpoint again under the same names of files."""
    stems = _layouts_in_names(checkpoint)
    return Naming(stems[0] if stems else "model", stated_layout(checkpoint, None))


def naming_of_conversion(checkpoint: Checkpoint, plan: CopyPlan, model: nn.Module | None, layout: str | None) -> Naming:
    """Return the naming of the files that a conversion writes.

    Args:
        checkpoint: the checkpoint that is converted.
        plan: the plan of the conversion.
        model: the model, or None.
        layout: layout of the experts that are written; None: the model's, or unknown.
    """
    if layout == PER_EXPERT:
        return Naming(layout=PER_EXPERT)
    if not any(holds_grouped_experts(target.name) for target in plan.targets):
        return DEFAULT_NAMING
    if model is None and layout in same_names(TRANSFORMERS):  # the model type decides which of them transformers loads
        model = _model_of(checkpoint)
    own = None if model is None else own_layout(expert_layouts(model).values())
    return _naming_of(layout or own, own, _holds_codes(plan))


def naming_of_save(
    plan: CopyPlan, model: nn.Module | None, layout: str | None, reference: Checkpoint | None, kept: str | None = None
) -> Naming:
    """Return the naming of the files of a save: the reference's, or transformers', which states no layout.

    Args:
        plan: the plan of the save.
        model: the model, or None.
        layout: layout of the experts in the state dict. Experts that no rule splits are saved as transformers has them.
        reference: a checkpoint to imitate, or None.
        kept: layout of the experts that are saved unchanged, if it is known.
    """
    if reference is not None:
        return naming_like(reference)
    of_transformers = model is not None and any(expert_layouts(model).values())
    if of_transformers or not any(holds_grouped_experts(target.name) for target in plan.targets):
        return DEFAULT_NAMING
    return _naming_of(kept if layout is None else "transformers", None, _holds_codes(plan))


def _holds_codes(plan: CopyPlan) -> bool:
    """Return whether a target holds the codes of grouped experts."""
    return any(holds_grouped_experts(target.name) and target.dtype not in FLOATING for target in plan.targets)


def _naming_of(layout: str | None, own: str | None, are_codes: bool) -> Naming:
    """Return the naming of files with grouped experts.

    Args:
        layout: layout of the experts; None: unknown.
        own: layout that transformers loads for this type of model; None: unknown, assumed to be "transformers".
        are_codes: whether the experts are codes.
    """
    if layout is not None and layout in LAYOUTS and (are_codes or layout != (own or "transformers")):
        return Naming(layout, layout)
    return Naming(layout=layout)


def _model_of(checkpoint: Checkpoint) -> nn.Module | None:
    """Return the model that transformers would build for the checkpoint, or None if it cannot."""
    try:
        return meta_model(checkpoint, None)
    except UnsupportedError:
        return None


def _layouts_in_names(checkpoint: Checkpoint) -> list[str]:
    """Return the layouts that file names begin with, if the checkpoint has experts that can be in them."""
    matches = (_FILE.fullmatch(os.path.basename(file)) for file in checkpoint.files)
    stems = dict.fromkeys(match[1] for match in matches if match is not None and match[1] in LAYOUTS)
    return [stem for stem in stems if any(holds_experts(name, LAYOUTS[stem]) for name in checkpoint.names)]
