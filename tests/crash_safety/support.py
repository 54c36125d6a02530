"""Helpers that inject faults and check the result of each."""

from __future__ import annotations

import inspect
import json
import os
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import transformers

import automodel_conv as amc
from automodel_conv.errors import ConversionError
from automodel_conv.files.staging import STAGING_NAME
from tests.faults import Forks, descriptors, replace_calls, workers

INDEX = "model.safetensors.index.json"
SIZES: dict[str, Any] = {"max_shard_size": 100_000, "threads": 2}
# With layout="nemo" most bytes are rearranged in memory; otherwise the kernel copies them.
KINDS: dict[str, dict[str, Any]] = {
    "nemo": {"layout": "nemo", **SIZES},
    "transformers": {**SIZES},
    "regrouped": {"rules": [], "max_shard_size": 250_000, "threads": 2},
    "in few files": {"layout": "nemo", "max_shard_size": 250_000, "threads": 2},
}

# Files next to the weights of the source, some in folders.
BESIDE = ("lock", "tokenizer/vocab.json", "tokenizer/added/tokens.json")

Files = dict[str, bytes]


def files(directory: Path) -> Files:
    """Return names and bytes of the files below a directory, without those of unfinished work."""
    return {name: data for name, data in everything(directory).items() if not name.startswith(STAGING_NAME)}


def everything(directory: Path) -> Files:
    """Return names and bytes of all files below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def has_index(names: Iterable[str]) -> bool:
    """Return whether an index is among the names, under any layout's name."""
    return any(name.endswith(".safetensors.index.json") for name in names)


def new_directory(path: Path, source: Path) -> Path:
    """Create a directory with a config, so that only missing weights keep transformers from loading it."""
    path.mkdir()
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    return path


def assert_whole_or_refused(directory: Path, whole: Files) -> bool:
    """Check that a directory either is the whole checkpoint or is refused by all loaders; return whether it is one."""
    if not directory.exists():
        return False
    present = files(directory)
    if has_index(present):  # the index is written last
        assert present == whole
        amc.open_checkpoint(directory)
        return True
    with pytest.raises(ConversionError):
        amc.open_checkpoint(directory)
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(directory)
    return False


def noted(directory: Path) -> set[str]:
    """Return the shards that complete lines of the journal report as finished."""
    journal = directory / STAGING_NAME / "journal.jsonl"
    if not journal.exists():
        return set()
    lines = journal.read_text().split("\n")[:-1]
    return {line["finished"] for line in map(json.loads, lines) if "finished" in line}


def states(directory: Path, names: set[str]) -> dict[str, tuple[int, int]]:
    times = {}
    for name in names:
        staged = directory / STAGING_NAME / name
        status = (staged if staged.exists() else directory / name).stat()
        times[name] = (status.st_ino, status.st_mtime_ns)
    return times


def finish(source: Path, directory: Path, kind: str, wanted: dict[str, Files]) -> int:
    """Repeat an unfinished call; return the number of files that it kept."""
    done = noted(directory)
    before = states(directory, done)
    if done or not directory.exists() or not has_index(files(directory)):
        resumed = amc.convert_checkpoint(source, directory, **KINDS[kind]).files_resumed
        assert resumed == len(done)
    else:  # killed after everything was written and the journal was removed
        report = amc.convert_checkpoint(source, directory, **KINDS[kind])
        assert report.was_complete
        assert report.bytes_written == 0
        resumed = len(wanted[kind])
    assert states(directory, done) == before, "a finished file was written again"
    assert files(directory) == wanted[kind]
    assert not (directory / STAGING_NAME).exists()
    return resumed


def arguments_of(source: Path, directory: Path, kind: str) -> dict[str, Any]:
    return {"source": str(source), "destination": str(directory), **KINDS[kind]}


def calls_of(forked: Forks, verb: str, arguments: dict[str, Any]) -> int:
    """Return how many changing file calls a run makes. Threads may vary this by a few."""
    answer = forked.run(verb, arguments=arguments)
    assert answer["outcome"] == "done", answer
    return answer["calls"]


def fail_calls(monkeypatch: pytest.MonkeyPatch, name: str, code: int, numbers: Callable[[int], bool]) -> list[int]:
    """Make the selected calls of one function fail; return a list that collects the numbers of all its calls."""
    seen: list[int] = []

    def fail(number: int, called: str, arguments: tuple[Any, ...]) -> None:
        seen.append(number)
        if numbers(number):
            raise OSError(code, os.strerror(code))

    replace_calls((name,), before=fail, put=monkeypatch.setattr)
    return seen


def assert_refused(
    call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...], *texts: str
) -> Exception:
    """Check that the call raises exactly this error with these texts, and leaves no descriptor open."""
    before = descriptors()
    with pytest.raises(error) as caught:
        call()
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    assert descriptors() == before
    assert workers() == []
    return caught.value


def count_calls(names: tuple[str, ...], call: Callable[[], Any]) -> list[str]:
    """Return the names of the file calls of a run, in order."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        replace_calls(names, before=lambda number, name, arguments: seen.append(name), put=patch.setattr)
        call()
    return seen


def copy_of(source: Path, directory: Path) -> Path:
    directory.mkdir()
    for name, data in everything(source).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
        os.utime(directory / name, ns=(1, 10**18))
    return directory


def planted(module: types.ModuleType, text: str, replacement: str) -> types.ModuleType:
    """Return a copy of a module with a planted fault."""
    source = inspect.getsource(module)
    assert source.count(text) == 1
    mutated = types.ModuleType("mutated")
    mutated.__dict__["__name__"] = module.__name__  # dataclasses look it up
    exec(compile(source.replace(text, replacement), "mutated", "exec"), mutated.__dict__)
    return mutated


def use(patch: pytest.MonkeyPatch, module: types.ModuleType, mutated: types.ModuleType) -> None:
    """Replace the functions of a module by those of the faulty copy, wherever they are used."""
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    users = [user for name, user in sys.modules.items() if name.startswith("automodel_conv.")]
    for name in filter(own.get, own):
        for user in users:
            if getattr(user, name, None) is own[name]:
                patch.setattr(user, name, getattr(mutated, name))
