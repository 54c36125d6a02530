"""The public function that checks a conversion."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from typing_extensions import Unpack

from automodel_conv.compiling.carrying import dropped_rows
from automodel_conv.compiling.marks import stated_layout
from automodel_conv.doors import door, keyword_options
from automodel_conv.dtypes import FLOATING
from automodel_conv.errors import (
    VerificationError,
    listing,
    message,
    size_text,
)
from automodel_conv.execution.comparing import compare_file
from automodel_conv.execution.file_slabs import FileSlabs
from automodel_conv.execution.writing import (
    split_scratch,
)
from automodel_conv.files.checkpoint import Checkpoint, open_source, rows_by_file
from automodel_conv.files.shards import Shard, Spec
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.planning.code_names import names_of_codes
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import holds_grouped_experts, layout_from_name
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.progress import bytes_progress
from automodel_conv.publishing.conversion import DEFAULT_SCRATCH_BYTES, compile_conversion
from automodel_conv.types import LayoutInFiles
from automodel_conv.upstream.given_rules import given_rules

_LOG = logging.getLogger(__name__)

_Form = tuple[str, tuple[int, ...]]
"""Dtype and shape of a tensor."""


class Verified(NamedTuple):
    """The outcome of a comparison without a difference."""

    nbytes: int
    """Size in bytes of all tensors compared."""
    is_copy: bool
    """Whether each tensor is one of the source, unchanged; see ``Conversion.is_copy``."""


@door("verifying")
@keyword_options(SourceOptions, SourceSettings)
def verify_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: LayoutInFiles | None = None,
    source_layout: LayoutInFiles | None = None,
    dtype: torch.dtype | str | None = None,
    dequantize: bool = False,
    drop: str | Iterable[str] = (),
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
    **options: Unpack[SourceOptions],
) -> int:
    """Check that a checkpoint is, bit for bit, the result of ``convert_checkpoint`` for another checkpoint.

    Without ``layout``, the layout that the files of the destination state is used. Without ``rules`` and without any
    layout, two checkpoints that have the same names, except those to drop, are compared as they are.

    Args:
        source: path, URL or repository of the checkpoint that was converted; see ``open_checkpoint``.
        destination: the checkpoint to check, also as ``open_checkpoint`` takes it. Its tensors may be divided among
            files in any way.
        rules: rule objects of transformers. None: the rules of the model that ``config.json`` describes. ``[]``: keep
            all names.
        layout: layout of the routed experts in the destination: "transformers", "nemo", "gpt_oss", "vllm", or
            "per_expert". None: the one that the files state.
        source_layout: layout of grouped experts in the source: a layout, or "per_expert". None: the layout that the
            files state, or else the model's; see ``convert_checkpoint``.
        dtype: dtype of all floating-point tensors in the destination, or "auto"; see ``convert_checkpoint``. None: the
            dtypes of the source.
        dequantize: whether the conversion decoded quantized tensors, to ``dtype`` or the config's.
        drop: tensors that the conversion left out, by their names in the source: a pattern or several, with ``*``,
            ``?`` and ``[abc]``, as for ``convert_checkpoint``.
        threads: number of threads that read and compare. None: the number of cores, at most 16.
        scratch_bytes: bound of the memory used, in bytes. None: 256 MiB.
        progress: show a progress bar in bytes, GB/s and time left.
        **options: see ``SourceOptions``; ``revision``, ``subfolder`` and ``variant`` are those of ``source``.

    Returns:
        The number of bytes compared, which is the size of all tensors in the destination.

    Raises:
        VerificationError: the checkpoints differ; names the tensors, or the first element that differs.
        CheckpointError: a checkpoint is missing or broken.
        NameProblems: the source does not fit its model or the rules; lists all problems.
        UnsupportedError: the source cannot be converted, or a layout is unknown.
        ReadError: reading failed.

    Example:
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as source, TemporaryDirectory() as destination:
        ...     save_file({"a": torch.ones(2, 3)}, f"{source}/model.safetensors")
        ...     save_file({"a": torch.ones(2, 3)}, f"{destination}/other.safetensors")
        ...     verify_checkpoint(source, destination)
        24
    """
    verified = compare_checkpoints(
        source,
        destination,
        rules=rules,
        layout=layout,
        source_layout=source_layout,
        dtype=dtype,
        dequantize=dequantize,
        drop=drop,
        threads=threads,
        scratch_bytes=scratch_bytes,
        progress=progress,
        **options,
    )
    return verified.nbytes


@door("verifying")
@keyword_options(SourceOptions, SourceSettings)
def compare_checkpoints(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    dequantize: bool = False,
    drop: str | Iterable[str] = (),
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
    **options: Unpack[SourceOptions],
) -> Verified:
    """Compare as ``verify_checkpoint`` does, and also return whether the checkpoint is a copy of the source."""
    drop = [drop] if isinstance(drop, str) else list(drop)
    settings = SourceSettings(**options)
    checkpoint = open_source(source, settings.shared(source))
    other = open_source(destination, settings.further(destination))
    rules = given_rules(rules)
    if layout is None and rules != []:
        stated = stated_layout(other, None)
        keeps_all = rules is None and source_layout is None and dtype is None
        as_they_are = keeps_all and _have_same_form(checkpoint, other, stated, drop)
        layout, rules = (None, []) if as_they_are else (stated, rules)
    conversion = compile_conversion(
        checkpoint,
        rules=rules,
        layout=layout,
        source_layout=source_layout,
        dtype=dtype,
        dequantize=dequantize,
        drop=drop,
    )
    plan = conversion.plan
    _compare_headers(plan, other)
    scratch = DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    is_remote = checkpoint.is_remote or other.is_remote
    limits = split_scratch(threads, scratch, reads_files=True, is_remote=is_remote)
    target_rows = [other.position[target.name] for target in plan.targets]
    places = [(other.file_ids[row], other.offsets[row]) for row in target_rows]
    file_slabs = FileSlabs(checkpoint, plan.targets, places, plan.sources.decodes, limits)
    with bytes_progress(plan.bytes_written, "verifying", progress) as advance:
        rows = rows_by_file(other)
        for file in file_slabs.by_file:
            with file_slabs.opened(file) as slabs:
                compare_file(slabs, other.sources[file], _file_of(other, file, rows[file]), limits.threads, advance)
    _LOG.info("verified %s: %s as converted from %s", other.path, size_text(plan.bytes_written), checkpoint.path)
    return Verified(plan.bytes_written, conversion.is_copy)


def _have_same_form(source: Checkpoint, other: Checkpoint, stated: str | None, drop: Iterable[str]) -> bool:
    """Whether two checkpoints have the same names, except those to drop, and state the same layout of their experts."""
    dropped = dropped_rows(source.names, drop)
    kept = {name for row, name in enumerate(source.names) if row not in dropped}
    return stated in (None, stated_layout(source, None)) and kept == set(other.names)


def _compare_headers(plan: CopyPlan, other: Checkpoint) -> None:
    wanted = {target.name: (target.dtype, target.shape) for target in plan.targets}
    rows = zip(other.names, other.dtypes, other.shapes, strict=True)
    found = {name: (dtype, tuple(shape)) for name, dtype, shape in rows}
    differing = [name for name in wanted if name in found and found[name] != wanted[name]]
    lines = [f"{name}: {_form(found[name])} instead of {_form(wanted[name])}" for name in differing]
    lines += [f"{name}: missing" for name in wanted if name not in found]
    lines += [f"{name}: not in the source" for name in found if name not in wanted]
    if lines:
        options = "pass the options of the conversion: {rules}, {layout=}, {dtype=}, {dequantize=}, {drop=}"
        raise VerificationError(
            message(
                f"{len(lines)} tensors differ in name, dtype or shape",
                where=other.path,
                found="\n" + listing(lines),
                do=[options, *_hints(wanted, found, stated_layout(other, None))],
            )
        )


def _form(form: _Form) -> str:
    dtype, shape = form
    return f"{dtype} {list(shape)}"


def _hints(wanted: Mapping[str, _Form], found: Mapping[str, _Form], stated: str | None) -> list[str]:
    """Return which options of the conversion the names and dtypes of a checkpoint suggest.

    Args:
        wanted: dtype and shape of each tensor that the conversion would write.
        found: dtype and shape of each tensor of the checkpoint.
        stated: layout that the checkpoint states, if any.
    """
    codes = _codes_in(wanted)
    differing = [name for name in wanted if name in found and found[name] != wanted[name]]
    dtypes = {name: (found[name][0], wanted[name][0]) for name in differing if found[name][0] != wanted[name][0]}
    hints = [f"{has} instead of codes suggests {{dequantize=True}}" for n, (has, _) in dtypes.items() if n in codes]
    if dtypes.keys() & _codes_in(found):
        hints.append("codes instead of values suggest {dequantize=False}")
    hints += [
        f"{has} instead of {wants} suggests {{dtype=}}"
        for has, wants in dtypes.values()
        if has in FLOATING and wants in FLOATING
    ]
    layout = stated or next(filter(None, (layout_from_name(name) for name in found)), None)
    other_names = any(_is_of_experts(name) for name in found.keys() ^ wanted.keys())
    other_shapes = any(holds_grouped_experts(name) and found[name][1] != wanted[name][1] for name in differing)
    if other_names or other_shapes:
        hints.append(f"experts in the layout {layout!r} suggest {{layout=}}" if layout else "experts suggest {layout=}")
    elif not differing and found.keys() < wanted.keys():
        hints.append("missing tensors suggest {drop=}")
    return list(dict.fromkeys(hints))


def _codes_in(forms: Mapping[str, _Form]) -> frozenset[str]:
    table = SourceTable([*forms], [dtype for dtype, _ in forms.values()], [shape for _, shape in forms.values()])
    return frozenset(names_of_codes(table))


def _is_of_experts(name: str) -> bool:
    """Return whether a tensor belongs to routed experts, grouped or not, and is not a scale of codes."""
    return holds_grouped_experts(name) or (".experts." in name and name.endswith("weight"))


def _file_of(checkpoint: Checkpoint, file: int, rows: Sequence[int]) -> Shard:
    specs = [Spec(checkpoint.names[row], checkpoint.dtypes[row], checkpoint.shapes[row]) for row in rows]
    return Shard(checkpoint.files[file], b"", tuple(specs), tuple(checkpoint.offsets[row] for row in rows))
