"""Keep traces on disk, under a digest of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Collection
from uuid import uuid4

import msgspec
import torch
from torch import Tensor, nn

from automodel_conv.dtypes import dtype_code, torch_dtype
from automodel_conv.errors import ConversionError, message
from automodel_conv.files import system
from automodel_conv.loading_code.attributes import changes_from, text_of
from automodel_conv.loading_code.calling import Load, Targets
from automodel_conv.loading_code.changes import Changes
from automodel_conv.loading_code.dry_run import Traced
from automodel_conv.loading_code.stand_ins import named_tensors
from automodel_conv.loading_code.state import state_digest
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.loader_writes import key_of
from automodel_conv.planning.origins import Unknown
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.types import LoaderCalls


class _Made(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    is_parameter: bool
    requires_grad: bool


class _Form(msgspec.Struct):
    digest: str
    """The digest in the name of the file."""
    plan: str
    computed: dict[str, tuple[str, list[int]]]
    names: tuple[str, ...]
    targets_read: frozenset[str]
    needed: frozenset[str]
    rewritten: tuple[str, ...]
    made: dict[str, _Made]
    same: tuple[tuple[str, ...], ...]
    unsaved: list[str]
    removed: dict[str, bool]
    attributes: str
    read: str
    """Digest of the values of ``targets_read``."""


def digest_of(load: Load, sources: SourceTable, targets: Targets, calls: LoaderCalls, key: str) -> str:
    """Return a digest of all that a trace depends on: sources, targets, versions, and what the caller says.

    Args:
        load: the loading code. Its name counts; its source code and what it refers to do not.
        sources: the tensors of the checkpoint.
        targets: what it fills.
        calls: what it is called with.
        key: the caller's text for all that no digest can see.
    """
    own = named_tensors(targets)
    storages: dict[int, int] = {}
    tensors: dict[int, int] = {}
    has = [
        (
            name,
            f"{type(tensor).__module__}.{type(tensor).__qualname__}",
            tensors.setdefault(id(tensor), len(tensors)),
            storages.setdefault(key_of(tensor), len(storages)),
            tensor.storage_offset(),
            str(tensor.dtype),
            [*tensor.shape],
            [*tensor.stride()],
            tensor.is_meta,
        )
        for name, tensor in own.items()
    ]
    name = getattr(load, "__module__", ""), getattr(load, "__qualname__", "")
    parts = [
        type(targets).__qualname__,
        [*sources.names],
        [*sources.dtypes],
        [*sources.shapes],
        has,
        name,
        calls,
        key,
        _own_version(),
        torch.__version__,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def kept_trace(directory: str, digest: str, targets: Targets) -> Traced | None:
    """Return a trace that was kept; None if there is none, it is damaged, or it depends on other values of targets."""
    check, _, text = (system.read_text(_path(directory, digest)) or "").partition("\n")
    if check != _checksum(text.encode()):
        return None
    try:
        form = msgspec.json.decode(text, type=_Form)
        plan = CopyPlan.from_json(form.plan)
        computed = {name: Unknown(reason, frozenset(rows)) for name, (reason, rows) in form.computed.items()}
        made = {name: _without_data(one) for name, one in form.made.items()}
        attributes = changes_from(form.attributes)
    except (ValueError, SyntaxError, RecursionError, TypeError, ConversionError):
        return None
    if form.digest != digest or form.read != _digest_of_values(targets, form.targets_read):
        return None
    return Traced(
        plan=plan,
        computed=computed,
        names=form.names,
        changes=Changes(made, form.same, frozenset(form.unsaved), form.removed, attributes),
        targets_read=form.targets_read,
        needed=form.needed,
        rewritten=form.rewritten,
    )


def keep_trace(directory: str, digest: str, targets: Targets, trace: Traced) -> None:
    """Keep a trace, unless it depends on values of the checkpoint, or makes tensors or attributes of other classes.

    Raises:
        ConversionError: the directory cannot be written to.
    """
    has_attributes = any(type(one) not in (Tensor, nn.Parameter) or vars(one) for one in trace.changes.made.values())
    attributes = text_of(trace.changes.attributes)
    if trace.values_read or has_attributes or attributes is None:
        return
    form = _Form(
        digest,
        trace.plan.to_json(),
        {name: (unknown.reason, sorted(unknown.rows)) for name, unknown in trace.computed.items()},
        trace.names,
        trace.targets_read,
        trace.needed,
        trace.rewritten,
        {
            name: _Made(
                dtype_code(tensor.dtype) or "",
                tuple(tensor.shape),
                isinstance(tensor, nn.Parameter),
                tensor.requires_grad,
            )
            for name, tensor in trace.changes.made.items()
        },
        trace.changes.same,
        sorted(trace.changes.unsaved),
        dict(trace.changes.removed),
        attributes,
        _digest_of_values(targets, trace.targets_read),
    )
    text = msgspec.json.encode(form)
    path = _path(directory, digest)
    unfinished = f"{path}.{uuid4().hex}"
    try:
        system.make_directory(directory)
        with system.create(unfinished) as file:
            system.write_end(file.fileno(), f"{_checksum(text)}\n".encode() + text)
            system.sync(file.fileno())
        system.rename(unfinished, path)
    except OSError as error:
        raise ConversionError(
            message(
                "the trace cannot be kept",
                where=directory,
                expected="a directory that can be written to",
                found=error,
                do="choose another {trace_cache}, or leave it out",
            )
        ) from error


def _digest_of_values(targets: Targets, names: Collection[str]) -> str:
    own = named_tensors(targets)
    return state_digest([own[name].detach() for name in sorted(names)])


def _checksum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _own_version() -> str:
    package = sys.modules[__name__.partition(".")[0]]  # metadata of the installed package takes milliseconds to read
    return package.__version__


def _path(directory: str, digest: str) -> str:
    return os.path.join(directory, f"{digest}.json")


def _without_data(made: _Made) -> Tensor:
    tensor = torch.empty(made.shape, dtype=torch_dtype(made.dtype), device="meta")
    return nn.Parameter(tensor, requires_grad=made.requires_grad) if made.is_parameter else tensor
