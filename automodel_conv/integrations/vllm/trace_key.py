"""A digest of all that the ``load_weights`` of a vLLM model depends on besides names, shapes and dtypes."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import hashlib
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import transformers
import vllm
from torch import nn
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import parallel_state

from automodel_conv.loading_code.state import state_digest

_GROUPS = ("tp", "pp", "dp", "ep", "pcp", "dcp", "eplb")
_DIFFERENT_EACH_TIME = (
    "instance_id",
    "data_parallel_master_ip",
    "data_parallel_rpc_port",
    "data_parallel_master_port",
    "master_addr",
    "master_port",
    "_data_parallel_master_port_list",
    "_coord_store_port",
    "engine_id",
    "topk_indices_buffer",
    "static_forward_context",
)
"""Attributes of vLLM's objects that differ in each process, and that no loading code depends on.

``topk_indices_buffer`` is memory of sparse attention without values: ``torch.empty``. ``static_forward_context`` has
layers of all models of the process.
"""
_TOLD_BY_VERSION = ("torch", "transformers", "vllm")


def trace_key(model: nn.Module, model_config: ModelConfig, vllm_config: VllmConfig) -> str:
    """Return the key under which the trace of a model's ``load_weights`` is kept.

    It covers the versions, vLLM's settings and environment variables, the rank in each group, the source code of the
    classes of the model's parts and attributes, and its state: attributes of its modules and parameters, and of all
    that they refer to, such as maps of experts. Of packages of others it covers the source code of all modules.
    """
    parts_and_attributes = chain.from_iterable((part, *vars(part).values()) for part in model.modules())
    classes = {cls for one in parts_and_attributes for cls in type(one).__mro__}
    code = {name: _source_digest(name) for name in sorted(_modules({cls.__module__ for cls in classes}))}
    ranks = {name: _rank(name) for name in _GROUPS}
    settings = vllm_config, model_config, envs.compile_factors()
    parts = vllm.__version__, transformers.__version__, code, ranks, settings, model
    return state_digest(parts, skipped=_DIFFERENT_EACH_TIME)


def _modules(names: set[str]) -> set[str]:
    """Return names of modules, and the other imported ones of their packages that no version tells."""
    packages = {name.partition(".")[0] for name in names}.difference(_TOLD_BY_VERSION)
    return names.union(name for name in list(sys.modules) if name.partition(".")[0] in packages)


def _source_digest(module: str) -> str | None:
    """Return a digest of a module's file; None if it has none."""
    path = getattr(sys.modules.get(module), "__file__", None)
    try:
        return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


def _rank(name: str) -> Any:
    """Return this process's rank in a group, and the group's size; None if there is no such group."""
    group = getattr(parallel_state, f"_{name.upper()}", None)
    return None if group is None else (group.rank_in_group, group.world_size)
