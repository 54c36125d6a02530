"""The class that vLLM calls to load a model.

Source of what it does besides the weights (choice of files, prefixes of secondary weights, the check for parameters
without weights): vllm 0.33.0, ``model_executor/model_loader/default_loader.py``.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace as replace_settings
from typing import Any

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.config import LoadConfig, ModelConfig, get_current_vllm_config_or_none
from vllm.config.utils import replace
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader, _has_online_quant
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import _natural_sort_key
from vllm.tracing import instrument

from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.execution.report import LoadReport
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, joined, open_files, open_source
from automodel_conv.files.located import may_be_repository
from automodel_conv.files.remote.urls import is_url
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.integrations.vllm.trace_key import trace_key
from automodel_conv.tracing import load_with

logger = init_logger("vllm.automodel_conv")  # vLLM shows the logs of its own name only

_SIZES = ("threads", "scratch_bytes", "device_scratch_bytes", "memory_budget")
_OWN_OPTIONS = (*_SIZES, "huge_pages", "trace_cache")
_SOURCE_OPTIONS = ("weights", "storage_options", "node_cache")
_DEFAULT_OPTIONS = ("enable_weights_track",)


class ModelLoader(BaseModelLoader):
    """Loads the weights of vLLM's models by plans traced from their own ``load_weights``.

    ``model_loader_extra_config`` may have the read options of ``automodel_conv.load_with`` (``threads``,
    ``scratch_bytes``, ``device_scratch_bytes``, ``memory_budget``, ``huge_pages``); ``trace_cache``, a directory that
    keeps traces, or null to keep none; and ``enable_weights_track`` of vLLM's default loader. ``weights`` is the path
    or URL of the weights if it is not that of the model, such as ``s3://bucket/folder`` beside a local directory with
    the config and the tokenizer; ``storage_options`` and ``node_cache`` are as in ``automodel_conv.SourceOptions``.

    Files of a repository that the Hub's cache lacks are read by range, and not downloaded.

    Args:
        load_config: vLLM's settings of the load.

    Raises:
        ValueError: ``model_loader_extra_config`` has other keys.
    """

    def __init__(self, load_config: LoadConfig):
        super().__init__(load_config)
        extra = _checked(load_config)
        self._options = {name: extra[name] for name in _OWN_OPTIONS if name in extra}
        self._weights = extra.get("weights")
        self._settings = SourceSettings(
            cache_dir=load_config.download_dir,
            storage_options=extra.get("storage_options"),
            node_cache=extra.get("node_cache"),
        )
        own = {name: extra[name] for name in _DEFAULT_OPTIONS if name in extra}
        self._default = DefaultModelLoader(replace(load_config, load_format="auto", model_loader_extra_config=own))

    def download_model(self, model_config: ModelConfig) -> None:
        """Download the files of a model."""
        self._default.download_model(model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of the checkpoint by name; vLLM reloads weights by them."""
        return self._default.get_all_weights(model_config, model)

    @instrument(span_name="Load weights")
    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill the parameters of a model."""
        start = time.perf_counter()
        try:
            _refuse_unplanned(model, model_config)
            report = self._load(model, model_config)
        except UnsupportedError as error:
            logger.warning("vLLM's default loader loads %s: %s", model_config.model, error)
            self._default.load_weights(model, model_config)
            return
        if report.computed:
            logger.info(
                "Computed by vLLM's own code:\n%s", listing(f"{n}: {why}" for n, why in report.computed.items())
            )
        logger.info_once("Loading weights took %.2f seconds", time.perf_counter() - start)
        logger.debug("%s", report)

    def _load(self, model: nn.Module, model_config: ModelConfig) -> LoadReport:
        checkpoint = self._open(model, model_config)

        def load(weights: Iterator[tuple[str, Tensor]]) -> None:
            self._check_loaded(model, model_config, model.load_weights(weights))

        vllm_config = get_current_vllm_config_or_none()
        options = dict(self._options)
        if vllm_config is not None and "trace_cache" not in options:
            options["trace_cache"] = _own_cache()
        if vllm_config is not None and options["trace_cache"] is not None:
            options["trace_key"] = trace_key(model, model_config, vllm_config)
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        options["progress"] = self.load_config.use_tqdm_on_load and is_first
        report = load_with(load, checkpoint, model, **options)
        assert isinstance(report, LoadReport)
        return report

    def _open(self, model: nn.Module, model_config: ModelConfig) -> Checkpoint:
        """Open the files that the default loader reads, or those that ``weights`` names.

        Raises:
            UnsupportedError: they are pickled.
        """
        weights = self._weights or model_config.model_weights
        sources = [
            DefaultModelLoader.Source(
                weights or model_config.model,
                None if weights else model_config.revision,
                fall_back_to_pt=getattr(model, "fall_back_to_pt_during_load", True),
                allow_patterns_overrides=getattr(model, "allow_patterns_overrides", None),
            ),
            *getattr(model, "secondary_weights", ()),
        ]
        return joined([(self._open_one(source, model_config.hf_token), source.prefix) for source in sources])

    def _open_one(self, source: DefaultModelLoader.Source, token: str | bool | None) -> Checkpoint:
        path = os.path.expanduser(source.model_or_path)
        is_repository = not system.exists(path) and may_be_repository(path) and not envs.VLLM_USE_MODELSCOPE
        if is_url(path) or (is_repository and source.allow_patterns_overrides is None):
            own = replace_settings(
                self._settings, revision=source.revision, token=token, subfolder=source.subfolder or ""
            )
            return open_source(path, own.shared(path))
        _, paths, is_safetensors, _ = self._default._prepare_weights(
            path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if not is_safetensors:
            raise UnsupportedError(message("pickled weights are not planned", where=path))
        return open_files([(file, "") for file in sorted(paths, key=_natural_sort_key)])

    def _check_loaded(self, model: nn.Module, model_config: ModelConfig, loaded: set[str] | None) -> None:
        """Raise vLLM's own error if the loading code leaves out a parameter, when the default loader does."""
        is_quantized = model_config.quantization is not None
        is_checked = self._default.enable_weights_track
        if is_checked is None:
            is_checked = not is_quantized and loaded is not None
        if is_checked:
            self._default.track_weights_loading(model, loaded, quantized=is_quantized)


def _own_cache() -> str | None:
    """Return the directory for traces in vLLM's own cache; None if it cannot be written to: nobody asked for it."""
    directory = os.path.join(envs.VLLM_CACHE_ROOT, "automodel_conv")
    try:
        system.make_directory(directory)
        is_writable = os.access(directory, os.W_OK)
    except OSError:
        is_writable = False
    if is_writable:
        return directory
    logger.warning("No trace is kept: %s cannot be written to", directory)
    return None


def _checked(load_config: LoadConfig) -> dict[str, Any]:
    """Return the extra settings.

    Raises:
        ValueError: they are not a dict with known keys and values.
    """
    extra = load_config.model_loader_extra_config
    known = (*_OWN_OPTIONS, *_SOURCE_OPTIONS, *_DEFAULT_OPTIONS)
    if not isinstance(extra, dict):
        raise _wrong_extra("a JSON object", type(extra).__name__)
    if not extra.keys() <= {*known}:
        raise _wrong_extra(f"keys {', '.join(known)}", ", ".join(sorted(extra.keys() - {*known})))
    for name, value in extra.items():
        if value is None:
            continue
        if name in _SIZES and (type(value) is not int or value < 1):
            raise _wrong_extra(f"a positive integer as {name}", repr(value))
        if name in ("trace_cache", "node_cache") and not isinstance(value, str):
            raise _wrong_extra(f"a directory as {name}, or null", repr(value))
        if name == "weights" and not isinstance(value, str):
            raise _wrong_extra(f"a path or a URL as {name}, or null", repr(value))
        if name == "storage_options" and not isinstance(value, dict):
            raise _wrong_extra(f"a JSON object as {name}, or null", type(value).__name__)
        if name in ("huge_pages", *_DEFAULT_OPTIONS) and not isinstance(value, bool):
            raise _wrong_extra(f"true or false as {name}", repr(value))
    return extra


def _wrong_extra(expected: str, found: str) -> ValueError:
    what = "wrong extra config for the load format automodel_conv"
    return ValueError(message(what, expected=expected, found=found, do="correct --model-loader-extra-config"))


def _refuse_unplanned(model: nn.Module, model_config: ModelConfig) -> None:
    """Raise UnsupportedError for models whose weights vLLM transforms while it loads them."""
    if _has_online_quant(model):
        raise UnsupportedError(message("vLLM quantizes weights of this model while it loads them"))
    if model_config.quantization == "torchao":
        raise UnsupportedError(message("vLLM builds tensors of torchao while it loads them"))
