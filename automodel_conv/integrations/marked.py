"""Refuse files whose mark states a layout of experts that transformers does not load.

``marks`` gives such files names that transformers does not find. A user can still rename them. transformers then
reports the experts as missing and initializes them, or loads transposed weights if these are square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files.shards import LAYOUT_KEY
from automodel_conv.integrations.hooked_files import Slice
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT, holds_experts, own_layout
from automodel_conv.upstream.models import expert_layouts


def refuse_other_layouts(model: Any, state_dict: Mapping[str, Any]) -> None:
    """Raise UnsupportedError if a tensor of experts is in a file that states another layout than the model's.

    Args:
        model: model that is loaded.
        state_dict: tensors that transformers is about to load, or lazy slices of them.
    """
    slices = {name: tensor for name, tensor in state_dict.items() if isinstance(tensor, Slice) and tensor.layout}
    if not slices:
        return
    own = own_layout(expert_layouts(model).values()) or "transformers"
    for name, tensor in slices.items():
        layout = tensor.layout
        if layout is not None and layout in LAYOUTS and layout != own and holds_experts(name, LAYOUTS[layout]):
            raise UnsupportedError(
                message(
                    f"from_pretrained cannot load experts in the layout {layout!r}",
                    where=f"{tensor.path}, tensor {name!r}",
                    expected=f"the layout {own!r} or one tensor per expert",
                    found=f"{LAYOUT_KEY}: {layout} in the metadata of the file",
                    do=[
                        f'convert the checkpoint back with convert_checkpoint(..., layout="{PER_EXPERT}")',
                        "use load_model(), which needs no hook",
                    ],
                )
            )
