"""Mixture-of-Experts checkpoints between the Hugging Face per-expert format and the grouped buffers models run on.

Importing this package imports only modules of Python. Each public name is imported on first use, and transformers and
triton are imported when a call needs them.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from automodel_conv import recipes as recipes  # a module: the others are imported by their own names
    from automodel_conv.adapters import AdapterReport, convert_adapter, merge_adapter
    from automodel_conv.compiling.options import LoadOptions, TraceOptions
    from automodel_conv.compiling.planned import compile_plan
    from automodel_conv.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        get_combined_key_mapping,
        get_model_conversion_mapping,
        is_transformers_conversion_available,
        requires_tensor_merging,
    )
    from automodel_conv.converting import convert_checkpoint
    from automodel_conv.errors import (
        CheckpointError,
        ConversionError,
        CoverageError,
        DestinationError,
        NameProblems,
        QuantizationError,
        RankError,
        ReadError,
        RefitError,
        UnsupportedError,
        VerificationError,
        WriteError,
    )
    from automodel_conv.execution.report import LoadReport
    from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
    from automodel_conv.files.source_options import SourceOptions
    from automodel_conv.in_memory import convert_state_dict, revert_state_dict
    from automodel_conv.integrations.transformers import accelerate_transformers, install, uninstall
    from automodel_conv.loading import load_model, load_state_dict
    from automodel_conv.planning.plan import CopyPlan
    from automodel_conv.published import published_tensors
    from automodel_conv.publishing.convert_report import ConvertReport
    from automodel_conv.refit import Refit
    from automodel_conv.refitting.costs import RefitForecast, RefitReport
    from automodel_conv.saving import SaveReport, save_checkpoint
    from automodel_conv.tracing import load_with, trace_loader
    from automodel_conv.verifying import verify_checkpoint

__version__ = "0.2.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # without a handler of the caller nothing is printed

_DEFINED_IN = {
    "automodel_conv.adapters": ("AdapterReport", "convert_adapter", "merge_adapter"),
    "automodel_conv.conversion_mapping": (
        "get_checkpoint_conversion_mapping",
        "get_combined_key_mapping",
        "get_model_conversion_mapping",
        "is_transformers_conversion_available",
        "requires_tensor_merging",
    ),
    "automodel_conv.compiling.options": ("LoadOptions", "TraceOptions"),
    "automodel_conv.compiling.planned": ("compile_plan",),
    "automodel_conv.converting": ("convert_checkpoint",),
    "automodel_conv.errors": (
        "CheckpointError",
        "ConversionError",
        "CoverageError",
        "DestinationError",
        "NameProblems",
        "QuantizationError",
        "RankError",
        "ReadError",
        "RefitError",
        "UnsupportedError",
        "VerificationError",
        "WriteError",
    ),
    "automodel_conv.execution.report": ("LoadReport",),
    "automodel_conv.files.checkpoint": ("Checkpoint", "open_checkpoint"),
    "automodel_conv.files.source_options": ("SourceOptions",),
    "automodel_conv.in_memory": ("convert_state_dict", "revert_state_dict"),
    "automodel_conv.integrations.transformers": ("accelerate_transformers", "install", "uninstall"),
    "automodel_conv.loading": ("load_model", "load_state_dict"),
    "automodel_conv.planning.plan": ("CopyPlan",),
    "automodel_conv.published": ("published_tensors",),
    "automodel_conv.publishing.convert_report": ("ConvertReport",),
    "automodel_conv.refit": ("Refit",),
    "automodel_conv.refitting.costs": ("RefitForecast", "RefitReport"),
    "automodel_conv.saving": ("SaveReport", "save_checkpoint"),
    "automodel_conv.tracing": ("load_with", "trace_loader"),
    "automodel_conv.verifying": ("verify_checkpoint",),
}
"""Public names by the module that defines them."""

__all__ = [
    "AdapterReport",
    "Checkpoint",
    "CheckpointError",
    "ConversionError",
    "ConvertReport",
    "CopyPlan",
    "CoverageError",
    "DestinationError",
    "LoadOptions",
    "LoadReport",
    "NameProblems",
    "QuantizationError",
    "RankError",
    "ReadError",
    "Refit",
    "RefitError",
    "RefitForecast",
    "RefitReport",
    "SaveReport",
    "SourceOptions",
    "TraceOptions",
    "UnsupportedError",
    "VerificationError",
    "WriteError",
    "accelerate_transformers",
    "compile_plan",
    "convert_adapter",
    "convert_checkpoint",
    "convert_state_dict",
    "get_checkpoint_conversion_mapping",
    "get_combined_key_mapping",
    "get_model_conversion_mapping",
    "install",
    "is_transformers_conversion_available",
    "load_model",
    "load_state_dict",
    "load_with",
    "merge_adapter",
    "open_checkpoint",
    "published_tensors",
    "requires_tensor_merging",
    "revert_state_dict",
    "save_checkpoint",
    "trace_loader",
    "uninstall",
    "verify_checkpoint",
]


if not TYPE_CHECKING:  # type checkers use the imports above, and report unknown names

    def __getattr__(name: str) -> object:
        """Import a public name, or a module of this package, on first use (PEP 562)."""
        home = next((module for module, names in _DEFINED_IN.items() if name in names), None)
        if home is not None:
            globals()[name] = getattr(import_module(home), name)
            return globals()[name]
        if not name.startswith("_"):
            try:
                return import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":  # the module exists, but an import in it failed
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(
            {*globals(), *__all__} - {"TYPE_CHECKING", "import_module", "logging", "_DEFINED_IN", "annotations"}
        )
