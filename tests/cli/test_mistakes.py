"""Tests of typical mistakes at the command line: what is said, and what to do.

The first line of an error says what is wrong, in at most 100 characters. The advice is what to type.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

pytest.importorskip("transformers", reason="plans for transformers models")
pytest.importorskip("huggingface_hub", reason="asks a Hub on this machine")

from tests.cli.mistakes import command, words_of, write_files
from tests.cli.support import run
from tests.loopback_hub import serve, use

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes, and folders of Linux")

_MOST_CHARACTERS = 100
_LOCAL = "--no-model"


class Mistake(NamedTuple):
    """A mistake, and what is said."""

    typed: str
    """The arguments; ``_SPACE_`` is a space in one of them."""
    said: str
    """Beginning of the first line, after "error: "."""
    do: str | None = None
    """A part of the advice; None if there is nothing to advise."""
    status: int = 1


MISTAKES = {
    # The path
    "a wrong path": Mistake("plan nowhere", "no such checkpoint", "check the path"),
    "a path in another case": Mistake("plan Plain", "no such checkpoint", "check the path"),
    "a folder below that does not exist": Mistake(
        "plan plain --subfolder deep", "no such checkpoint", "check the path and --subfolder"
    ),
    "a text file": Mistake(f"plan notes.txt {_LOCAL}", "these weights are not in the safetensors format"),
    "an empty folder": Mistake(f"plan empty {_LOCAL}", "no safetensors weights", "check the path"),
    "pickled weights": Mistake(
        f"plan pickled {_LOCAL}", "no safetensors weights, but files of other formats", "call save_pretrained"
    ),
    "a GGUF file": Mistake(
        f"plan llama/llama.gguf {_LOCAL}", "these weights are not in the safetensors format", "gguf_file="
    ),
    "a Git-LFS pointer": Mistake(f"plan pointer {_LOCAL}", "not a safetensors file", "git lfs pull"),
    "a page of a web server": Mistake(f"plan html {_LOCAL}", "not a safetensors file", "download the file itself"),
    "a truncated file": Mistake(f"plan cut {_LOCAL}", "a file is truncated", "copy or download the file again"),
    "a missing file": Mistake(
        f"plan lost {_LOCAL}", "1 of 8 files of the checkpoint are missing", "download or copy the missing files"
    ),
    "an unfinished conversion": Mistake(
        f"plan unfinished {_LOCAL}", "no checkpoint yet: a conversion or a save", "run the same conversion"
    ),
    "two checkpoints in a folder": Mistake(
        f"plan two {_LOCAL}", "the index model.safetensors.index.json is missing", "open one file by its own path"
    ),
    "no such variant": Mistake(
        f"plan plain {_LOCAL} --variant fp16", "no files of this variant", "leave --variant out"
    ),
    # The model
    "no config": Mistake("plan plain", "the checkpoint has no config.json to build a model from", "--no-model keeps"),
    "a broken config": Mistake("plan broken", "malformed JSON", "copy or download it again"),
    "a model type of nobody": Mistake("plan unknown", "transformers ", "--no-model keeps"),
    "a config of another model": Mistake(
        "load larger", "checkpoint and model do not fit together", "--no-strict loads what fits"
    ),
    # The Hub and the network
    "no such repository": Mistake(
        "plan org/nothing", "neither a local path nor a repository that can be read", "hf auth login"
    ),
    "no such revision": Mistake(
        "plan org/plain --revision nope", "the repository has no such revision", "check the revision"
    ),
    "a gated repository": Mistake(
        "plan org/gated", "this repository is gated, and access to it is not granted", "accept the conditions"
    ),
    "no network": Mistake(
        "plan http://127.0.0.1:9/model", "a checkpoint behind a URL cannot be read", "check the URL, the network"
    ),
    "half a URL": Mistake("plan hf://org", "not the URL of a repository of a model"),
    # Options
    "a misspelled layout": Mistake(f"plan plain {_LOCAL} --layout numo", "unknown layout 'numo'", "write 'nemo'"),
    "a layout that is none": Mistake(
        "load plain --layout per_expert", "unknown layout 'per_expert'", "automodel-conv convert --layout per_expert"
    ),
    "a device that is none": Mistake("load plain --device gpu", "not a device: 'gpu'", "--device cpu loads to the CPU"),
    "no GPU": Mistake("load plain --device cuda", "cannot load to cuda", "--device cpu loads to the CPU"),
    "a short dtype": Mistake(
        "load plain --dtype bf16", "invalid value for --dtype: no dtype 'bf16'", "write --dtype bfloat16", 2
    ),
    "a dtype of whole numbers": Mistake(
        "load plain --dtype int8", "invalid value for --dtype: no dtype 'int8'", None, 2
    ),
    "no threads": Mistake("load plain --threads 0", "invalid value for '--threads'", None, 2),
    "a size with spaces": Mistake(f"convert plain new {_LOCAL} --max-shard-size 5_SPACE_G_SPACE_B", "not a size", None),
    "a misspelled recipe": Mistake(
        "load plain --recipe kimi_k", "invalid value for --recipe: no recipe 'kimi_k'", "write --recipe kimi_k", 2
    ),
    "options that exclude each other": Mistake(
        f"convert plain new {_LOCAL} --recipe kimi_k2", "invalid value for --recipe: it excludes --no-model", None, 2
    ),
    "a misspelled name to drop": Mistake(
        f"convert plain new {_LOCAL} --drop a.wieght", "no tensor to drop has this name", "write 'a.weight'"
    ),
    "a misspelled target": Mistake(
        f"plan plain {_LOCAL} --explain a.wieght", "invalid value for --explain: no target 'a.wieght'", None, 2
    ),
    "a mesh without names": Mistake(f"plan plain {_LOCAL} --mesh 64", "not a mesh"),
    "half a storage option": Mistake(
        "load plain --storage-option key", "invalid value for --storage-option: expected KEY=VALUE", None, 2
    ),
    "a page in a folder that does not exist": Mistake(
        f"plan plain {_LOCAL} --html /nowhere/x.html", "invalid value for --html: No such file or directory", None, 2
    ),
    # The command
    "a misspelled command": Mistake("lod plain", "no such command 'lod'", "write load", 2),
    "a misspelled option": Mistake("load --layuot nemo plain", "no such option: --layuot", "write --layout", 2),
    "no path": Mistake("load", "missing argument 'PATH'", None, 2),
    "a path too many": Mistake("load plain moe", "got unexpected extra argument", None, 2),
    "an option without a value": Mistake("load plain --layout", "option '--layout' requires an argument", None, 2),
    # The destination
    "the destination is the source": Mistake(
        f"convert plain plain {_LOCAL}", "the destination is the directory of the source", "choose another directory"
    ),
    "the destination is another checkpoint": Mistake(
        f"convert plain moe {_LOCAL}", "the directory holds a checkpoint already", "choose another directory"
    ),
    "source and destination reversed": Mistake(f"convert new plain {_LOCAL}", "no such checkpoint", "check the path"),
    "the destination is a file": Mistake(
        f"convert plain notes.txt {_LOCAL}", "cannot write to a directory", "a file is where the directory should be"
    ),
    "no permission to write": Mistake(
        f"convert plain /sys/new {_LOCAL}", "cannot write to a directory", "choose a directory that you may write to"
    ),
    "the disk is full": Mistake(
        f"LIMITED convert moe full {_LOCAL}", "cannot write a file", "pass a smaller --max-shard-size"
    ),
    "unfinished work of another kind": Mistake(
        f"convert plain unfinished {_LOCAL}", "", "start again with --no-resume"
    ),
    # Verification and adapters
    "no checksums": Mistake("verify plain", "there are no checksums next", "automodel-conv convert --checksums"),
    "another checkpoint": Mistake(
        f"verify plain moe {_LOCAL}", "41 tensors differ in name, dtype or shape", "pass the options of the conversion"
    ),
    "no form of an adapter": Mistake("adapter convert lora new --base plain", "missing option '--layout'", None, 2),
    "a checkpoint for an adapter": Mistake(
        "adapter inspect plain --base plain", "the adapter has no adapter_config.json", "check the path"
    ),
    "an adapter without a weight": Mistake(
        "adapter merge plain lora new --and lora", "invalid value for --and: 'lora' is not PATH=WEIGHT", None, 2
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Yield a folder with the files, and a Hub that serves some of them."""
    root = tmp_path_factory.mktemp("mistakes")
    write_files(root)
    repositories = {"org/plain": root / "plain", "org/gated": root / "moe"}
    with serve(repositories, token="secret", gated=("org/gated",)) as hub:
        yield root, hub


def check(mistake, status, stderr, root):
    assert status == mistake.status, stderr
    assert "Traceback" not in stderr
    first, *lines = stderr[stderr.index("error: ") :].splitlines()
    assert first.startswith(f"error: {mistake.said}")
    assert len(first.removeprefix("error: ")) <= _MOST_CHARACTERS
    advice = [line.removeprefix("  do:").strip() for line in lines if line.startswith("  do:")]
    assert mistake.do in advice[0] if mistake.do else True
    assert lines[-1].startswith("  help:     ")
    assert not (root / "new").exists()


def needs_process(mistake):
    return mistake.typed.startswith("LIMITED ") or "--device cuda" in mistake.typed


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_named_in_one_short_line_with_what_to_do(world, mistake, monkeypatch, tmp_path):
    root, hub = world
    if needs_process(mistake):
        typed = mistake.typed.removeprefix("LIMITED ")
        done = command(typed, root, hub, most_file_bytes=None if typed == mistake.typed else 2000)
        check(mistake, done.returncode, done.stderr, root)
        return
    monkeypatch.chdir(root)
    use(hub, tmp_path, monkeypatch)
    done = run(*words_of(mistake.typed))
    check(mistake, done.exit_code, done.stderr, root)


@pytest.mark.long
@pytest.mark.parametrize("mistake", [m for m in MISTAKES.values() if not needs_process(m)])
def test_mistake_in_a_process_of_its_own_is_named_too(world, mistake):
    root, hub = world
    done = command(mistake.typed, root, hub)
    check(mistake, done.returncode, done.stderr, root)


def test_there_are_forty_mistakes_and_more():
    assert len(MISTAKES) >= 40
    assert len({mistake.typed for mistake in MISTAKES.values()}) == len(MISTAKES)
