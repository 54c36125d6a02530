"""vLLM's engine on a CPU: its config for a directory, its models, both loads of them, and what these change.

Models are built and loaded, and never run. ``every_platform`` lets those be built that need a GPU only to run.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import copy
import importlib.machinery
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

pytest.importorskip("vllm")

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_torchvision_available
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config import parallel as parallel_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.torch_utils import set_default_torch_dtype

from automodel_conv.execution.report import LoadReport
from automodel_conv.integrations.vllm import LOAD_FORMAT
from automodel_conv.integrations.vllm.loader import ModelLoader
from automodel_conv.testing import POISON, assert_bytes_equal

# vLLM's model files import these to run models, or to prepare images.
_STUBS = (
    *("torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.functional"),
    *("torchvision.transforms.v2", "torchvision.transforms.v2.functional"),
    *("cutlass", "cutlass.base_dsl", "cutlass.base_dsl.arch", "cutlass.cutlass_dsl", "cutlass.utils"),
    *("cutlass._mlir", "cutlass._mlir.dialects", "cutlass.cute", "cutlass.cute.nvgpu", "cutlass.cute.runtime"),
    *("cuda", "cuda.bindings", "cuda.bindings.driver"),
)
_OPS = ("gelu_new", "gelu_fast", "gelu_quick")


class Loaded(NamedTuple):
    """A loaded model, what the load changed of its attributes, and how often ``load_weights`` ran."""

    model: nn.Module
    changes: dict[str, Any]
    runs: int
    report: LoadReport | None


def engine_config(directory: Path, **options: Any) -> VllmConfig:
    """Return the config of vLLM's engine for a checkpoint without a tokenizer."""
    defaults = {"skip_tokenizer_init": True, "dtype": "bfloat16", "enforce_eager": True, "max_model_len": 64}
    return EngineArgs(model=str(directory), **defaults | options).create_engine_config()


def join(config: VllmConfig, rank: int = 0, rendezvous: str | None = None) -> None:
    """Start the process groups of a config, once per process."""
    parallel = config.parallel_config
    address = f"file://{rendezvous or tempfile.mkdtemp() + '/rendezvous'}"
    with set_current_vllm_config(config):
        init_distributed_environment(parallel.world_size, rank, address, rank, "gloo")
        ensure_model_parallel_initialized(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)


def loaded_by_vllm(config: VllmConfig) -> Loaded:
    """Build a model, poison its parameters and load it with vLLM's default loader."""
    return _loaded(config, get_model_loader(config.load_config).load_weights)


def loaded_here(config: VllmConfig, traces: Path) -> Loaded:
    """Do the same with the loader of this package, which keeps its traces in a directory."""
    extra = {"trace_cache": str(traces)}
    loader = ModelLoader(LoadConfig(load_format=LOAD_FORMAT, model_loader_extra_config=extra, use_tqdm_on_load=False))
    # Its public method would call vLLM's default loader for what is not supported.
    return _loaded(config, loader._load)


def _loaded(config: VllmConfig, load: Callable[[nn.Module, ModelConfig], Any]) -> Loaded:
    # A config collects what models are built with it, so each model has its own.
    own = copy.deepcopy(config)
    with set_current_vllm_config(own):
        with set_default_torch_dtype(own.model_config.dtype):
            model = initialize_model(vllm_config=own, model_config=own.model_config)
        for parameter in model.parameters():
            storage = parameter.detach().untyped_storage()
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(POISON)
        before = attributes(model)
        counted = mock.patch.object(type(model), "load_weights", autospec=True, side_effect=type(model).load_weights)
        with counted as load_weights:
            report = load(model, own.model_config)
    return Loaded(model, _changes(before, attributes(model)), load_weights.call_count, report)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a model under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def not_written(model: nn.Module) -> list[str]:
    """Return the parameters that a load has left as they were."""
    storages = {name: parameter.detach().untyped_storage() for name, parameter in model.named_parameters()}
    raw = {name: torch.empty(0, dtype=torch.uint8).set_(storage) for name, storage in storages.items()}
    return [name for name, memory in raw.items() if memory.numel() and bool((memory == POISON).all())]


def assert_same_models(actual: Loaded, expected: Loaded) -> None:
    """Check that both have the same tensors, in bytes, shape, dtype, strides and class, and were changed alike."""
    left, right = tensors(actual.model), tensors(expected.model)
    assert list(left) == list(right)
    for name, tensor in right.items():
        try:
            assert_bytes_equal(left[name], tensor, strides=True)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        assert type(left[name]) is type(tensor), name
        assert left[name].requires_grad == tensor.requires_grad, name
    assert _shared(left) == _shared(right)
    assert actual.changes == expected.changes


def _shared(named: dict[str, Tensor]) -> list[list[str]]:
    """Return the names of tensors that share memory."""
    by_storage: dict[int, list[str]] = {}
    for name, tensor in named.items():
        if tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return [names for names in by_storage.values() if len(names) > 1]


def attributes(model: nn.Module) -> dict[str, Any]:
    """Return what modules, parameters and buffers have as attributes, by name, in comparable form."""
    return {
        f"{name}: {key}": _comparable(value)
        for name, owner in [*model.named_modules(remove_duplicate=False), *tensors(model).items()]
        for key, value in vars(owner).items()
        if key not in ("_parameters", "_buffers", "_modules")
    }


def _changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    absent = object()
    changed = {name: value for name, value in after.items() if before.get(name, absent) != value}
    return changed | dict.fromkeys(before.keys() - after.keys(), "removed")


def _comparable(value: Any, depth: int = 4) -> Any:
    if isinstance(value, int | float | str | bytes | None | torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        plain = value.detach().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.device.type == "cpu" else b""
        return type(value).__name__, list(value.shape), value.dtype, value.device, data
    if isinstance(value, set | frozenset):
        return sorted(repr(_comparable(item, depth - 1)) for item in value)
    if depth and isinstance(value, list | tuple):
        return [type(value).__name__, *(_comparable(item, depth - 1) for item in value)]
    if depth and isinstance(value, dict):
        return {repr(_comparable(key, depth - 1)): _comparable(item, depth - 1) for key, item in value.items()}
    return type(value).__name__


class _EveryPlatform:
    """The platform of this process, if it had the kernels of a GPU."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def is_cuda_alike(self) -> bool:
        return True


@contextlib.contextmanager
def every_platform() -> Iterator[None]:
    """Let models be built that only a GPU can run.

    Replaced are checks for kernels, streams, and modules that are imported to run a model. Modules and operations that
    are missing stay replaced afterwards, because models keep them.
    """
    attention, mla = CpuPlatform.get_attn_backend_cls, MLACommonImpl.__init__

    def any_attention(selected: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        return attention(selected, attn_selector_config._replace(use_sparse=False), num_heads)

    def any_mla(self: Any, *args: Any, topk_indices_buffer: Any = None, index_group_builder: Any = None, **kw: Any):
        mla(self, *args, **kw)

    if not is_torchvision_available():
        for name in _STUBS:
            spec = importlib.machinery.ModuleSpec(name, None)
            sys.modules.setdefault(name, mock.MagicMock(__spec__=spec, __path__=[]))
    for name in _OPS:
        if not hasattr(torch.ops._C, name):
            setattr(torch.ops._C, name, None)
    lazy = registry._LazyRegisteredModel
    with (
        mock.patch.object(CPUUnquantizedExperts, "is_supported_config", staticmethod(lambda *_: (True, None))),
        mock.patch.object(CpuPlatform, "get_attn_backend_cls", staticmethod(any_attention)),
        mock.patch.object(MLACommonImpl, "__init__", any_mla),
        mock.patch.object(moe_config, "current_platform", _EveryPlatform(moe_config.current_platform)),
        mock.patch.object(parallel_config, "current_platform", _EveryPlatform(parallel_config.current_platform)),
        mock.patch.object(torch.cuda, "Event", mock.MagicMock),
        mock.patch.object(torch.cuda, "Stream", mock.MagicMock),
        # Each class would be inspected in a process of its own, once, and kept in the user's cache.
        mock.patch.object(registry, "_run_in_subprocess", lambda function: function()),
        mock.patch.object(lazy, "_load_modelinfo_from_cache", return_value=None),
        mock.patch.object(lazy, "_save_modelinfo_to_cache"),
    ):
        yield
