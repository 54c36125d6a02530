"""vLLM's classes with quantized layers, built and loaded on a CPU, where they cannot run.

vLLM chooses a kernel for each quantized layer when a model is built, and refuses a layer for which a machine has none.
Only this choice is replaced, by kernels of which vLLM has an emulation, and one compiled kernel: the layers, their
weights, and the code that loads and processes them are vLLM's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest

pytest.importorskip("vllm")

import torch
from torch import Tensor, nn
from vllm import _custom_ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.utils import replace
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers import rotary_embedding, utils
from vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe import Int4EmulationTritonExperts
from vllm.model_executor.layers.fused_moe.experts.nvfp4_emulation_moe import Nvfp4QuantizationEmulationTritonExperts
from vllm.model_executor.layers.fused_moe.experts.ocp_mx_emulation_moe import OCP_MXQuantizationEmulationTritonExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle import fp8, int_wna16, mxfp4
from vllm.model_executor.layers.quantization import auto_gptq
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import _has_online_quant
from vllm.model_executor.model_loader.reload import finalize_layerwise_processing
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.platforms import PlatformEnum
from vllm.utils.torch_utils import set_default_torch_dtype

from automodel_conv.execution.report import LoadReport
from automodel_conv.integrations.vllm import LOAD_FORMAT, loader, register
from automodel_conv.testing import assert_bytes_equal
from automodel_conv.tracing import load_with

_KERNELS = (
    (linear._POSSIBLE_INT8_KERNELS, linear.TritonInt8ScaledMMLinearKernel),
    (linear._POSSIBLE_KERNELS, linear.TritonW4A16LinearKernel),
    (linear._POSSIBLE_FP8_BLOCK_KERNELS, linear.BlockWiseTorchFP8ScaledMMLinearKernel),
    (linear._POSSIBLE_NVFP4_KERNELS, linear.EmulationNvFp4LinearKernel),
    (linear._POSSIBLE_MXFP4_KERNELS, linear.EmulationMxfp4LinearKernel),
    (linear._POSSIBLE_MXFP8_KERNELS, linear.EmulationMxfp8LinearKernel),
)
"""Linear layers: table of the kernels that vLLM chooses from, and the chosen one."""
_EXPERTS = (TritonExperts, Int4EmulationTritonExperts, Nvfp4QuantizationEmulationTritonExperts)
"""Experts: chosen kernels, as if the machine had what they need."""
_BACKENDS = (
    (int_wna16, "_get_priority_backends", int_wna16.WNA16MoEBackend.EMULATION),
    (mxfp4, "_get_priority_backends", mxfp4.Mxfp4MoeBackend.EMULATION),
    (mxfp4, "_get_priority_backends_for_gpt_oss", mxfp4.Mxfp4MoeBackend.EMULATION),
)
"""Experts: module and name of the function that tells what vLLM chooses from, and the chosen one."""


@contextmanager
def kernels_on_a_cpu() -> Iterator[None]:
    """Let vLLM choose kernels for quantized layers within a ``with`` statement."""
    choices = [patch.dict(possible, {PlatformEnum.CPU: [kernel]}) for possible, kernel in _KERNELS]
    for _, kernel in _KERNELS:
        choices.append(patch.object(kernel, "can_implement", lambda *_: (True, None)))
        choices.append(patch.object(kernel, "is_supported", lambda *_: (True, None), create=True))
    for experts in _EXPERTS:
        choices.append(patch.object(experts, "_supports_current_device", lambda: True))
        choices.append(patch.object(experts, "_supports_quant_scheme", lambda *_: True))
    for oracle, name, backend in _BACKENDS:
        choices.append(patch.object(oracle, name, lambda backend=backend: [backend]))
    choices += [
        patch.object(OCP_MXQuantizationEmulationTritonExperts, "is_supported_config", lambda *_: (True, None)),
        patch.object(fp8, "_get_priority_backends", _triton_first(fp8._get_priority_backends)),
        patch.object(linear, "MarlinNvFp4LinearKernel", linear.EmulationNvFp4LinearKernel),
        patch.object(auto_gptq, "verify_marlin_supported", lambda **_: None),
    ]
    absent = [  # layers that are not quantized, and MLA, would be packed by compiled kernels, too
        patch.object(utils, "check_cpu_sgl_kernel", lambda *_: False),
        patch.object(torch.cpu, "_is_amx_tile_supported", lambda: False),
        patch.object(torch.accelerator, "empty_cache", lambda: None),
        patch.object(_custom_ops, "scaled_fp8_quant", _quantized),
        torch.compiler.set_stance("force_eager"),
    ]
    with ExitStack() as stack:
        for replaced in choices + absent:
            stack.enter_context(replaced)
        yield


def _triton_first(priorities: Callable[..., list[fp8.Fp8MoeBackend]]) -> Callable[..., list[fp8.Fp8MoeBackend]]:
    def backends(*args: Any) -> list[fp8.Fp8MoeBackend]:
        return sorted(priorities(*args), key=lambda backend: backend != fp8.Fp8MoeBackend.TRITON)

    return backends


def _quantized(tensor: Tensor, scale: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    """Do in torch what a compiled kernel does: quantize a tensor to FP8, with one scale."""
    if scale is None:
        scale = tensor.abs().amax().float().reshape(1) / 448
    return (tensor.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def engine_config(directory: Path, **options: Any) -> VllmConfig:
    """Return vLLM's settings for a checkpoint."""
    defaults = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64}
    return EngineArgs(model=str(directory), **{**defaults, **options}).create_engine_config()


@contextmanager
def ranks(config: VllmConfig, rendezvous: Path, rank: int = 0, world: int = 1) -> Iterator[None]:
    """Have vLLM's groups, in which all ranks divide each layer, within a ``with`` statement."""
    if model_parallel_is_initialized():
        yield
        return
    with set_current_vllm_config(config):
        init_distributed_environment(world, rank, f"file://{rendezvous}", rank, "gloo")
        initialize_model_parallel(world)
    try:
        yield
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()


def built(config: VllmConfig) -> nn.Module:
    """Return vLLM's model; where it does not set new memory, each float is NaN, and each integer is the largest."""
    config.compilation_config.static_forward_context.clear()
    rotary_embedding._ROPE_DICT.clear()  # models of one process share them
    torch.use_deterministic_algorithms(True)
    try:
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            return initialize_model(vllm_config=config, model_config=config.model_config)
    finally:
        torch.use_deterministic_algorithms(False)


def load_by_default(config: VllmConfig, model: nn.Module) -> None:
    """Load a model by vLLM's default loader."""
    with set_current_vllm_config(config):
        get_model_loader(config.load_config).load_weights(model, config.model_config)


class Planned(NamedTuple):
    """Report of a load by a plan, and the number of times that the loading code ran."""

    report: LoadReport
    runs: int


def load_by_plan(config: VllmConfig, model: nn.Module, trace_cache: Path | None = None) -> Planned | None:
    """Load a model by the load format of this package; return None if that leaves it to vLLM's default loader."""
    register()
    planned: list[Planned] = []

    def recorded(load: Callable[[Any], Any], *args: Any, **options: Any) -> LoadReport:
        runs: list[None] = []

        def counted(pairs: Any) -> Any:
            runs.append(None)
            return load(pairs)

        report = load_with(counted, *args, **options)
        assert isinstance(report, LoadReport)
        planned.append(Planned(report, len(runs)))
        return report

    extra = {"trace_cache": None if trace_cache is None else str(trace_cache)}
    settings = replace(config.load_config, load_format=LOAD_FORMAT, model_loader_extra_config=extra)
    with set_current_vllm_config(config), patch.object(loader, "load_with", recorded):
        get_model_loader(settings).load_weights(model, config.model_config)
    return planned[0] if planned else None


def process(config: VllmConfig, model: nn.Module) -> None:
    """Let vLLM process the weights of a loaded model, as it does before it runs the model."""
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
        if _has_online_quant(model):
            finalize_layerwise_processing(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, under each name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Assert that two models have the same tensors, bit for bit, and the same attributes."""
    tensors = tensors_of(actual), tensors_of(expected)
    assert [*tensors[0]] == [*tensors[1]], {*tensors[0]} ^ {*tensors[1]}
    for name, tensor in tensors[0].items():
        try:
            assert_bytes_equal(tensor, tensors[1][name], strides=True)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    attributes = _attributes(actual), _attributes(expected)
    differ = [name for name in attributes[1] if attributes[0].get(name) != attributes[1][name]]
    if differ or len(attributes[0]) != len(attributes[1]):
        raise AssertionError({name: [each.get(name) for each in attributes] for name in differ} or attributes)


_OF_MODULES = ("_parameters", "_buffers", "_modules")


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Return the attributes of all parts and tensors, in a form that can be compared."""
    parts = {
        f"{name}.{key}": _simple(value)
        for name, part in model.named_modules()
        for key, value in vars(part).items()
        if key not in _OF_MODULES
    }
    tensors = {
        name: (type(tensor).__name__, {key: _simple(value) for key, value in vars(tensor).items()})
        for name, tensor in tensors_of(model).items()
    }
    return parts | tensors


def _simple(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), tuple(value.stride()), value.dtype, repr(value.detach().flatten().tolist())
    if isinstance(value, Mapping):
        return {str(key): _simple(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(_simple, value)]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_simple(one)) for one in value)
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"
