"""The files that accompany the weights of a checkpoint: configs, tokenizers, chat templates, licences, code.

Everything in a checkpoint's directory except weights accompanies them, including folders.
"""

from __future__ import annotations

import os
import re

from automodel_conv.files import system
from automodel_conv.files.shards import CHECKSUMS_NAME
from automodel_conv.files.staging import STAGING_NAME

# Names of weights in any format, including their indexes and parts, and of files that trainers keep (optimizer.pt):
# safetensors, pickles, GGUF, Rust, Keras, Flax, Paddle, ONNX, TFLite, Core ML, torch.distributed, NeMo.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth?|ckpt|pkl|pickle|gguf|ggml|ot|h5|msgpack|pdparams|onnx([._]data(_\d+)?)?|tflite|mlmodel"
    r"|distcp|nemo)(\.index\.json)?",
    re.IGNORECASE | re.DOTALL,
)
# Source of "checkpoint-": PREFIX_CHECKPOINT_DIR in transformers 5.24.0, ``trainer_utils.py``.
_SKIPPED_FOLDER = re.compile(rf"\..*|__pycache__|{re.escape(STAGING_NAME)}|checkpoint-\d+", re.DOTALL)

WELL_KNOWN = (
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Names of files that may accompany the weights where names cannot be listed.

Source: transformers 5.24.0, the file names in ``utils/__init__.py`` and in ``vocab_files_names`` of tokenizers."""


def is_companion(path: str) -> bool:
    """Return whether a file accompanies the weights.

    Weights in any format do not, and neither do hidden files, files in hidden folders, or files in the folders where
    trainers keep their own checkpoints.

    Args:
        path: path relative to the checkpoint's directory, with "/" between folders.
    """
    *folders, name = path.split("/")
    is_skipped = name.startswith(".") or name == CHECKSUMS_NAME or _WEIGHTS.fullmatch(name)
    return not is_skipped and not any(map(_SKIPPED_FOLDER.fullmatch, folders))


def companions_of(directory: str, destination: str) -> list[str]:
    """Return the sorted paths of the files that accompany the weights, relative to ``directory`` with "/" separators.

    Links are followed, since a snapshot of the Hub consists of links. No folder is entered twice, which ends cycles of
    links. ``destination`` and folders that contain ``directory`` are not entered.
    """
    root = system.real_path(directory)
    entered = {system.real_path(destination)}
    paths: list[str] = []
    folders, linked = [""], []
    while folders or linked:
        folder = folders.pop() if folders else linked.pop()  # a folder is listed under its own name, not a link's
        real = system.real_path(os.path.join(root, folder))
        if real in entered or root.startswith(os.path.join(real, "")):
            continue
        entered.add(real)
        for name in sorted(system.list_names(real)):
            relative = f"{folder}/{name}" if folder else name
            path = os.path.join(real, name)
            if not system.is_directory(path):
                paths += [relative] if is_companion(relative) and system.is_file(path) else []
            elif not _SKIPPED_FOLDER.fullmatch(name):
                (linked if system.is_link(path) else folders).append(relative)
    return sorted(paths)
