"""Loads of vLLM's own model class, in a process of their own or in one for each rank.

``python -m benchmarks.vllm`` starts the processes.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from automodel_conv import tracing
from automodel_conv.execution.report import LoadReport
from benchmarks import measure, memory
from benchmarks.peers import cache
from benchmarks.peers.roofs import ROOFS

RANKS = 2
PARALLEL = ("TP", "EP", "EP, EPLB")
"""How ranks divide the model. EPLB: with redundant experts, one for each rank."""


class Method(NamedTuple):
    """A load format of vLLM with its settings."""

    title: str
    package: str
    """The distribution that the reported version belongs to."""
    load_format: str
    threads: str | None = None
    """The setting of ``model_loader_extra_config`` for the number of threads."""
    extra: Mapping[str, Any] = {}
    """Other settings of it."""
    huge_pages: bool = False
    """Whether torch requests huge pages for parameters. Its default is not to."""


METHODS: Mapping[str, Method] = {
    "auto": Method("vLLM's default loader", "vllm", "auto"),
    "auto-huge": Method("vLLM's default loader, huge pages", "vllm", "auto", huge_pages=True),
    "auto-threads": Method(
        "vLLM's default loader, a thread for each file",
        "vllm",
        "auto",
        "num_threads",
        {"enable_multithread_load": True},
    ),
    "runai": Method("Run:ai Model Streamer", "runai-model-streamer", "runai_streamer", "concurrency"),
    "ours-traced": Method(
        "automodel_conv, no kept trace", "automodel_conv", "automodel_conv", "threads", {"trace_cache": None}
    ),
    "ours": Method("automodel_conv", "automodel_conv", "automodel_conv", "threads"),
}


@dataclass(frozen=True)
class Job:
    """The load of one process, or of one for each rank.

    Args:
        method: one of ``METHODS`` or of ``ROOFS``.
        directory: the checkpoint.
        traces: the directory in which this package keeps traces.
        threads: number of threads, for methods that have such a setting.
        cache: state of the page cache, "warm" or "cold".
        memory: state of free memory, one of ``memory.MEMORY``.
        parallel: one of ``PARALLEL``, or None for one process.
        with_digest: whether the result has a digest of all parameters.
    """

    method: str
    directory: str
    traces: str
    threads: int
    cache: str = "warm"
    memory: str = memory.READY
    parallel: str | None = None
    with_digest: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def variables(job: Job) -> dict[str, str]:
    """Return the environment variables of a process."""
    result = {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if job.method in METHODS and METHODS[job.method].huge_pages:
        result["THP_MEM_ALLOC_ENABLE"] = "1"
    if job.cache == "warm":  # the streamer bypasses the page cache by default, which is slower if it is warm
        result["RUNAI_STREAMER_FS_STRATEGY"] = "sync_buffered"
    # A package that is installed has its modules compiled.
    return result | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": os.path.join(job.traces, "compiled")}


def work(job: Job) -> dict[str, Any]:
    """Perform a load in this process.

    ``beside_seconds`` of the result are the seconds that only the measurement needs.
    """
    with ExitStack() as loading:
        loaded = None if job.method in ROOFS else loading.enter_context(Loading(job))
        load = loaded.load if loaded else ROOFS[job.method].prepare(job.directory, job.threads)
        start = time.perf_counter()
        if job.cache == "cold":
            cache.evict(job.directory)
        else:
            measure.read_through(job.directory)
        memory.prepare(job.memory, measure.file_bytes(job.directory))
        with measure.Measured() as measured:
            load()
        result = measured.result | (loaded.about() if loaded else {})
        beside_seconds = time.perf_counter() - start - result["seconds"]
    return result | {"beside_seconds": beside_seconds}


def work_in_rank(job: Job) -> dict[str, Any]:
    """Perform a load in the process of a rank, which is in the group of all ranks already."""
    with Loading(job) as loading:
        dist.barrier()
        with measure.Measured() as measured:
            loading.load()
        dist.barrier()
        return measured.result | loading.about()


class Loading:
    """A model of vLLM's own class, built as vLLM builds it, and the loader that fills it: ``with Loading(job) as ...``.

    vLLM's settings are the current ones in the block.
    """

    def __init__(self, job: Job):
        self._job = job
        self._method = METHODS[job.method]
        self._reports: list[LoadReport] = []
        self._traces = 0
        self._stack = ExitStack()

    def __enter__(self) -> Loading:
        from vllm.config import set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        config = self._config()
        rank, ranks = (0, 1) if self._job.parallel is None else (dist.get_rank(), RANKS)
        self._stack.enter_context(set_current_vllm_config(config))
        init_distributed_environment(ranks, rank, "tcp://127.0.0.1:0", rank, "gloo")
        initialize_model_parallel(ranks, 1)
        with set_default_torch_dtype(torch.bfloat16):
            self.model: nn.Module = initialize_model(vllm_config=config, model_config=config.model_config)
        loader = get_model_loader(config.load_config)
        self.load: Callable[[], None] = lambda: loader.load_weights(self.model, config.model_config)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def about(self) -> dict[str, Any]:
        """Return the bytes of the model, the digest if wanted, and what this package reports.

        Raises:
            RuntimeError: this package did not load as the method states.
        """
        job, parameters = self._job, {name: p.data for name, p in self.model.named_parameters()}
        result: dict[str, Any] = {
            "owned_bytes": sum(parameter.nbytes for parameter in parameters.values()),
            "digest": measure.digest(parameters) if job.with_digest else None,
        }
        if self._method.load_format == "automodel_conv":
            [report] = self._reports
            if report.computed:
                raise RuntimeError(f"vLLM's own code computed {list(report.computed)}")
            result |= {"counted_bytes": report.bytes_read, "phases": dict(report.seconds), "traces": self._traces}
        return result

    def _config(self) -> Any:
        """Return vLLM's settings."""
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins

        from automodel_conv.integrations import vllm as ours
        from automodel_conv.integrations.vllm import loader

        load_general_plugins()
        ours.register()
        load_with, traced = loader.load_with, tracing.traced

        def reporting(*args: Any, **kwargs: Any) -> Any:
            report: Any = load_with(*args, **kwargs)
            self._reports.append(report)
            return report

        def counting(*args: Any, **kwargs: Any) -> Any:
            self._traces += 1
            return traced(*args, **kwargs)

        self._stack.enter_context(mock.patch.object(loader, "load_with", reporting))
        self._stack.enter_context(mock.patch.object(tracing, "traced", counting))
        job, method = self._job, self._method
        logging.disable(logging.WARNING)
        extra = {"trace_cache": job.traces} if method.load_format == "automodel_conv" else {}
        config = EngineArgs(
            model=job.directory,
            load_format=method.load_format,
            model_loader_extra_config={
                **extra,
                **method.extra,
                **({method.threads: job.threads} if method.threads else {}),
            },
            use_tqdm_on_load=False,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=64,
            tensor_parallel_size=1 if job.parallel is None else RANKS,
            enable_expert_parallel=job.parallel not in (None, "TP"),
        ).create_engine_config()
        if job.parallel == "EP, EPLB":  # the engine refuses it on a CPU; its model classes do not
            config.parallel_config.enable_eplb = True
            config.parallel_config.eplb_config.num_redundant_experts = RANKS
        return config
