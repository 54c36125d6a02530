"""Public functions that plan and run anybody's loading code."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from automodel_conv.compiling.options import TraceOptions, TraceSettings
from automodel_conv.destinations.devices import loadable
from automodel_conv.doors import door, keyword_options
from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.execution.filling import fill, limits_in_budget
from automodel_conv.execution.reading import read_each
from automodel_conv.execution.report import Clock, LoadedStateDict, LoadReport, report_of
from automodel_conv.execution.timeline import CODE
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint, open_source
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.loading_code.calling import Load, Targets
from automodel_conv.loading_code.computing import computed_values
from automodel_conv.loading_code.dry_run import Traced, traced
from automodel_conv.loading_code.kept_traces import digest_of, keep_trace, kept_trace
from automodel_conv.loading_code.places import install, places_of
from automodel_conv.loading_code.stand_ins import in_class_of, named_tensors
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems
from automodel_conv.types import LoaderCalls

_LOG = logging.getLogger(__name__)


@door("planning")
@keyword_options(SourceOptions, SourceSettings)
def trace_loader(
    load: Callable[[Any], Any],
    checkpoint: Checkpoint | str | os.PathLike[str],
    targets: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    calls: LoaderCalls = "pairs",
    **options: Unpack[SourceOptions],
) -> CopyPlan:
    """Run loading code on tensors without data, and return the plan of the copies that it makes.

    The code sees a tensor on the meta device for each tensor of the checkpoint. Each copy that it makes is recorded
    instead of done, through temporary tensors too. Targets stay as they are. If the code reads values (``item()``), it
    runs again, with these tensors read from the files.

    Args:
        load: the loading code, such as a model's ``load_weights``, or the ``from_hf`` of an adapter.
        checkpoint: an open checkpoint, or what ``open_checkpoint`` takes.
        targets: what the code fills: a module, or tensors by name. None: it returns tensors.
        calls: what the code is called with: "pairs", an iterator of pairs of names and tensors, or "dict", a dict of
            tensors by name.
        **options: see ``SourceOptions``; not used with an open checkpoint.

    Returns:
        The proved plan. Targets that only the code itself can fill, because it computes them, are not in it.

    Raises:
        CheckpointError: the checkpoint is missing or broken.
        UnsupportedError: ``targets`` is None, and the code does not return tensors; a target is not a plain tensor; the
            code does not run on tensors without data; it reads values of tensors that are not in the checkpoint; or it
            puts a tensor of the checkpoint into an attribute.
        Exception: what the code itself raises.

    Example:
        >>> import torch
        >>> from automodel_conv import trace_loader
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> def load(tensors):
        ...     return {"qkv": torch.cat([tensors["q"], tensors["k"], tensors["v"]]).t().contiguous()}
        >>> with TemporaryDirectory() as directory:
        ...     save_file({name: torch.ones(2, 3) for name in "qkv"}, f"{directory}/model.safetensors")
        ...     plan = trace_loader(load, directory, calls="dict")
        >>> plan.target("qkv").shape, plan.bytes_read
        ((3, 6), 72)
    """
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint, **options)
    return _traced(load, checkpoint, targets, calls).plan


@door("loading")
@keyword_options(TraceOptions, TraceSettings)
def load_with(
    load: Callable[[Any], Any],
    path: Checkpoint | str | os.PathLike[str],
    targets: nn.Module | Mapping[str, Tensor] | None = None,
    **options: Unpack[TraceOptions],
) -> LoadReport | LoadedStateDict:
    """Load a checkpoint as loading code does, by a plan of its copies.

    The code is traced, see ``trace_loader``, and the plan is executed: each byte is read once, straight to its place.
    For targets that the code computes it runs again, on tensors that have data only where these targets need them. The
    report names these targets.

    Args:
        load: the loading code, such as a model's ``load_weights``, or the ``from_hf`` of an adapter.
        path: what ``load_model`` takes, or an open checkpoint. The code gets tensors by
            file, and by their place in it.
        targets: what the code fills: a module, or tensors by name. Tensors with data are filled in place. In a module,
            those without data, and those that the code replaces, become new ones; other attributes change as the code
            changes them. None: the code returns tensors.
        **options: see ``TraceOptions``.

    Returns:
        A ``LoadReport``; ``computed`` has the targets that the code filled itself. If ``targets`` is None, a dict of
        the tensors, with that report as ``report``.

    Raises:
        CheckpointError: the checkpoint is missing or broken. Nothing has been read.
        UnsupportedError: the code does not return tensors although ``targets`` is None; it does not run on tensors
            without data; it reads values of tensors that are not in the checkpoint; it adds a part to a module, or puts
            a tensor of the checkpoint into an attribute; a target is not a plain tensor, or in a mapping and on the
            meta device; or ``memory_budget`` is given and the code computes targets. Nothing has been written.
        ConversionError: the code computes targets of tensors that are not in the checkpoint; the load does not fit into
            ``memory_budget``; or ``trace_cache`` cannot be written to.
        ReadError: reading failed; names the file, the tensor and the targets that are filled already.
        Exception: what the code itself raises.

    Example:
        >>> import torch
        >>> from automodel_conv import load_with
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> model = nn.Linear(3, 4, bias=False)
        >>> def load_weights(pairs):
        ...     for name, tensor in pairs:
        ...         model.weight.data.narrow(0, 0 if name == "gate" else 2, 2).copy_(tensor)
        >>> with TemporaryDirectory() as directory:
        ...     save_file({"gate": torch.zeros(2, 3), "up": torch.ones(2, 3)}, f"{directory}/model.safetensors")
        ...     report = load_with(load_weights, directory, model)
        >>> model.weight.sum(1).tolist(), report.computed, report.bytes_read
        ([0.0, 0.0, 3.0, 3.0], {}, 48)
    """
    settings = TraceSettings(**options)
    device = None if settings.device is None else loadable(settings.device)
    clock = Clock()
    if isinstance(path, Checkpoint):
        checkpoint = path
    else:
        checkpoint = open_source(path, settings)
    clock.lap("open")
    trace = _kept_or_traced(load, checkpoint, targets, settings)
    _refuse_budget(trace, settings)
    places = places_of(targets, trace, device)
    limits = limits_in_budget(settings.memory_budget, settings.limits, trace.plan, places.buffers)
    clock.lap("plan")
    own = named_tensors(targets)
    values, bytes_for_values = computed_values(load, checkpoint, targets, settings.calls, trace)
    bytes_for_values += sum(checkpoint.nbytes[row] for row in trace.values_read)
    clock.lap("read", CODE)
    stats = fill(trace.plan, checkpoint, places.buffers, limits, progress=settings.progress)
    if device is not None:
        values = {n: v if v is own.get(n) else in_class_of(v, v.detach().to(device)) for n, v in values.items()}
    if targets is not None:
        new = {name: (places.buffers[name], like) for name, like in places.new.items()}
        new |= {name: (value, value) for name, value in values.items() if value is not own.get(name)}
        install(targets, trace.changes, new)  # type: ignore[arg-type]
    clock.lap("read")
    problems = Problems(list(trace.plan.missing))
    report = report_of(checkpoint, trace.plan, problems, clock, stats, {})
    report = replace(
        report,
        bytes_read=report.bytes_read + bytes_for_values,
        left_out=checkpoint.left_out(sorted({*trace.plan.unused_sources} - trace.rows_for_computed)),
        computed={name: unknown.reason for name, unknown in trace.computed.items()},
        rewritten=trace.rewritten,
    )
    if targets is not None:
        return report
    tensors = {**places.buffers, **values}
    loaded = LoadedStateDict({name: tensors[name] for name in trace.names})
    loaded.report = report
    return loaded


def _refuse_budget(trace: Traced, settings: TraceSettings) -> None:
    if settings.memory_budget is not None and trace.computed:
        raise UnsupportedError(
            message(
                "memory_budget cannot be kept: the loading code itself computes some targets, without a bound",
                found="\n" + listing(trace.computed),
                do="leave {memory_budget} out",
            )
        )


def _traced(load: Load, checkpoint: Checkpoint, targets: Targets, calls: LoaderCalls) -> Traced:
    sources = SourceTable.from_checkpoint(checkpoint)
    return traced(load, sources, targets, calls, lambda rows: list(read_each(list(rows), checkpoint)))


def _kept_or_traced(load: Load, checkpoint: Checkpoint, targets: Targets, settings: TraceSettings) -> Traced:
    """Return a trace from the cache, or trace and keep the trace there."""
    if settings.trace_cache is None or settings.trace_key is None:
        return _traced(load, checkpoint, targets, settings.calls)
    directory = os.path.expanduser(os.fspath(settings.trace_cache))
    sources = SourceTable.from_checkpoint(checkpoint)
    digest = digest_of(load, sources, targets, settings.calls, settings.trace_key)
    trace = kept_trace(directory, digest, targets)
    if trace is not None:
        _LOG.info("found the trace of the loading code in %s", directory)
    else:
        trace = _traced(load, checkpoint, targets, settings.calls)
        keep_trace(directory, digest, targets, trace)
    return trace
