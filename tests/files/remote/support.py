"""A checkpoint of two files that the tests of URLs read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TENSORS = {name: torch.arange(3000, dtype=torch.int32) + number for number, name in enumerate("abcd")}


def write_sharded(folder: Path) -> Path:
    """Write two files, their index and a config."""
    folder.mkdir(parents=True)
    files = {"model-00001-of-00002.safetensors": "ab", "model-00002-of-00002.safetensors": "cd"}
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "none"}')
    return folder
