"""The files that go with the weights of a checkpoint: configs, tokenizers, chat templates, licences, code.

All of a checkpoint's directory that is not weights goes with them, folders too.
"""

from __future__ import annotations

import os
import re

from automodel_conv.files import system
from automodel_conv.files.shards import CHECKSUMS_NAME
from automodel_conv.files.staging import STAGING_NAME

# Names of weights in any format, with their indexes and parts, and of files that trainers keep (optimizer.pt):
# safetensors, pickles, GGUF, Rust, Keras, Flax, Paddle, ONNX, TFLite, Core ML, torch.distributed, NeMo.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth?|ckpt|pkl|pickle|gguf|ggml|ot|h5|msgpack|pdparams|onnx([._]data(_\d+)?)?|tflite|mlmodel"
    r"|distcp|nemo)(\.index\.json)?",
    re.IGNORECASE | re.DOTALL,
)
# Source of the last one: PREFIX_CHECKPOINT_DIR in transformers 5.23.0, ``trainer_utils.py``.
_NO_FOLDER = re.compile(rf"\..*|__pycache__|{re.escape(STAGING_NAME)}|checkpoint-\d+", re.DOTALL)


def is_companion(path: str) -> bool:
    """Whether a file goes with the weights.

    Weights in any format do not, nor hidden files, nor what lies in hidden folders and in those where trainers keep
    their own checkpoints.

    Args:
        path: from the checkpoint's directory on, with "/" between folders.
    """
    *folders, name = path.split("/")
    own = name.startswith(".") or name == CHECKSUMS_NAME or _WEIGHTS.fullmatch(name)
    return not own and not any(map(_NO_FOLDER.fullmatch, folders))


def companions_of(directory: str, destination: str) -> list[str]:
    """Paths of the files that go with the weights, from ``directory`` on, sorted, with "/" between folders.

    Links count as what they lead to: a snapshot of the Hub holds nothing else. No folder is entered twice, which ends
    circles, nor one that holds ``directory``, nor ``destination``.
    """
    root = system.real_path(directory)
    entered = {system.real_path(destination)}
    found: list[str] = []
    folders, linked = [""], []
    while folders or linked:
        folder = folders.pop() if folders else linked.pop()  # so that a folder is found by its own name first
        real = system.real_path(os.path.join(root, folder))
        if real in entered or root.startswith(os.path.join(real, "")):
            continue
        entered.add(real)
        for name in sorted(system.list_names(real)):
            relative = f"{folder}/{name}" if folder else name
            path = os.path.join(real, name)
            if not system.is_directory(path):
                found += [relative] if is_companion(relative) and system.is_file(path) else []
            elif not _NO_FOLDER.fullmatch(name):
                (linked if system.is_link(path) else folders).append(relative)
    return sorted(found)
