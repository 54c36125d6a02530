"""Public functions that load: from the path of a checkpoint to filled tensors or a filled model."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from automodel_conv.compiling.opening import open_to_load
from automodel_conv.compiling.options import LoadOptions, LoadSettings
from automodel_conv.destinations.buffers import finish, move_buffers, placeable_buffers
from automodel_conv.destinations.device_map import device_map_of
from automodel_conv.destinations.devices import loadable
from automodel_conv.destinations.model import ModelTensors, devices_of_new, regions_of
from automodel_conv.destinations.ties import in_order, unequal_ties, with_tied
from automodel_conv.distributed.collectives import all_or_raise, groups_of, union_over_ranks
from automodel_conv.distributed.node_replicas import nodes_for
from automodel_conv.distributed.placements import all_as_distributed, meshes_of
from automodel_conv.distributed.replicas import send_shared, targets_to_read
from automodel_conv.doors import door, keyword_options
from automodel_conv.execution.adding import add_to_tensors, merge_bytes
from automodel_conv.execution.checksums import verify_checksums
from automodel_conv.execution.filling import fill, limits_in_budget
from automodel_conv.execution.mapping import map_targets, mapped_or_new, without_targets
from automodel_conv.execution.report import Clock, LoadedStateDict, LoadReport, report_of
from automodel_conv.execution.timeline import MAP, MERGE, RANKS, SEND
from automodel_conv.lora.merging import merge_of_load
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.upstream.wrappers import plain_model


@door("loading")
@keyword_options(LoadOptions, LoadSettings, device="cpu")
def load_state_dict(
    path: str | os.PathLike[str], model: nn.Module | None = None, **options: Unpack[LoadOptions]
) -> LoadedStateDict:
    """Load a checkpoint into new tensors under the model's names.

    The result has exactly the keys of ``model.state_dict()``, in its order. Tied names share one tensor. If torch has
    wrapped the model, names are those of the model itself, as ``get_model_state_dict`` has them. Without a model, names
    are those that the rules produce.

    Args:
        path: a directory with or without an index, an index file, a ``.safetensors`` file, or ``org/name`` on the Hub.
            Weights, index and config of a repository are downloaded first if the cache lacks them. Or a URL, see
            ``open_checkpoint``, whose tensors are read by range.
        model: the model whose names, dtypes and rules to use. It is not changed, and may be on the meta device. None:
            the model of the checkpoint's ``config.json``, built on the meta device, unless ``rules`` or ``plan`` are
            given. See ``compile_plan``.
        **options: see ``LoadOptions``.

    Returns:
        The tensors by name: a dict with a ``report`` (``LoadReport``) and a ``layout`` (that of its experts, or None if
        it is the model's own).

    Raises:
        CheckpointError: the checkpoint is missing or broken. Nothing has been read.
        NameProblems: names or shapes do not fit the model or ``plan``; lists all of them. Nothing has been read.
        QuantizationError: parts of quantized tensors are missing, or contradict each other or the config; lists all of
            them. Nothing has been read.
        UnsupportedError: the layout is unknown or ambiguous, the quantization is not supported, a device is not
            available, or the model has PEFT adapters or flat FSDP1 parameters. Nothing has been read.
        CoverageError: the JSON of ``plan`` does not write each element exactly once. Nothing has been read.
        VerificationError: a tensor has another checksum, or none. Nothing has been loaded.
        ReadError: reading or mapping failed; names the file and the tensor.
        ConversionError: an argument is given that ``plan`` decides; the load does not fit into ``memory_budget``; or
            ``device_map`` leaves out a tensor, names something that the model does not have, or sends names of one
            tensor to several devices. Nothing has been read. Also raised if the system has no more memory or threads.
        RankError: the load of DTensors failed on another rank, or a rank no longer responds.

    Example:
        Load to several devices::

            device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "lm_head": "cpu", "": "cuda:1"}
            tensors = load_state_dict("path/to/Qwen3-30B-A3B", device_map=device_map)

        Compile a plan once for all checkpoints of a run, perhaps to a file, and load with it:

        >>> from automodel_conv import compile_plan
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> model = nn.Linear(3, 2)
        >>> with TemporaryDirectory() as directory:
        ...     save_file(model.state_dict(), f"{directory}/model.safetensors")
        ...     text = compile_plan(directory, model).to_json()
        ...     loaded = load_state_dict(directory, model, plan=text)
        >>> list(loaded), loaded.report.bytes_read
        (['weight', 'bias'], 32)
    """
    settings = LoadSettings(**options)
    device = "cpu" if settings.device is None else settings.device
    model = None if model is None else plain_model(model)
    state = {} if model is None else model.state_dict(keep_vars=True)
    groups = groups_of(meshes_of(state.values()))
    nodes = nodes_for(settings.broadcast, groups)
    with all_or_raise(groups, "loading"):
        device_map = device_map_of(settings.device_map, device, "cpu")
        single_device = loadable(device)
        device_of = device_map.device_of if device_map is not None else lambda name: single_device
        clock = Clock()
        checkpoint, plan, problems, model = open_to_load(path, model, state, settings, clock)
        model_state = state if model is None or state else model.state_dict(keep_vars=True)
        if device_map is not None:
            device_map.check([target.name for target in plan.targets], model_state, model, strict=settings.strict)
        own_plan = plan.shard(regions_of(state, plan))
        merge = merge_of_load(checkpoint, plan, own_plan, model, settings)
        if settings.verify:
            clock.lap("plan")
            verify_checksums(checkpoint, settings.reader_threads, settings.progress)
            clock.lap("verify")
        devices = devices_of_new(own_plan.targets, state, device_of)
        read_plan, shared_names = targets_to_read(own_plan, state, settings.broadcast, nodes)
        clock.lap("plan")
        mapped = map_targets(read_plan, checkpoint, devices) if settings.memory_map else {}
        clock.lap("plan", MAP)
        buffers = mapped_or_new(own_plan.targets, mapped, devices)
        clock.lap("plan")
        extra_bytes = 0 if merge is None else merge_bytes(merge.factors, settings.reader_threads)
        to_fill = without_targets(own_plan, mapped)
        limits = limits_in_budget(settings.memory_budget, settings.limits, to_fill, buffers, extra_bytes)
        stats = fill(without_targets(read_plan, mapped), checkpoint, buffers, limits, progress=settings.progress)
        clock.lap("read")
    clock.lap(None, RANKS)
    send_shared([state[name] for name in shared_names], [buffers[name] for name in shared_names], nodes)
    clock.lap(None, SEND)
    if merge is not None:
        with all_or_raise(groups, "merging the adapter"):
            add_to_tensors(buffers, *merge, settings.reader_threads)
        clock.lap("read", MERGE)
    with all_or_raise(groups, "comparing tied tensors"):
        unequal_here = unequal_ties(buffers, plan.tied)
    unequal = union_over_ranks(groups, unequal_here, "comparing tied tensors")
    loaded = LoadedStateDict(in_order(all_as_distributed(with_tied(buffers, plan.tied, unequal), state), model_state))
    adapted = () if merge is None else merge.blocks
    loaded.report = report_of(checkpoint, plan, problems, clock, stats, mapped, extra_bytes, adapted)
    loaded.layout = plan.layout
    return loaded


@door("loading")
@keyword_options(LoadOptions, LoadSettings)
def load_model(model: nn.Module, path: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> LoadReport:
    """Load a checkpoint into a model: materialized parameters in place, parameters on the meta device as new ones.

    If reading ends with any exception, including KeyboardInterrupt, the exception lists the parameters that are
    complete (in its ``__notes__`` if it is not an error of this package).

    Args:
        model: the model to fill. torch may have wrapped it, see ``compile_plan``.
        path: a directory with or without an index, an index file, a ``.safetensors`` file, or ``org/name`` on the Hub.
            Weights, index and config of a repository are downloaded first if the cache lacks them. Or a URL, see
            ``open_checkpoint``, whose tensors are read by range.
        **options: see ``LoadOptions``.

    Returns:
        A ``LoadReport``: the names that did not fit, bytes, seconds and memory of the load.

    Raises:
        CheckpointError: the checkpoint is missing or broken. No parameter has been written.
        NameProblems: names or shapes do not fit the model or ``plan``; lists all of them. No parameter has been
            written.
        QuantizationError: parts of quantized tensors are missing, or contradict each other or the config; lists all of
            them. No parameter has been written.
        UnsupportedError: the layout is unknown or ambiguous, the quantization is not supported, a device is not
            available, or the model has PEFT adapters or flat FSDP1 parameters. No parameter has been written.
        CoverageError: the JSON of ``plan`` does not write each element exactly once. No parameter has been written.
        VerificationError: a tensor has another checksum, or none. No parameter has been written.
        ReadError: reading failed; names the file, the tensor and the targets that are filled already. Parameters that
            would have been replaced (on the meta device, or of another dtype) are still the old ones.
        ConversionError: an argument is given that ``plan`` decides; the load does not fit into ``memory_budget``; or
            ``device_map`` does not fit the model. Nothing has been read. Also raised if the checkpoint has different
            values for names that are one parameter of the model, or the system has no more memory or threads.
        RankError: the load of DTensors failed on another rank, or a rank no longer responds.

    Example:
        Place a model on several devices::

            model = AutoModelForCausalLM.from_config(config)  # under torch.device("meta")
            device_map = accelerate.infer_auto_device_map(model, max_memory)
            load_model(model, path, device_map=device_map)
            accelerate.dispatch_model(model, device_map)

        Fill a model that is on the meta device:

        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> model = nn.Linear(3, 2, device="meta")
        >>> with TemporaryDirectory() as directory:
        ...     save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, f"{directory}/model.safetensors")
        ...     report = load_model(model, directory)
        >>> model.weight.device, report.bytes_read, report.missing_keys
        (device(type='cpu'), 32, ())
    """
    settings = LoadSettings(**options)
    model = plain_model(model)
    state = model.state_dict(keep_vars=True)
    groups = groups_of(meshes_of(state.values()))
    nodes = nodes_for(settings.broadcast, groups)
    with all_or_raise(groups, "loading"):
        device_map = device_map_of(settings.device_map, settings.device, None)
        single_device = None if settings.device is None else loadable(settings.device)
        device_of = device_map.device_of if device_map is not None else lambda name: single_device
        clock = Clock()
        checkpoint, plan, problems, _ = open_to_load(path, model, state, settings, clock, in_place=True)
        if device_map is not None:
            names = dict.fromkeys([*(target.name for target in plan.targets), *placeable_buffers(model)])
            device_map.check(names, state, model, strict=settings.strict)
            device_map.check_in_place(state)
        if settings.verify:
            clock.lap("plan")
            verify_checksums(checkpoint, settings.reader_threads, settings.progress)
            clock.lap("verify")
        was_meta = any(tensor.is_meta for tensor in state.values() if isinstance(tensor, Tensor))

        def map_new(new_plan: CopyPlan, devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
            read_plan, _ = targets_to_read(new_plan, state, settings.broadcast, nodes)
            clock.lap("plan")
            new = map_targets(read_plan, checkpoint, devices) if settings.memory_map else {}
            clock.lap("plan", MAP)
            return new

        model_tensors = ModelTensors.prepare(model, state, plan, settings.strict, device_of, map_new)
        merge = merge_of_load(checkpoint, plan, model_tensors.plan, model, settings)
        clock.lap("plan")
        to_fill = without_targets(model_tensors.plan, model_tensors.mapped)
        extra_bytes = model_tensors.extra_bytes + (
            0 if merge is None else merge_bytes(merge.factors, settings.reader_threads)
        )
        limits = limits_in_budget(settings.memory_budget, settings.limits, to_fill, model_tensors.buffers, extra_bytes)
        read_plan, shared_names = targets_to_read(model_tensors.plan, state, settings.broadcast, nodes)
        stats = fill(
            without_targets(read_plan, model_tensors.mapped),
            checkpoint,
            model_tensors.buffers,
            limits,
            progress=settings.progress,
        )
        clock.lap("read")
    clock.lap(None, RANKS)
    send_shared([state[name] for name in shared_names], [model_tensors.buffers[name] for name in shared_names], nodes)
    clock.lap(None, SEND)
    if merge is not None:
        with all_or_raise(groups, "merging the adapter"):
            add_to_tensors(model_tensors.buffers, *merge, settings.reader_threads)
        clock.lap("read", MERGE)
    with all_or_raise(groups, "comparing tied tensors"):
        unequal_here = model_tensors.unequal()
    unequal = union_over_ranks(groups, unequal_here, "comparing tied tensors")
    model_tensors.install(unequal)
    if was_meta:
        finish(model, model_tensors.buffers, problems.missing, device_of)
    if device_map is not None:
        move_buffers(model, device_of)
    adapted = () if merge is None else merge.blocks
    return report_of(checkpoint, plan, problems, clock, stats, model_tensors.mapped, extra_bytes, adapted)
