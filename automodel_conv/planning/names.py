"""Strip the additions of torch's wrappers from names; see ``upstream/wrappers.py``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from automodel_conv.errors import NameProblems, UnsupportedError, listing, message
from automodel_conv.planning.copies import SourceTable

T = TypeVar("T")

COMPILED = "_orig_mod"
"""Component that ``torch.compile`` adds to names. Source: torch 2.13.0, ``_dynamo/eval_frame.py``."""


def plain_names(names: Iterable[str], known: Collection[str] | None = None) -> list[str]:
    """Return the names without the components that wrappers add.

    Components ``_orig_mod`` are removed unless a known name has one. A leading ``module`` is removed if all names have
    it and no known name does.

    Args:
        names: names of tensors.
        known: names of the model's tensors; None: unknown.

    Raises:
        NameProblems: two names become one.
        UnsupportedError: a name is one that PEFT uses.
    """
    names = list(names)
    text = "\n".join(names)
    if not (COMPILED in text or "base_layer" in text or text.startswith("module.")):
        return names  # almost always; one search in all names is several times as fast as one in each name
    is_own = any(COMPILED in name.split(".") for name in known or ())
    plain = names if is_own else [_without(name, COMPILED) for name in names]
    if known and plain and all(map(_in_module, plain)) and not any(map(_in_module, known)):
        plain = [name.partition(".")[2] for name in plain]
    what = "several tensors have the same name without the additions of torch.compile and data parallelism"
    only_origins(zip(names, plain, strict=True), what, "leave one of them out")
    adapted = next((name for name in plain if "base_layer" in name.split(".")), None)
    if adapted is not None:
        raise has_adapters(adapted)
    return plain


def only_origins(renamed: Iterable[tuple[str, str]], what: str, do: str) -> dict[str, str]:
    """Return the only old name of each new name.

    Args:
        renamed: pairs of an old and its new name.
        what: text of the error, which also lists the new names with several old ones.
        do: advice of the error.

    Raises:
        NameProblems: a new name has several old ones.
    """
    origins: dict[str, list[str]] = {}
    for old, new in renamed:
        origins.setdefault(new, []).append(old)
    shared = [(new, tuple(old)) for new, old in origins.items() if len(old) > 1]
    if shared:
        found = "\n" + listing(f"{new} <- {', '.join(old)}" for new, old in shared)
        raise NameProblems(message(what, found=found, do=do), duplicated=shared)
    return {new: old for new, (old,) in origins.items()}


def plain_tensors(tensors: Mapping[str, T], known: Collection[str] | None = None) -> dict[str, T]:
    """Return the tensors under their ``plain_names``."""
    return dict(zip(plain_names(tensors, known), tensors.values(), strict=True))


def plain_table(table: SourceTable, known: Collection[str] | None = None) -> SourceTable:
    """Return the table with its ``plain_names``; rows do not change."""
    return replace(table, names=plain_names(table.names, known))


def _without(name: str, component: str) -> str:
    if component not in name:
        return name
    return ".".join(part for part in name.split(".") if part != component)


def _in_module(name: str) -> bool:
    return name.startswith("module.")


def has_adapters(where: str) -> UnsupportedError:
    """Return the error for tensors of a model with adapters."""
    return UnsupportedError(
        message(
            "the model has PEFT adapters",
            where=where,
            do=[
                '{save_checkpoint(..., adapter="merged")} saves the merged model',
                '{save_checkpoint(..., adapter="only")} saves the adapter alone',
                "merge_and_unload() of the PeftModel returns the merged model, which can be saved or filled",
                "load the base model before you add adapters",
            ],
        )
    )
