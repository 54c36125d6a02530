"""Keyword arguments of ``compile_plan`` and of the loaders, and their defaults.

Callers see ``PlanOptions`` and ``LoadOptions``, which document each keyword. ``doors.keyword_options`` shows that text
in the docstrings of the functions. ``PlanSettings`` and ``LoadSettings`` have the same fields, with their defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch

from automodel_conv.execution.cores import cores, default_reader_threads
from automodel_conv.execution.filling import Limits
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.types import Broadcast, LayoutInFiles, LayoutName, LoaderCalls

AdapterArgument = str | os.PathLike[str] | Sequence[tuple[str | os.PathLike[str], float]]
"""The path of an adapter, or paths and weights of several."""


class PlanOptions(TypedDict, total=False):
    """Keyword arguments that say what a plan does."""

    rules: Iterable[Any] | None
    """Rule objects of transformers that rename and merge tensors; ``automodel_conv.recipes`` has some. None: the
    model's own rules. ``[]``: keep the checkpoint's names."""

    layout: LayoutName | None
    """Layout of the routed experts in memory: "transformers", "nemo", "gpt_oss" or "vllm"; or, as vLLM's kernels read
    them, "vllm_w31", "vllm_trtllm", "vllm_trtllm_padded" or "vllm_deepep". None: the layout of the model's own
    parameters. For ``load_model`` it states the layout that the model's experts already have, if the modules are not
    transformers' own."""

    source_layout: LayoutInFiles | None
    """Layout of grouped experts in the checkpoint: a layout, or "per_expert", the form in which the type is published.
    None: the layout that the files state (those written by this package do), or else the model's. It is an error if the
    model's shapes contradict that layout or do not determine it."""

    key_mapping: Mapping[str, str] | None
    """``{pattern: replacement}``, applied to names before the rules, as in ``from_pretrained``. None: no renames."""

    dtype: torch.dtype | str | None
    """Dtype of the floating-point targets: a dtype of torch, its name ("bfloat16"), or "auto", as in
    ``from_pretrained``: the dtype that ``config.json`` states, or else the index, or else that of the first
    floating-point tensor by name. None: a parameter keeps its own dtype. On the meta device that is the dtype in which
    the model was built, float32 unless you chose another. Without a model, targets have the dtype of "auto". Three
    kinds of targets without a value differ. Parameters that transformers keeps in float32 are float32. All targets of
    one rule have the dtype of its first target. Tensors of quantized checkpoints that transformers does not cast keep
    the dtype in the file. Codes that are kept, and their scales, are never cast. If ``dtype`` is given, ``load_model``
    replaces parameters of another floating-point dtype."""

    dequantize: bool
    """Decode the tensors that ``quantization_config`` in ``config.json`` describes as quantized, and round each element
    once, to the dtype of its target. False: load codes and scales as tensors of their own. With ``rules``, rules and
    ``layout`` move scales with their codes, as in ``convert_checkpoint``. A model must have parameters for both, as
    models of transformers have with an ``hf_quantizer``. Default: True."""


class CompileOptions(PlanOptions, SourceOptions, total=False):
    """Keyword arguments of ``compile_plan``."""


class ReadOptions(SourceOptions, total=False):
    """Keyword arguments of all functions that load."""

    threads: int | None
    """Number of reader threads, for all devices together. None: chosen by the cores of the machine, which the ranks of
    this job that run on it share (``LOCAL_WORLD_SIZE``). A load to the host then adds threads while that makes it
    faster, as it does if threads wait for a network."""

    scratch_bytes: int | None
    """Bound of the host memory used in addition to the final tensors, in bytes, for all devices together. None: 64 MiB
    for the CPU, 16 MiB per reader thread of a CUDA device. Scratch for a CUDA device is pinned; torch rounds it up to a
    power of two and keeps it for the next load."""

    device_scratch_bytes: int | None
    """Bound of the memory used on each CUDA device in addition to the final tensors, in bytes. None: 256 MiB."""

    memory_budget: int | None
    """Bound of all memory used in addition to the final tensors, in bytes, on the host and all devices of this rank
    together. It lowers the defaults of ``scratch_bytes`` and ``device_scratch_bytes`` if necessary. Plans, which are
    small, are not counted. None: no bound."""

    huge_pages: bool | None
    """Whether new host memory has huge pages, in tensors of 4 MiB or more (2 MiB each; Linux). None: measure during the
    load which page size is faster on this machine: huge pages on most, small ones on virtual machines that return
    their free memory to the host."""

    progress: bool
    """Show a progress bar in bytes and GB/s. For files that are not on this machine it also shows the bytes received,
    the connections and the retries. Default: False."""


class LoadOptions(PlanOptions, ReadOptions, total=False):
    """Keyword arguments of ``load_state_dict`` and ``load_model``.

    All keys are optional. ``help(load_model)`` describes each of them. Annotate a dict with this class, so that a type
    checker checks options that several loads share:

    Example:
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from automodel_conv import LoadOptions, load_model, load_state_dict
        >>> options: LoadOptions = {"strict": False, "threads": 2}
        >>> model = nn.Linear(3, 2)
        >>> with TemporaryDirectory() as directory:
        ...     save_file({"weight": model.weight.detach()}, f"{directory}/model.safetensors")
        ...     tensors = load_state_dict(directory, model, **options)
        ...     report = load_model(model, directory, **options)
        >>> list(tensors), report.missing_keys
        (['weight'], ('bias',))
    """

    plan: CopyPlan | str | None
    """A plan from ``compile_plan``, or the text of its ``to_json()``. The load executes it and does not plan again. The
    checkpoint must have the tensors that the plan reads, with the same names, dtypes and shapes; with ``strict``, it
    must have exactly the tensors that the plan lists. The tensors may be in other files and at other offsets. All
    targets of the plan must fit the model, even if ``strict`` is False. The plan decides dtypes and layout, so
    ``rules``, ``layout``, ``source_layout``, ``key_mapping``, ``dtype`` and ``dequantize`` must be left out. Without a
    model, names and ties are those of the plan, and tied names come last. The plan always covers the whole model,
    even if parameters are DTensors. None: plan the load from the headers."""

    adapter: AdapterArgument | None
    """An adapter (LoRA) to merge while loading: the path or URL of its directory, or ``org/name`` on the Hub, in any
    form that ``convert_adapter`` reads; or a list of pairs of such a path and a weight. Its revision and folder are
    those that its URL states, as in ``hf://org/name@revision/folder``. Each weight ``W`` that it changes becomes
    ``W + scale * B @ A``, computed in float32 after ``W`` has the dtype of its target, and rounded to that dtype. The
    report lists these targets as ``adapted``. None: load the checkpoint as it is."""

    device: str | torch.device | None
    """The CPU or a CUDA device. ``load_state_dict`` creates all tensors on it, by default on the CPU. ``load_model``
    creates new parameters on it; None: on the device of the parameters that they replace, or on the CPU if those are on
    the meta device. Materialized parameters are filled where they are. Bytes for a CUDA device pass through pinned
    memory. Data that must be permuted or cast is copied on the device by Triton kernels, or by torch if Triton cannot
    run."""

    device_map: Mapping[str, str | int | torch.device] | None
    """Devices by names of modules or parameters, instead of ``device``, as accelerate writes them
    (``infer_auto_device_map``, ``model.hf_device_map``). The longest prefix of whole components of a tensor's name
    decides; "" covers the rest; integers are CUDA devices. All devices are filled at the same time. ``load_model``
    places new parameters and all buffers by the map. Materialized parameters must already be where the map says;
    materialized buffers are moved there after the load (``accelerate.init_empty_weights()`` leaves them on the CPU).
    The model is placed, but does not run on several devices until ``accelerate.dispatch_model(model, device_map)``."""

    strict: bool
    """Raise for targets that are missing, unexpected, mismatched or provided twice. False: load what fits, as
    transformers does (the first of two sources wins), and list the rest in the report. Default: True."""

    verify: bool
    """Compare all tensors with the checksums that ``save_checkpoint(checksums=True)`` wrote, before anything is loaded.
    This reads the files once more. Default: False."""

    broadcast: Broadcast
    """Read parts of a DTensor that several ranks hold only once: the first of these ranks reads them, and sends them to
    the others in place. ``"node"``: the first rank of each node reads them for its node, so that nodes send nothing to
    each other; ranks with one host name are on one node. False: each rank reads its own. Default: False."""

    memory_map: bool
    """Map new tensors on the CPU instead of reading them, if a file has exactly their bytes: contiguous, in the right
    dtype, at a multiple of the element size (Linux only). All other tensors are read; ``load_model`` reads into
    materialized parameters and buffers in place. A write to a mapped tensor changes a copy of the page and never the
    file. Processes that map one file share the pages that they do not write to. Do not change or truncate the file
    while such a tensor exists: a change may show in the tensor, and an access past the new end kills the process
    (SIGBUS). Removing or replacing the file is safe. See docs/performance.md. Default: False."""


class TraceOptions(ReadOptions, total=False):
    """Keyword arguments of ``load_with``.

    All keys are optional. ``help(load_with)`` describes each of them.

    Example:
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> from automodel_conv import TraceOptions, load_with
        >>> options: TraceOptions = {"calls": "dict", "threads": 2}
        >>> with TemporaryDirectory() as directory:
        ...     save_file({"a": torch.ones(2, 3)}, f"{directory}/model.safetensors")
        ...     tensors = load_with(lambda given: {"b": given["a"].t()}, directory, **options)
        >>> tensors["b"].shape
        torch.Size([3, 2])
    """

    calls: LoaderCalls
    """What the loading code is called with: an iterator of pairs of names and tensors, or a dict of tensors by name.
    Default: "pairs"."""

    device: str | torch.device | None
    """Device of new tensors. None: that of the tensors that they replace, or the CPU if those are on the meta device.
    Tensors with data are filled where they are."""

    trace_cache: str | os.PathLike[str] | None
    """Directory that keeps traces, so that a later load of the same checkpoint, targets and versions does not run the
    loading code again. It is created if necessary. None: keep none."""

    trace_key: str | None
    """Text for all that the loading code depends on besides its targets and the names, shapes and dtypes of the
    checkpoint: closures, attributes, parallel settings. Without it nothing is kept, because two loads that differ in
    these would share a trace. A trace that depends on values of the checkpoint is never kept."""


@dataclass(frozen=True)
class PlanSettings:
    """The values of ``PlanOptions``, with the defaults of those that the caller left out."""

    rules: Iterable[Any] | None = None
    layout: LayoutName | None = None
    source_layout: LayoutInFiles | None = None
    key_mapping: Mapping[str, str] | None = None
    dtype: torch.dtype | str | None = None
    dequantize: bool = True

    def given(self) -> Mapping[str, object]:
        """Return the plan options by name, with None for those left at their defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(PlanSettings)}
        return values | {"dequantize": None if self.dequantize else False}


@dataclass(frozen=True)
class CompileSettings(SourceSettings, PlanSettings):
    """The values of ``CompileOptions``, with the defaults of those that the caller left out."""


@dataclass(frozen=True)
class ReadSettings(SourceSettings):
    """The values of ``ReadOptions``, with the defaults of those that the caller left out."""

    threads: int | None = None
    scratch_bytes: int | None = None
    device_scratch_bytes: int | None = None
    memory_budget: int | None = None
    huge_pages: bool | None = None
    progress: bool = False

    @property
    def limits(self) -> Limits:
        """Threads and memory that the load itself may use."""
        return Limits(self.threads, self.scratch_bytes, self.device_scratch_bytes, self.huge_pages)

    @property
    def reader_threads(self) -> int:
        """Number of threads that read before the load itself."""
        return default_reader_threads(cores()) if self.threads is None else self.threads


@dataclass(frozen=True)
class LoadSettings(ReadSettings, PlanSettings):
    """The values of ``LoadOptions``, with the defaults of those that the caller left out."""

    plan: CopyPlan | str | None = None
    adapter: AdapterArgument | None = None
    device: str | torch.device | None = None
    device_map: Mapping[str, str | int | torch.device] | None = None
    strict: bool = True
    verify: bool = False
    broadcast: Broadcast = False
    memory_map: bool = False


@dataclass(frozen=True)
class TraceSettings(ReadSettings):
    """The values of ``TraceOptions``, with the defaults of those that the caller left out."""

    calls: LoaderCalls = "pairs"
    device: str | torch.device | None = None
    trace_cache: str | os.PathLike[str] | None = None
    trace_key: str | None = None
