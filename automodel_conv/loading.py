"""The front doors for loading: a checkpoint's path in, filled tensors or a filled model out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from automodel_conv.compiling.opening import open_to_load
from automodel_conv.compiling.options import LoadOptions, PlanOptions
from automodel_conv.destinations.buffers import finish, move_buffers, placeable_buffers
from automodel_conv.destinations.device_map import DeviceLike, device_map_of
from automodel_conv.destinations.devices import loadable
from automodel_conv.destinations.model import ModelTensors, devices_of_new, regions_of
from automodel_conv.destinations.ties import in_order, unequal_ties, with_tied
from automodel_conv.distributed.collectives import all_or_raise, groups_of, send, union_over_ranks
from automodel_conv.distributed.placements import all_as_distributed, meshes_of
from automodel_conv.distributed.replicas import to_read
from automodel_conv.doors import door
from automodel_conv.execution.checksums import verify_checksums
from automodel_conv.execution.filling import Limits, fill, within
from automodel_conv.execution.mapping import map_targets, with_new, without
from automodel_conv.execution.report import Clock, LoadedStateDict, LoadReport, report_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.upstream.wrappers import plain_model


@door("loading")
def load_state_dict(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    plan: CopyPlan | str | None = None,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
    device_map: Mapping[str, DeviceLike] | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    dequantize: bool = True,
    verify: bool = False,
    broadcast: bool = False,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    device_scratch_bytes: int | None = None,
    memory_budget: int | None = None,
    huge_pages: bool | None = None,
    memory_map: bool = False,
    progress: bool = False,
    revision: str | None = None,
) -> LoadedStateDict:
    """Load a checkpoint into new tensors under the model's names.

    The result has exactly the keys of ``model.state_dict()`` in its order (of a model that torch has wrapped those of
    the model itself, as ``get_model_state_dict`` has them); tied names share one tensor. ``model`` only says what is
    wanted and is not changed. Without a model the names are what the rules make.

    Args:
        path: a directory with or without an index, an index file, a ``.safetensors`` file, or ``org/name`` on the Hub,
            whose weights, index and config are downloaded first, where the cache lacks them.
        plan: a plan from ``compile_plan``, or the text of its ``to_json()``. The load executes it and does not plan
            again. The checkpoint must have the tensors that the plan reads, with the same names, dtypes and shapes;
            with ``strict``, it must have exactly the tensors that the plan knows. Their files and their places in them
            may differ. All that the plan makes must fit the model, also if ``strict`` is False. The plan decides
            dtypes and layout, so ``rules``, ``layout``, ``source_layout``, ``key_mapping``, ``dtype`` and
            ``dequantize`` must be left out. Without a model, the names and the ties are the plan's, and tied names come
            last.
        model, rules, layout, source_layout, key_mapping, dtype, dequantize: see ``compile_plan``.
        device: the CPU or a CUDA device. To the latter, bytes go through pinned memory, and what has to be permuted or
            cast is copied there by Triton kernels, or by torch where Triton cannot run.
        device_map: devices by names of modules or parameters, instead of ``device``, as accelerate writes them
            (``infer_auto_device_map``, ``model.hf_device_map``). The longest prefix of whole components of a tensor's
            name decides; "" covers the rest; numbers are CUDA devices. All devices are filled at the same time.
        strict: a missing, unexpected, mismatched or doubly provided target raises; False loads what fits, as
            upstream does (the first of two wins), and tells in the report.
        verify: first compare all tensors with the checksums that ``save_checkpoint(checksums=True)`` wrote; reads the
            files once more.
        broadcast: what several ranks hold of a DTensor is read by the first of them and sent to the others, in place;
            False: each reads its own.
        threads: reader threads, of all devices together; None chooses by the machine, whose cores are shared by the
            ranks of this job that run on it (``LOCAL_WORLD_SIZE``), and adds threads in a load to the host while that
            makes it faster, as it does where they wait for a network.
        scratch_bytes: bound of the host memory used beside the final tensors, for all devices together; None: 64 MiB
            for the CPU, 16 MiB for each reader thread of a CUDA device. The latter is pinned; torch rounds it up to a
            power of two and keeps it for the next load.
        device_scratch_bytes: likewise of the memory of each CUDA device; None: 256 MiB.
        memory_budget: bound of all memory used beside the final tensors, of the host and all devices together, on this
            rank; makes what is not given of the two above smaller where it must. Plans, which are small, not counted.
        huge_pages: whether new host memory, in tensors of 4 MiB or more, has huge pages (2 MiB; Linux). None measures
            during the load which size this machine makes faster: huge pages on most, small ones on virtual machines
            that give their free memory back to the host.
        memory_map: map new tensors on the CPU instead of reading them, where a file has their very bytes: in one run,
            in the right dtype, at a multiple of the element size (Linux only). All other tensors are read. A write to a
            mapped tensor changes a copy of the page and never the file. Processes that map one file share the pages
            that they do not write to. The file must not be changed or cut while such a tensor lives: a change may show
            in the tensor, and a touch of what was cut ends the process (SIGBUS). To remove or replace the file is safe.
            See docs/performance.md.
        progress: show a bar in bytes and GB/s.
        revision: of an ``org/name`` on the Hub.

    Raises:
        CheckpointError, NameProblems, QuantizationError, UnsupportedError: see ``compile_plan``; nothing has been read
            then. NameProblems also if ``plan`` does not fit.
        CoverageError: the JSON of ``plan`` does not write each element once.
        VerificationError: a tensor does not have its checksum, or there is none; nothing has been loaded then.
        ReadError: reading or mapping failed; names file and tensor.
        ConversionError: an argument is given that ``plan`` decides; the load does not fit into ``memory_budget``; or
            ``device_map`` leaves a tensor out, names what the model does not have, or sends names of one tensor to
            several devices; nothing has been read then. Or the system gives no more memory or threads.
        RankError: with DTensors: the load failed on other ranks, or one of them is gone.

    Example::

        device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "lm_head": "cpu", "": "cuda:1"}
        tensors = load_state_dict("path/to/Qwen3-30B-A3B", device_map=device_map)

    A plan is made once for all checkpoints of a run, and may be kept in a file:

    >>> from automodel_conv import compile_plan
    >>> from safetensors.torch import save_file
    >>> from tempfile import TemporaryDirectory
    >>> model = nn.Linear(3, 2)
    >>> with TemporaryDirectory() as directory:
    ...     save_file(model.state_dict(), f"{directory}/model.safetensors")
    ...     text = compile_plan(directory, model).to_json()
    ...     loaded = load_state_dict(directory, model, plan=text)
    ...     report = load_model(model, directory, plan=text)
    >>> list(loaded), report.bytes_read
    (['weight', 'bias'], 32)
    """
    options = LoadOptions(
        PlanOptions(rules, layout, source_layout, key_mapping, dtype, dequantize),
        plan=plan,
        strict=strict,
        verify=verify,
        broadcast=broadcast,
        limits=Limits(threads, scratch_bytes, device_scratch_bytes, huge_pages),
        memory_budget=memory_budget,
        memory_map=memory_map,
        progress=progress,
        revision=revision,
    )
    model = None if model is None else plain_model(model)
    state = {} if model is None else model.state_dict(keep_vars=True)
    groups = groups_of(meshes_of(state.values()))
    with all_or_raise(groups, "loading"):
        where = device_map_of(device_map, device, "cpu")
        everything_on = loadable(device)
        device_of = where.device_of if where is not None else lambda name: everything_on
        clock = Clock()
        checkpoint, whole, problems, model = open_to_load(path, model, state, options, clock)
        known = state if model is None or state else model.state_dict(keep_vars=True)
        if where is not None:
            where.check([target.name for target in whole.targets], known, model, strict=options.strict)
        own = whole.shard(regions_of(state, whole))
        if options.verify:
            verify_checksums(checkpoint, options.reader_threads)
        devices = devices_of_new(own.targets, state, device_of)
        mine, shared_names = to_read(own, state, options.broadcast)
        mapped = map_targets(mine, checkpoint, devices) if options.memory_map else {}
        buffers = with_new(own.targets, mapped, devices)
        clock.lap("plan")
        limits = within(options.memory_budget, options.limits, without(own, mapped), buffers)
        stats = fill(without(mine, mapped), checkpoint, buffers, limits, progress=options.progress)
        clock.lap("read")
    send([state[name] for name in shared_names], [buffers[name] for name in shared_names])
    with all_or_raise(groups, "comparing tied tensors"):
        found = unequal_ties(buffers, whole.tied)
    unequal = union_over_ranks(groups, found, "comparing tied tensors")
    loaded = LoadedStateDict(in_order(all_as_distributed(with_tied(buffers, whole.tied, unequal), state), known))
    loaded.report = report_of(checkpoint, whole, problems, clock, stats, mapped)
    loaded.layout = whole.layout
    return loaded


@door("loading")
def load_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    plan: CopyPlan | str | None = None,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    device: str | torch.device | None = None,
    device_map: Mapping[str, DeviceLike] | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    dequantize: bool = True,
    verify: bool = False,
    broadcast: bool = False,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    device_scratch_bytes: int | None = None,
    memory_budget: int | None = None,
    huge_pages: bool | None = None,
    memory_map: bool = False,
    progress: bool = False,
    revision: str | None = None,
) -> LoadReport:
    """Load a checkpoint into a model: materialized parameters in place, parameters on the meta device as new ones.

    Args:
        layout: the layout the model's experts are in, for modules that are not transformers' own.
        device: where new parameters go; None: to the device of those whose place they take, from the meta device to the
            CPU. Materialized parameters are filled where they are.
        device_map: where new parameters and all buffers go; see ``load_state_dict``. Materialized parameters must be
            where the map says already; materialized buffers are moved there after the load
            (``accelerate.init_empty_weights()`` leaves them on the CPU). The model is placed, but does not run on
            several devices until ``accelerate.dispatch_model(model, device_map)``.
        dtype: if given, parameters of another floating dtype are replaced (see ``compile_plan``).
        plan: see ``load_state_dict``. It is the plan of the whole model, also where parameters are DTensors.
        memory_map: see ``load_state_dict``. It maps new parameters and buffers; materialized ones are read in place.
        path, rules, source_layout, key_mapping, strict, dequantize, verify, broadcast, threads, scratch_bytes,
            device_scratch_bytes, memory_budget, huge_pages, progress, revision: see ``load_state_dict``.

    Raises:
        CheckpointError, NameProblems, CoverageError, QuantizationError, UnsupportedError: see ``load_state_dict``; no
            parameter has been written then.
        VerificationError: see ``load_state_dict``; likewise.
        ReadError: reading failed; names file and tensor, and the targets already filled. Parameters that would have
            been replaced (on the meta device, or of another dtype) are still the old ones.
        ConversionError: an argument is given that ``plan`` decides, the load does not fit into ``memory_budget``, or
            ``device_map`` does not fit the model (see ``load_state_dict``); nothing has been read then. Or the
            checkpoint has different values for names that are one parameter of the model, or the system gives no more
            memory or threads.
        RankError: see ``load_state_dict``.

    Whatever ends the reading, a KeyboardInterrupt too, tells the parameters already filled (in its ``__notes__``, if it
    is none of these errors).

    Example::

        model = AutoModelForCausalLM.from_config(config)  # under torch.device("meta")
        device_map = accelerate.infer_auto_device_map(model, max_memory)
        load_model(model, path, device_map=device_map)
        accelerate.dispatch_model(model, device_map)
    """
    options = LoadOptions(
        PlanOptions(rules, layout, source_layout, key_mapping, dtype, dequantize),
        plan=plan,
        strict=strict,
        verify=verify,
        broadcast=broadcast,
        limits=Limits(threads, scratch_bytes, device_scratch_bytes, huge_pages),
        memory_budget=memory_budget,
        memory_map=memory_map,
        progress=progress,
        revision=revision,
    )
    model = plain_model(model)
    state = model.state_dict(keep_vars=True)
    groups = groups_of(meshes_of(state.values()))
    with all_or_raise(groups, "loading"):
        where = device_map_of(device_map, device, None)
        everything_on = None if device is None else loadable(device)
        device_of = where.device_of if where is not None else lambda name: everything_on
        clock = Clock()
        checkpoint, whole, problems, _ = open_to_load(path, model, state, options, clock, in_place=True)
        if where is not None:
            names = dict.fromkeys([*(target.name for target in whole.targets), *placeable_buffers(model)])
            where.check(names, state, model, strict=options.strict)
            where.check_in_place(state)
        if options.verify:
            verify_checksums(checkpoint, options.reader_threads)
        was_meta = any(tensor.is_meta for tensor in state.values() if isinstance(tensor, Tensor))

        def map_new(new: CopyPlan, devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
            part, _ = to_read(new, state, options.broadcast)
            return map_targets(part, checkpoint, devices) if options.memory_map else {}

        model_tensors = ModelTensors.prepare(model, state, whole, options.strict, device_of, map_new)
        clock.lap("plan")
        to_fill = without(model_tensors.plan, model_tensors.mapped)
        limits = within(
            options.memory_budget, options.limits, to_fill, model_tensors.buffers, model_tensors.extra_bytes
        )
        mine, shared_names = to_read(model_tensors.plan, state, options.broadcast)
        stats = fill(
            without(mine, model_tensors.mapped), checkpoint, model_tensors.buffers, limits, progress=options.progress
        )
        clock.lap("read")
    send([state[name] for name in shared_names], [model_tensors.buffers[name] for name in shared_names])
    with all_or_raise(groups, "comparing tied tensors"):
        found = model_tensors.unequal()
    unequal = union_over_ranks(groups, found, "comparing tied tensors")
    model_tensors.install(unequal)
    if was_meta:
        finish(model, model_tensors.buffers, problems.missing, device_of)
    if where is not None:
        move_buffers(model, device_of)
    return report_of(checkpoint, whole, problems, clock, stats, model_tensors.mapped, model_tensors.extra_bytes)
