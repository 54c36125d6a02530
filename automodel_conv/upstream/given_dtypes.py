"""Read the dtype that a caller gives: a torch dtype, the name of one, or "auto"."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from automodel_conv.dtypes import FLOATING, dtype_code, torch_dtype
from automodel_conv.errors import UnsupportedError, kind_of, message
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.config import CONFIG_NAME, stated_dtype
from automodel_conv.upstream.registry import is_pretrained_model

AUTO = "auto"
"""The dtype that a checkpoint or a model states, as in ``from_pretrained(dtype="auto")``."""

_NAMES = ("bfloat16", "float16", "float32", "float64")


def given_dtype(dtype: object) -> torch.dtype | str | None:
    """Return the dtype that a caller gives: None and "auto" as they are, anything else as a floating torch dtype.

    Args:
        dtype: None, "auto", a dtype, or the name of one in torch, with or without ``torch.`` in front of it.

    Raises:
        UnsupportedError: it is something else; suggests a similar name.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == AUTO):
        return dtype
    floating = _floating(dtype)
    if floating is not None:
        return floating
    similar = similar_name(dtype)
    raise UnsupportedError(
        message(
            "not a floating dtype",
            expected=f'a torch dtype such as torch.bfloat16, one of {list(_NAMES)}, or "{AUTO}"',
            found=repr(dtype),
            do=f'write "{similar}"' if similar else None,
        )
    )


def _floating(dtype: object) -> torch.dtype | None:
    """Return a floating dtype that is given itself or by its name; None for anything else."""
    named = dtype_named(dtype) if isinstance(dtype, str) else dtype
    return named if isinstance(named, torch.dtype) and dtype_code(named) in FLOATING else None


def dtype_named(name: str) -> torch.dtype | None:
    """Return the dtype that torch has under a name, such as "bfloat16", "torch.float32" or "half"; None if none."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def similar_name(dtype: object) -> str | None:
    """Return the name of a floating dtype that the caller may mean by "bf16", "BF16", "float61" and such."""
    text = str(dtype).lower().removeprefix("torch.")
    by_code = torch_dtype(text.upper().replace("FP", "F"))
    if by_code is not None:
        text = str(by_code).removeprefix("torch.")
    if by_code is None and dtype_named(text) is not None:
        return None  # a dtype of torch, but none for values
    return next(iter(difflib.get_close_matches(text, [*_NAMES, AUTO], 1)), None)


def dtype_for(dtype: object, checkpoint: Checkpoint) -> torch.dtype | None:
    """Return the dtype that a caller gives for a checkpoint; for "auto", that of ``auto_dtype``.

    Raises:
        UnsupportedError: see ``given_dtype`` and ``auto_dtype``.
    """
    given = given_dtype(dtype)
    return auto_dtype(checkpoint) if isinstance(given, str) else given


def auto_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """Return the dtype of ``config.json``, else that of the index, else that of the first floating tensor.

    The first tensor is that of the first file, by name. None: there is no floating tensor.

    Source: transformers 5.24.0, ``_get_dtype`` and ``get_state_dict_dtype`` in ``modeling_utils.py``.

    Raises:
        UnsupportedError: the config or the index states a dtype that is not a floating dtype of torch.
    """
    stated, where = stated_dtype(checkpoint.directory), os.path.join(checkpoint.directory, CONFIG_NAME)
    if stated is None:
        stated, where = (checkpoint.index_metadata or {}).get("dtype"), f"the index of {checkpoint.path}"
    if stated is not None:
        return _stated(stated, where)
    floating = [row for row, code in enumerate(checkpoint.dtypes) if code in FLOATING]
    if not floating:
        return None
    first = min(floating, key=lambda row: (checkpoint.file_ids[row], checkpoint.names[row]))
    return torch_dtype(checkpoint.dtypes[first])


def dtype_to_save(dtype: object, model: nn.Module | None, tensors: Iterable[Tensor]) -> torch.dtype | None:
    """Return the dtype that a caller gives for a save; for "auto", that of the model's config or first tensor.

    Args:
        dtype: see ``given_dtype``.
        model: the model to save; only the config of a transformers model counts.
        tensors: the tensors to save. The first floating one decides if there is no config; None: there is none.

    Raises:
        UnsupportedError: see ``given_dtype``; or the config of the model states a dtype that is not a floating one.
    """
    given = given_dtype(dtype)
    if not isinstance(given, str):
        return given
    stated = getattr(getattr(model, "config", None), "dtype", None) if is_pretrained_model(model) else None
    if stated is not None:
        return _stated(stated, f"the config of {kind_of(model)}")
    return next((tensor.dtype for tensor in tensors if dtype_code(tensor.dtype) in FLOATING), None)


def _stated(dtype: object, where: str) -> torch.dtype:
    """Return the dtype that is stated in a place, for "auto".

    Raises:
        UnsupportedError: it is not a floating dtype of torch.
    """
    floating = _floating(dtype)
    if floating is None:
        raise UnsupportedError(
            message(
                'dtype="auto" takes the dtype that is stated, which is not a floating dtype',
                where=where,
                found=repr(dtype),
                do="pass another {dtype=}",
            )
        )
    return floating
