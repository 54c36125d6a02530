"""A hook that plans and executes the tensor conversions of transformers' own ``from_pretrained``.

transformers opens a checkpoint's files and passes lazy slices to ``convert_and_load_state_dict_in_model``. This
function handles dtypes, placement, offloading, quantization, sharding and the loading report. With the hook it runs
twice: first on the converted tensors, whole and under their final names, and then on all other tensors. The second call
handles tensors that cannot be lowered (see ``whole_conversions``), are quantized or sharded while they are loaded, or
are offloaded to disk. It is the unchanged code of transformers. If it would cast quantized codes to values without
their scales, the load raises an error instead (see ``codes``).

An index determines which file a tensor is read from, as everywhere in this package. Without the hook, transformers
loads all tensors in all files that the index names. Files that it reads whole (``disable_mmap=True``) are left to it.

transformers itself maps tensors that it does not convert, cast or move to a device: safetensors' slices are views of a
private mapping of the file. With ``memory_map``, tensors that are converted by plan are mapped too if the file stores
them in the order of the parameter. Source: transformers 5.24.0, ``_materialize_copy`` in ``core_model_loading.py``;
safetensors 0.8.0, ``open`` in ``bindings/python/src/lib.rs``.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from automodel_conv.errors import UnsupportedError, count_of, message
from automodel_conv.integrations.hooked_files import SafeOpen, wrap_index_reader
from automodel_conv.integrations.hooked_load import HookedLoad, wrap_converter
from automodel_conv.integrations.hooked_plan import ALL
from automodel_conv.upstream.registry import transformers_available

_LOG = logging.getLogger(__name__)

_CONVERT = "convert_and_load_state_dict_in_model"
_LIST = "get_checkpoint_shard_files"
# The modules that open files and convert their tensors; the second since transformers 5.17.
_MODULES = ("transformers.modeling_utils", "transformers.modeling_layers")


@dataclass(repr=False)
class Acceleration:
    """The record of the loads that ran under the hook, as ``install`` and ``accelerate_transformers`` return it."""

    loads: list[HookedLoad] = field(default_factory=list)
    """Report of each load, in order. The list grows until the hook is uninstalled, so a process that keeps loading
    models should clear it."""

    def __repr__(self) -> str:
        return f"<Acceleration: {count_of(len(self.loads), 'load')}; print() shows them>"

    def __str__(self) -> str:
        return "\n".join(map(str, self.loads)) or "no load yet"


def install(memory_map: bool = False) -> Acceleration:
    """Make every ``from_pretrained`` of this process convert its tensors by plan, until ``uninstall``.

    A load raises QuantizationError if transformers would cast quantized codes without their scales. A second call
    changes only ``memory_map``, and returns the same object.

    Args:
        memory_map: map converted parameters on the CPU instead of reading them, as ``load_model`` does, if their
            sources are stored in a file one after the other in the order of the parameter. transformers maps tensors
            that it does not convert in any case.

    Returns:
        The record of all loads from now on. ``print`` shows what each load converted by plan, and why not the rest.

    Raises:
        UnsupportedError: transformers is missing, or its loader is not supported.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> sizes = {"num_hidden_layers": 1, "num_experts": 2, "hidden_size": 64, "moe_intermediate_size": 8}
        >>> model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=9, **sizes))
        >>> record = install()
        >>> with TemporaryDirectory() as directory:
        ...     model.save_pretrained(directory)
        ...     loaded = Qwen3MoeForCausalLM.from_pretrained(directory)
        >>> uninstall()
        >>> [load.model for load in record.loads]
        ['Qwen3MoeForCausalLM']
        >>> sorted(record.loads[0].lowered)
        ['model.layers.0.mlp.experts.down_proj', 'model.layers.0.mlp.experts.gate_up_proj']
    """
    with _HOOK.lock:
        acceleration = _HOOK.put()
        _HOOK.kept, _HOOK.kept_maps = True, memory_map
        return acceleration


def uninstall() -> None:
    """Restore the functions of transformers; do nothing if they are not replaced.

    A load that has already begun still runs under the hook. An open block of ``accelerate_transformers`` no longer has
    an effect.

    Example:
        >>> record = install()
        >>> uninstall()
        >>> uninstall()  # nothing is left to restore
    """
    with _HOOK.lock:
        _HOOK.kept, _HOOK.kept_maps, _HOOK.blocks, _HOOK.mapping_blocks = False, False, 0, 0
        _HOOK.remove()


@contextmanager
def accelerate_transformers(memory_map: bool = False) -> Iterator[Acceleration]:
    """Make ``from_pretrained`` convert its tensors by plan within a ``with`` block.

    Blocks may be nested, and several threads may open them at the same time. The whole process is affected: loads of
    other threads are planned too while any block is open, and mapped while any open block has ``memory_map``. A load
    raises QuantizationError if transformers would cast quantized codes without their scales.

    Args:
        memory_map: map converted parameters on the CPU instead of reading them, if their sources are stored in a file
            one after the other in the order of the parameter; see ``install``.

    Yields:
        The record of all loads in the block. ``print`` shows what each load converted by plan, and why not the rest.

    Raises:
        UnsupportedError: transformers is missing, or its loader is not supported.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> sizes = {"num_hidden_layers": 1, "num_experts": 2, "hidden_size": 64, "moe_intermediate_size": 8}
        >>> model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=9, **sizes))
        >>> with TemporaryDirectory() as directory, accelerate_transformers() as record:
        ...     model.save_pretrained(directory)
        ...     loaded = Qwen3MoeForCausalLM.from_pretrained(directory)
        >>> print(record)
        Qwen3MoeForCausalLM: 2 converted by plan, 0 by transformers; all other tensors need no conversion
    """
    with _HOOK.lock:
        acceleration = _HOOK.put()
        _HOOK.blocks += 1
        _HOOK.mapping_blocks += memory_map
    try:
        yield acceleration
    finally:
        with _HOOK.lock:
            if _HOOK.acceleration is acceleration:  # unless uninstall() was called meanwhile
                _HOOK.blocks -= 1
                _HOOK.mapping_blocks -= memory_map
                if not _HOOK.blocks and not _HOOK.kept:
                    _HOOK.remove()


class _Hook:
    """The replaced functions of transformers, the requests for them, and the reports of loads."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.kept = False  # requested by install()
        self.kept_maps = False  # install() requested memory_map
        self.blocks = 0  # number of open blocks
        self.mapping_blocks = 0  # number of open blocks that requested memory_map
        self.acceleration: Acceleration | None = None
        self._replaced: list[tuple[ModuleType, str, Any, Any]] = []

    @property
    def maps(self) -> bool:
        """Whether ``install`` or an open block has requested ``memory_map``."""
        return self.kept_maps or self.mapping_blocks > 0

    def put(self) -> Acceleration:
        """Replace the functions of transformers, unless they are replaced already."""
        if self.acceleration is None:
            acceleration = Acceleration()

            def is_on() -> bool:
                return self.acceleration is acceleration

            def done(load: HookedLoad) -> None:
                left = "all" if ALL in load.left else len(load.left)
                text = "from_pretrained of %s: %d targets converted by plan, %s by transformers"
                _LOG.info(text, load.model, len(load.lowered), left)
                acceleration.loads.append(load)

            wraps: dict[str, Callable[[Any], Any]] = {
                _CONVERT: lambda convert: wrap_converter(convert, is_on, lambda: self.maps, done),
                "safe_open": lambda safe_open: SafeOpen(safe_open, is_on),
                _LIST: lambda list_files: wrap_index_reader(list_files, is_on),
            }
            replacements = [
                (module, name, function, wrap(function))
                for module in _loaders()
                for name, wrap in wraps.items()
                if (function := getattr(module, name, None)) is not None
            ]
            for module, name, _, replacement in replacements:
                setattr(module, name, replacement)
            self._replaced, self.acceleration = replacements, acceleration
        return self.acceleration

    def remove(self) -> None:
        """Restore the functions of transformers."""
        for module, name, function, replacement in self._replaced:
            if getattr(module, name) is replacement:  # unless other code has replaced it since
                setattr(module, name, function)
        self._replaced, self.acceleration = [], None


_HOOK = _Hook()


def _loaders() -> list[ModuleType]:
    """Return the modules of transformers in which to replace functions.

    Raises:
        UnsupportedError: transformers is missing, or its loader is not supported.
    """
    if not transformers_available():
        raise UnsupportedError(message("transformers 5.1 or newer is not installed", do="pip install transformers"))
    import transformers

    modules = [importlib.import_module(name) for name in _MODULES]
    modules = [module for module in modules if hasattr(module, _CONVERT) and hasattr(module, "safe_open")]
    config = getattr(modules[0], "LoadStateDictConfig", None) if modules else None
    known = "dtype_plan" in getattr(config, "__dataclass_fields__", ())  # not in 5.0
    if transformers.__version__.split(".")[0] != "5" or not known:
        raise UnsupportedError(
            message(
                "this version of transformers loads checkpoints in an unsupported way",
                expected="transformers 5.1 or newer, and older than 6",
                found=transformers.__version__,
                do="use load_model(), which needs no hook",
            )
        )
    return modules
