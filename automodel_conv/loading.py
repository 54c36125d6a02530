"""The front doors for loading: a checkpoint's path in, filled tensors or a filled model out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from automodel_conv.compiling.opening import fitted_plan, load_plan, while_importing
from automodel_conv.destinations.device_map import DeviceLike, device_map_of
from automodel_conv.destinations.devices import loadable
from automodel_conv.destinations.model import Homes, finish, home_of, move_buffers, placeable_buffers, regions_of
from automodel_conv.destinations.ties import in_order, unequal_ties, with_tied
from automodel_conv.distributed.collectives import found_by_any, groups_of, send, together
from automodel_conv.distributed.placements import (
    as_distributed,
    is_distributed,
    is_first_replica,
    is_replicated,
    meshes_of,
)
from automodel_conv.doors import door
from automodel_conv.execution.checksums import verify_checksums
from automodel_conv.execution.cores import cores, default_reader_threads
from automodel_conv.execution.filling import Limits, fill, within
from automodel_conv.execution.mapping import map_targets, with_new, without
from automodel_conv.execution.page_policy import PageUse
from automodel_conv.execution.stats import LoadStats
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint, open_downloaded
from automodel_conv.planning.compiler import Problems
from automodel_conv.planning.given import as_plan
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.upstream.wrappers import plain_model


@dataclass(frozen=True)
class LoadReport:
    """The outcome of a load.

    Attributes:
        missing_keys: targets that nothing provided, less what the model says to ignore and what is tied.
        unexpected_keys: target names that the model does not have, less what it says to ignore.
        mismatched_keys: ``(name, found shape, expected shape)``; those targets were left as they were.
        duplicated_keys: ``(name, sources)`` where several sources claim a target; the first was taken.
        fallbacks: targets made by upstream's own code, because an operation could not be lowered.
        bytes_read: bytes of tensor data that were read; mapped targets are not read.
        seconds: by phase: ``open``, ``plan``, ``read``.
        peak_extra_bytes: upper bound of the memory used beside the final buffers: scratch on the host and on the
            device, and second copies of parameters that the checkpoint holds under two names, unless they are mapped.
            What upstream's own code allocates is not in it.
        left_out: tensors of the checkpoint, by their names in it, that nothing was made of, and of its files.
        unindexed: name and file of each tensor that was not read, since the index does not give it to that file.
        carried: always empty: a model takes nothing that it has no place for.
        copied_by_kernels: copies that Triton kernels made on a device.
        copied_by_torch: copies that torch made on a device, because no kernel fits them or none can run there.
        without_kernels: why no kernel can run on the device; None where they can, where all bytes only move, and for
            loads to the host.
        threads: the most that read at the same time, of all devices together.
        pages: the new host memory by the size of its pages, and how fast each size was made; ``str`` says it in words;
            None where no target was read to the host.
        bytes_mapped: bytes of the targets that were mapped (``memory_map=True``). They were not read: their pages come
            into memory when they are touched.
    """

    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    mismatched_keys: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    duplicated_keys: tuple[tuple[str, tuple[str, ...]], ...]
    fallbacks: tuple[str, ...]
    bytes_read: int
    seconds: Mapping[str, float]
    peak_extra_bytes: int
    left_out: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    unindexed: tuple[tuple[str, str], ...] = ()
    copied_by_kernels: int = 0
    copied_by_torch: int = 0
    without_kernels: str | None = None
    threads: int = 0
    pages: PageUse | None = None
    bytes_mapped: int = 0

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes read per second of the read phase; mapped ones do not count."""
        return self.bytes_read / 1e9 / max(self.seconds["read"], 1e-9)


class LoadedStateDict(dict[str, Tensor]):
    """A state dict that also carries the ``LoadReport`` of how it was made, and the layout of its experts."""

    report: LoadReport
    layout: str | None = None
    """As the caller has asked for it, or as the files say where names are kept; None: as the model has them."""


@door("planning")
def compile_plan(
    checkpoint: Checkpoint | str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = True,
) -> CopyPlan:
    """The plan that loads a checkpoint, from its headers alone.

    The few bytes of ``weight_shape`` are read besides, for INT4 codes with one scale for a whole row: nothing else
    tells whether rows end in padding. Of a repository that is not in the cache they are not; loads of it look at them.

    Args:
        checkpoint: an opened checkpoint, or what ``open_checkpoint`` takes; no weights of ``org/name`` are downloaded.
        model: any module, on the meta device too, and as torch wraps it (``torch.compile``, data parallelism,
            activation checkpointing, whole or in parts): names are then those of the model itself, without what
            wrappers add, and a checkpoint of a wrapped model, whose names have ``_orig_mod`` or all begin with
            ``module``, is read as one of the model itself. None builds the model of the checkpoint's ``config.json`` on
            the meta device, unless ``rules`` are given. Its class is the one that ``architectures`` name of the
            config's type, else the first that transformers has for the type: image and text to text, any modality,
            causal language model, sequence to sequence, speech, masked language model, other heads only where there is
            no bare model.
        rules: transformers' rule objects; None takes the model's own. ``[]`` keeps the checkpoint's names.
        layout: how routed experts shall lie: "transformers", "nemo", "gpt_oss", "vllm"; None: as the model has them.
        source_layout: how grouped experts in the checkpoint lie: a layout, or "per_expert", as the type is published.
            None: as the files say, which this package writes, or else as the model has them; where the model's shapes
            contradict that, or leave it open, this is an error.
        key_mapping: ``{pattern: replacement}`` applied to names before the rules, as in ``from_pretrained``.
        dtype: dtype of the floating targets; None keeps each parameter's own (without a model: the source's). A new
            parameter, or one on the meta device, gets what ``from_pretrained`` gives it: its model's dtype, which
            without one in ``config.json`` is that of the first tensor by name; float32 where the model keeps it in
            that; all targets of a rule the first one's; the file's in quantized checkpoints, where transformers casts
            nothing.
        dequantize: what the ``quantization_config`` in the checkpoint's ``config.json`` says is quantized is decoded,
            each element rounded once to its target's dtype; False takes codes and scales for tensors of their own, as
            a model of transformers that keeps them wants (its ``hf_quantizer`` knows the rules).

    Raises:
        CheckpointError: the checkpoint is broken.
        NameProblems: names or shapes do not fit; lists all of them.
        QuantizationError: parts of quantized tensors are missing, or do not fit each other or the config; lists all.
        UnsupportedError: an unknown layout, experts whose layout cannot be told, a quantization that is not decoded, or
            codes where numbers are wanted; or a model with adapters of PEFT, or one that FSDP1 keeps flat.
    """
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    model = None if model is None else plain_model(model)
    plan, problems, _ = load_plan(checkpoint, model, rules, layout, source_layout, key_mapping, dtype, dequantize)
    problems.raise_unless_fit(checkpoint.path, unindexed=checkpoint.unindexed)
    return plan


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
    model = None if model is None else plain_model(model)
    state = {} if model is None else model.state_dict(keep_vars=True)
    groups = groups_of(meshes_of(state.values()))
    with together(groups, "loading"):
        where = device_map_of(device_map, device, "cpu")
        everything_on = loadable(device)
        device_of = where.device_of if where is not None else lambda name: everything_on
        clock = _Clock()
        decided = _decided(rules, layout, source_layout, key_mapping, dtype, dequantize)
        given = None if plan is None else as_plan(plan, decided)
        clock.lap("plan")
        checkpoint = open_downloaded(path, revision=revision)
        clock.lap("open")
        if given is None:
            with while_importing(checkpoint) if model is None and rules is None else nullcontext():
                whole, problems, model = load_plan(
                    checkpoint, model, rules, layout, source_layout, key_mapping, dtype, dequantize
                )
            problems.raise_unless_fit(checkpoint.path, strict, checkpoint.unindexed)
        else:
            whole, problems = fitted_plan(given, checkpoint, model, state, strict)
        known = state if model is None or state else model.state_dict(keep_vars=True)
        if where is not None:
            where.check([target.name for target in whole.targets], known, model, strict=strict)
        plan = whole.shard(regions_of(state, whole))
        if verify:
            verify_checksums(checkpoint, default_reader_threads(cores()) if threads is None else threads)
        devices: dict[str, torch.device] = {}
        for target in plan.targets:
            like = state.get(target.name)
            own = home_of(like) if like is not None and is_distributed(like) else None
            devices[target.name] = own or device_of(target.name) or torch.device("cpu")
        mine, shared_names = _to_read(plan, state, broadcast)
        mapped = map_targets(mine, checkpoint, devices) if memory_map else {}
        buffers = with_new(plan.targets, mapped, devices)
        clock.lap("plan")
        limits = Limits(threads, scratch_bytes, device_scratch_bytes, huge_pages)
        limits = within(memory_budget, limits, without(plan, mapped), buffers)
        stats = fill(without(mine, mapped), checkpoint, buffers, limits, progress=progress)
        clock.lap("read")
    send([state[name] for name in shared_names], [buffers[name] for name in shared_names])
    with together(groups, "comparing tied tensors"):
        found = unequal_ties(buffers, whole.tied)
    unequal = found_by_any(groups, found, "comparing tied tensors")
    loaded = LoadedStateDict(in_order(_distributed(with_tied(buffers, whole.tied, unequal), state), known))
    loaded.report = _report(checkpoint, whole, problems, clock, stats, mapped)
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
    model = plain_model(model)
    state = model.state_dict(keep_vars=True)
    groups = groups_of(meshes_of(state.values()))
    with together(groups, "loading"):
        where = device_map_of(device_map, device, None)
        everything_on = None if device is None else loadable(device)
        device_of = where.device_of if where is not None else lambda name: everything_on
        clock = _Clock()
        decided = _decided(rules, layout, source_layout, key_mapping, dtype, dequantize)
        given = None if plan is None else as_plan(plan, decided)
        clock.lap("plan")
        checkpoint = open_downloaded(path, revision=revision)
        clock.lap("open")
        if given is None:
            whole, problems, _ = load_plan(
                checkpoint, model, rules, layout, source_layout, key_mapping, dtype, dequantize, in_place=True
            )
            problems.raise_unless_fit(checkpoint.path, strict, checkpoint.unindexed)
        else:
            whole, problems = fitted_plan(given, checkpoint, model, state, strict, in_place=True)
        if where is not None:
            names = dict.fromkeys([*(target.name for target in whole.targets), *placeable_buffers(model)])
            where.check(names, state, model, strict=strict)
            where.check_in_place(state)
        if verify:
            verify_checksums(checkpoint, default_reader_threads(cores()) if threads is None else threads)
        was_meta = any(tensor.is_meta for tensor in state.values() if isinstance(tensor, Tensor))

        def map_new(fresh: CopyPlan, devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
            return map_targets(_to_read(fresh, state, broadcast)[0], checkpoint, devices) if memory_map else {}

        homes = Homes.of(model, state, whole, strict, device_of, map_new)
        clock.lap("plan")
        limits = Limits(threads, scratch_bytes, device_scratch_bytes, huge_pages)
        limits = within(memory_budget, limits, without(homes.plan, homes.mapped), homes.buffers, homes.extra_bytes)
        mine, shared_names = _to_read(homes.plan, state, broadcast)
        stats = fill(without(mine, homes.mapped), checkpoint, homes.buffers, limits, progress=progress)
        clock.lap("read")
    send([state[name] for name in shared_names], [homes.buffers[name] for name in shared_names])
    with together(groups, "comparing tied tensors"):
        found = homes.unequal()
    unequal = found_by_any(groups, found, "comparing tied tensors")
    homes.settle(unequal)
    if was_meta:
        finish(model, homes.buffers, problems.missing, device_of)
    if where is not None:
        move_buffers(model, device_of)
    return _report(checkpoint, whole, problems, clock, stats, homes.mapped, homes.extra_bytes)


# --- private --------------------------------------------------------------------------------------------------------


def _decided(
    rules: Any, layout: str | None, source_layout: str | None, key_mapping: Any, dtype: Any, dequantize: bool
) -> dict[str, object]:
    """The arguments of a load that a plan decides, by name; None those that were not given."""
    return {
        "rules": rules,
        "layout": layout,
        "source_layout": source_layout,
        "key_mapping": key_mapping,
        "dtype": dtype,
        "dequantize": None if dequantize else False,
    }


def _to_read(plan: CopyPlan, state: Mapping[str, Tensor], broadcast: bool) -> tuple[CopyPlan, list[str]]:
    """The plan of the targets that this rank reads, and the names of those that are then sent from rank to rank."""
    if not broadcast:
        return plan, []
    names = [target.name for target in plan.targets if target.name in state]
    shared = [name for name in names if is_distributed(state[name]) and is_replicated(state[name])]
    received = {name for name in shared if not is_first_replica(state[name])}
    return replace(plan, targets=tuple(t for t in plan.targets if t.name not in received)), shared


def _distributed(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DTensors where the model has them; names that share a tensor still do."""
    made: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name in state and is_distributed(state[name]) and id(tensor) not in made:
            made[id(tensor)] = as_distributed(tensor, state[name])
    return {name: made.get(id(tensor), tensor) for name, tensor in tensors.items()}


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("open", "plan", "read"), 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def _report(
    checkpoint: Checkpoint,
    plan: CopyPlan,
    problems: Problems,
    clock: _Clock,
    stats: Mapping[torch.device, LoadStats],
    mapped: Mapping[str, Tensor],
    extra_bytes: int = 0,
) -> LoadReport:
    return LoadReport(
        missing_keys=tuple(problems.missing),
        unexpected_keys=tuple(problems.unexpected),
        mismatched_keys=tuple(problems.mismatched),
        duplicated_keys=tuple(problems.duplicated),
        fallbacks=plan.fallbacks,
        bytes_read=sum(part.bytes_read for part in stats.values()),
        seconds=clock.seconds,
        left_out=checkpoint.left_out(plan.unused_sources),
        unindexed=checkpoint.unindexed,
        peak_extra_bytes=sum(part.scratch_bytes + part.device_scratch_bytes for part in stats.values()) + extra_bytes,
        copied_by_kernels=sum(part.work.by_kernels for part in stats.values()),
        copied_by_torch=sum(part.work.by_torch for part in stats.values()),
        threads=sum(part.threads for part in stats.values()),
        pages=next((part.pages for device, part in stats.items() if device.type == "cpu"), None),
        without_kernels=next((part.without_kernels for part in stats.values() if part.without_kernels), None),
        bytes_mapped=sum(tensor.nbytes for tensor in mapped.values()),
    )
