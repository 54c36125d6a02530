"""Files for mistakes at the command line, and a way to make a mistake in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import automodel_conv
from automodel_conv.cli.demo import TINY
from automodel_conv.cli.demo_process import write_checkpoint
from automodel_conv.files.staging import STAGING_NAME
from tests.loopback_hub import environment

ROOT = Path(automodel_conv.__file__).parent.parent
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4976698672\n"
PLAIN = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


def write_files(root: Path) -> None:
    """Write the files that the mistakes name, below a folder."""
    plain = _folder(root / "plain")
    save_file(PLAIN, plain / "model.safetensors")
    moe = _folder(root / "moe")
    write_checkpoint(TINY, str(moe))
    (root / "notes.txt").write_text("remember the milk\n")
    _folder(root / "empty")
    (_folder(root / "pickled") / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (_folder(root / "llama") / "llama.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (_folder(root / "pointer") / "model.safetensors").write_text(LFS_POINTER)
    (_folder(root / "zeros") / "model.safetensors").write_bytes(bytes(100))
    (_folder(root / "html") / "model.safetensors").write_text("<!DOCTYPE html><html>sign in</html>")
    cut = (plain / "model.safetensors").read_bytes()
    (_folder(root / "cut") / "model.safetensors").write_bytes(cut[:-5])
    lost = shutil.copytree(moe, root / "lost")
    (lost / "model-00003-of-00008.safetensors").unlink()
    broken = shutil.copytree(moe, root / "broken")
    (broken / "config.json").write_text('{"model_type": "qwen3_moe",')
    unknown = shutil.copytree(moe, root / "unknown")
    config = json.loads((moe / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "nobodys", "architectures": ["Nobodys"]}))
    larger = shutil.copytree(moe, root / "larger")
    (larger / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    two = _folder(root / "two")
    for name in ("one", "other"):
        save_file(PLAIN, two / f"{name}.safetensors")
    staging = _folder(root / "unfinished" / STAGING_NAME)
    (staging / "journal.jsonl").write_text('{"work": {"files": []}}\n')
    lora = _folder(root / "lora")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    save_file({"base_model.model.nothing.lora_A.weight": torch.ones(2, 2)}, lora / "adapter_model.safetensors")


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def words_of(arguments: str) -> list[str]:
    """Return arguments that are separated by spaces; "_SPACE_" is a space in one of them."""
    return [word.replace("_SPACE_", " ") for word in arguments.split()]


def command(arguments: str, root: Path, hub, *, most_file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder, in a process of its own, with a Hub on this machine.

    Args:
        arguments: the arguments, separated by spaces; "_SPACE_" is a space in one of them.
        root: the folder with the files.
        hub: the Hub.
        most_file_bytes: size of the largest file that the system lets the process write.
    """

    def limit() -> None:
        if most_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_file_bytes, most_file_bytes))

    return subprocess.run(
        [sys.executable, "-m", "automodel_conv", *words_of(arguments)],
        capture_output=True,
        text=True,
        cwd=root,
        env={
            **os.environ,
            **environment(hub, root / "cache"),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "80",
            "CUDA_VISIBLE_DEVICES": "",
        },
        preexec_fn=limit,
    )
