"""Mixture-of-Experts checkpoints between the Hugging Face per-expert format and the grouped buffers models run on.

Importing this package imports neither transformers nor triton.
"""

from automodel_conv.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_combined_key_mapping,
    get_model_conversion_mapping,
    is_transformers_conversion_available,
    requires_tensor_merging,
)
from automodel_conv.converting import ConvertReport, convert_checkpoint
from automodel_conv.errors import (
    CheckpointError,
    ConversionError,
    CoverageError,
    DestinationError,
    NameProblems,
    QuantizationError,
    RankError,
    ReadError,
    UnsupportedError,
    VerificationError,
    WriteError,
)
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.in_memory import convert_state_dict, revert_state_dict
from automodel_conv.integrations.transformers import accelerate_transformers, install, uninstall
from automodel_conv.loading import LoadReport, compile_plan, load_model, load_state_dict
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.saving import SaveReport, save_checkpoint
from automodel_conv.verifying import verify_checkpoint

__version__ = "0.1.0.dev0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConversionError",
    "ConvertReport",
    "CopyPlan",
    "CoverageError",
    "DestinationError",
    "LoadReport",
    "NameProblems",
    "QuantizationError",
    "RankError",
    "ReadError",
    "SaveReport",
    "UnsupportedError",
    "VerificationError",
    "WriteError",
    "accelerate_transformers",
    "compile_plan",
    "convert_checkpoint",
    "convert_state_dict",
    "get_checkpoint_conversion_mapping",
    "get_combined_key_mapping",
    "get_model_conversion_mapping",
    "install",
    "is_transformers_conversion_available",
    "load_model",
    "load_state_dict",
    "open_checkpoint",
    "requires_tensor_merging",
    "revert_state_dict",
    "save_checkpoint",
    "uninstall",
    "verify_checkpoint",
]
