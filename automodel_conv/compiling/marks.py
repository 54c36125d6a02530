"""Read and write the layout of experts that the files of a checkpoint name.

The metadata of every file and of the index names the layout. File names begin with it where transformers cannot load
the layout: transformers looks for ``model*.safetensors`` and refuses a directory without such files. It loads grouped
codes in no layout: on a machine without a GPU it takes them for numbers, without their scales. Source: transformers
5.12.1, 5.17.0 and 5.23.0, ``_get_resolved_checkpoint_files`` in modeling_utils.py; the ``format`` entry of the metadata
does not keep them from loading.
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
    any_experts,
    holds_experts,
    own_layout,
    same_names,
)
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.upstream.from_config import meta_model
from automodel_conv.upstream.models import expert_layouts

_FILE = re.compile(r"(\w+?)(-\d{5}-of-\d{5})?\.safetensors")


def stated_layout(checkpoint: Checkpoint, source_layout: str | None) -> str | None:
    """The layout of a checkpoint's experts: the caller's word, or else what the files say; None if nobody does.

    Raises:
        UnsupportedError: the caller and the files say different things, or the files name a layout that is not known.
        CheckpointError: one file says another thing than another one.
    """
    said = tuple(dict.fromkeys([*checkpoint.layouts, *_said_by_names(checkpoint)]))
    if len(said) > 1:
        raise CheckpointError(
            message(
                "the files of the checkpoint say different things of the layout of their experts",
                where=checkpoint.path,
                found=", ".join(said),
                do="do not put files of two conversions into one directory",
            )
        )
    if said and said[0] not in (*LAYOUTS, PER_EXPERT):
        newer = "use a newer version of this package, if one has written the files"
        mend = f"correct {LAYOUT_KEY} in the metadata of files and index, or take it out there"
        raise UnsupportedError(
            message(
                "the checkpoint says a layout of its experts that is not known here",
                where=checkpoint.path,
                expected=f"{LAYOUT_KEY}: one of {sorted([*LAYOUTS, PER_EXPERT])}",
                found=f"{LAYOUT_KEY}: {said[0]!r}",
                do=[newer, mend] if said[0].strip() else mend,
            )
        )
    if source_layout is not None and said and said[0] != source_layout:
        raise UnsupportedError(
            message(
                f"the call says that experts lie as {source_layout!r}, and the checkpoint says otherwise",
                where=checkpoint.path,
                found=f"{LAYOUT_KEY}: {said[0]}",
                do="leave {source_layout} out",
            )
        )
    return said[0] if said else source_layout


def layout_to_read(checkpoint: Checkpoint, source_layout: str | None, *, keeps_names: bool) -> str | None:
    """What ``loading_plan`` is told of the layout of a checkpoint's experts; see ``stated_layout``.

    Args:
        keeps_names: neither rules, nor a model, nor another layout: experts stay as they are, whatever the files say.
    """
    said = stated_layout(checkpoint, source_layout)
    return source_layout if keeps_names or said == PER_EXPERT else said


def naming_like(checkpoint: Checkpoint) -> Naming:
    """The form of a checkpoint whose tensors are written anew, with their names and those of their files."""
    stems = _said_by_names(checkpoint)
    return Naming(stems[0] if stems else "model", stated_layout(checkpoint, None))


def naming_of_conversion(checkpoint: Checkpoint, plan: CopyPlan, model: nn.Module | None, layout: str | None) -> Naming:
    """The form of what a plan makes of a checkpoint.

    Args:
        layout: of the experts that are made; None: as the model has them, or nobody knows.
    """
    if layout == PER_EXPERT:
        return Naming(layout=PER_EXPERT)
    if not any(any_experts(target.name) for target in plan.targets):
        return DEFAULT_NAMING
    if model is None and layout in same_names(TRANSFORMERS):  # which of these is foreign depends on the type
        model = _model_of(checkpoint)
    own = None if model is None else own_layout(expert_layouts(model).values())
    return _naming_of(layout or own, own, _holds_codes(plan))


def naming_of_save(
    plan: CopyPlan, model: nn.Module | None, layout: str | None, reference: Checkpoint | None, kept: str | None = None
) -> Naming:
    """The form of a save: that of a reference, or of what transformers would write, which says no layout.

    Args:
        layout: of the experts in a state dict; those that no rule takes apart are saved as transformers has them.
        kept: the layout of experts that are saved as they are, if it is known.
    """
    if reference is not None:
        return naming_like(reference)
    of_transformers = model is not None and any(expert_layouts(model).values())
    if of_transformers or not any(any_experts(target.name) for target in plan.targets):
        return DEFAULT_NAMING
    return _naming_of(kept if layout is None else "transformers", None, _holds_codes(plan))


def _holds_codes(plan: CopyPlan) -> bool:
    """Whether grouped experts are codes of quantized ones."""
    return any(any_experts(target.name) and target.dtype not in FLOATING for target in plan.targets)


def _naming_of(layout: str | None, own: str | None, are_codes: bool) -> Naming:
    """What files are called, and what they say.

    Args:
        layout: of the grouped experts in them; None: nobody knows.
        own: the layout that transformers loads for this type of model; None: not known, taken for "transformers".
        are_codes: the experts are codes.
    """
    if layout is not None and layout in LAYOUTS and (are_codes or layout != (own or "transformers")):
        return Naming(layout, layout)
    return Naming(layout=layout)


def _model_of(checkpoint: Checkpoint) -> nn.Module | None:
    """The model that transformers would make of the directory; None if it cannot, and so loads nothing from it."""
    try:
        return meta_model(checkpoint, None)
    except UnsupportedError:
        return None


def _said_by_names(checkpoint: Checkpoint) -> list[str]:
    """Layouts that names of files begin with, where there are experts that can be in them."""
    names = (_FILE.fullmatch(os.path.basename(file)) for file in checkpoint.files)
    stems = dict.fromkeys(match[1] for match in names if match is not None and match[1] in LAYOUTS)
    return [stem for stem in stems if any(holds_experts(name, LAYOUTS[stem]) for name in checkpoint.names)]
