"""A sweep that fails every file call of a load, save, conversion and verification in every way, one call at a time.

    python -m tests.fault_sweep [--csv FILE]       a table: how often each fault was tried, and its outcomes

The checkpoint is small and one thread works, so the n-th call is the same one each time. After each fault the sweep
checks that there is one error, or none and the right bytes; that no descriptor, thread, mapped file or file is left
over; that a model is untouched, or that the error names the filled tensors and these hold the right bytes. Incomplete
output must not open as a checkpoint, and repeating the call must complete it.
"""

from __future__ import annotations

import argparse
import csv
import errno
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import ConversionError
from automodel_conv.files import system
from automodel_conv.testing import POISON, assert_bytes_equal
from tests.faults import CHANGING, READING, descriptors, mapped_files, workers

CALLS = (*CHANGING, *READING)
VERSIONS = ("torch", "transformers", "safetensors")
OPENING = ("open_readonly", "create", "open_append", "open_existing", "list_names")
EXPERTS, INTERMEDIATE, HIDDEN = 3, 4, 6
LAYERS = ("layers.0", "layers.1")

Real = Callable[..., Any]


class Fault(NamedTuple):
    """A way in which a call goes wrong."""

    calls: tuple[str, ...]
    """Names of the calls that can fail in this way."""
    happen: Callable[[Real, tuple[Any, ...]], Any]
    """Function that runs in place of the call."""
    harmless: bool = False
    """Whether the fault must not cause an error."""
    where: Any = system
    """Module or class that has these calls."""


def _error(number: int) -> Callable[[Real, tuple[Any, ...]], Any]:
    def happen(real: Real, arguments: tuple[Any, ...]) -> Any:
        raise OSError(number, os.strerror(number))

    return happen


def _raised(error: type[BaseException], *text: str) -> Callable[[Real, tuple[Any, ...]], Any]:
    def happen(real: Real, arguments: tuple[Any, ...]) -> Any:
        raise error(*text)

    return happen


def _short(real: Real, arguments: tuple[Any, ...]) -> Any:
    """Transfer one byte, whatever the caller asked for."""
    if len(arguments) == 5:  # copy_range
        return real(*arguments[:4], 1)
    fd, views, offset = arguments
    return real(fd, [views[0][:1]], offset)


def _no_tensor(real: Real, arguments: tuple[Any, ...]) -> Any:
    """Raise torch's own error by asking for more memory than any machine has."""
    return real(1 << 60, dtype=torch.uint8)


def _slow(real: Real, arguments: tuple[Any, ...]) -> Any:
    time.sleep(0.01)
    return real(*arguments)


FAULTS = {
    "EIO": Fault(CALLS, _error(errno.EIO)),
    "ESTALE": Fault(CALLS, _error(errno.ESTALE)),
    "EMFILE": Fault(OPENING, _error(errno.EMFILE)),
    "ENOSPC": Fault(CHANGING, _error(errno.ENOSPC)),
    "one byte only": Fault(("preadv", "pwritev", "copy_range"), _short, harmless=True),
    "slow": Fault(CALLS, _slow, harmless=True),
    "no memory for a buffer": Fault(CALLS, _raised(MemoryError)),
    "no memory for a tensor": Fault(("empty",), _no_tensor, where=torch),
    "no more threads": Fault(("start",), _raised(RuntimeError, "can't start new thread"), where=threading.Thread),
    "SystemExit": Fault(CALLS, _raised(SystemExit)),
    "KeyboardInterrupt": Fault(CALLS, _raised(KeyboardInterrupt)),
}


class Model(nn.Module):
    """Two layers of experts with the names and shapes of transformers, poisoned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_layer(), _layer()])
        for tensor in self.state_dict().values():
            tensor.view(torch.uint8).fill_(POISON)


def _layer() -> nn.Module:
    experts, layer = nn.Module(), nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * INTERMEDIATE, HIDDEN))
    experts.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INTERMEDIATE))
    layer.experts = experts
    layer.norm = nn.Parameter(torch.empty(HIDDEN))
    return layer


def rules() -> list[Any]:
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    gate_up = ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"]
    return [
        WeightConverter(gate_up, "experts.gate_up_proj", operations=[MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter("experts.*.down_proj.weight", "experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


def write_source(directory: Path) -> None:
    """Write a checkpoint of two shards, one for each layer."""
    directory.mkdir()
    weight_map = {}
    for number, layer in enumerate(LAYERS, 1):
        generator = torch.Generator().manual_seed(number)
        tensors = {f"{layer}.norm": torch.randn(HIDDEN, generator=generator)}
        for expert in range(EXPERTS):
            for part, shape in (
                ("gate", (INTERMEDIATE, HIDDEN)),
                ("up", (INTERMEDIATE, HIDDEN)),
                ("down", (HIDDEN, INTERMEDIATE)),
            ):
                tensors[f"{layer}.experts.{expert}.{part}_proj.weight"] = torch.randn(shape, generator=generator)
        save_file(tensors, directory / f"model-{number:05}-of-00002.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{number:05}-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Sweep:
    """A checkpoint, the results without faults, and a directory for output."""

    def __init__(self, root: Path, threads: int = 1):
        root.mkdir(exist_ok=True)
        self.root = root
        self.threads = threads
        self.source = root / "source"
        write_source(self.source)
        self.model = Model()
        amc.load_model(self.model, self.source, rules=rules(), threads=threads)
        self.wanted = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.files = {}
        for verb in ("save", "convert"):
            getattr(self, verb)(root / verb)
            self.files[verb] = _files(root / verb)
        self._number = itertools.count()

    def load(self, model: Model, layout: str | None = None) -> None:
        amc.load_model(model, self.source, rules=rules(), layout=layout, threads=self.threads)

    def load_state_dict(self, memory_map: bool = False) -> dict[str, torch.Tensor]:
        return amc.load_state_dict(self.source, rules=rules(), threads=self.threads, memory_map=memory_map)

    def save(self, directory: Path) -> None:
        amc.save_checkpoint(self.model, directory, rules=rules(), max_shard_size=700, threads=self.threads)

    def convert(self, directory: Path) -> None:
        amc.convert_checkpoint(
            self.source, directory, rules=rules(), max_shard_size=700, threads=self.threads, verify=True
        )

    def verify(self) -> None:
        amc.verify_checkpoint(self.source, self.root / "convert", rules=rules(), threads=self.threads)

    def try_load(self, error_of: Callable[[Callable[[], object]], BaseException | None]) -> None:
        model = Model()
        error = error_of(lambda: self.load(model))
        filled = "".join([str(error), *getattr(error, "__notes__", ())]).partition("filled:")[2]
        for name, tensor in model.state_dict().items():
            if error is None or name in filled.split():
                assert_bytes_equal(tensor, self.wanted[name])
        if error is not None and not filled:
            untouched = all(bool((t.view(torch.uint8) == POISON).all()) for t in model.state_dict().values())
            assert untouched, "the error does not name the filled tensors"

    def try_load_state_dict(self, error_of: Callable[[Callable[[], object]], BaseException | None]) -> None:
        loaded: list[dict[str, torch.Tensor]] = []
        if error_of(lambda: loaded.append(self.load_state_dict())) is None:
            for name, tensor in self.wanted.items():
                assert_bytes_equal(loaded[0][name], tensor)

    def try_map(self, error_of: Callable[[Callable[[], object]], BaseException | None]) -> None:
        """Load with a memory map: some tensors are mapped, and those that are merged are read."""
        loaded: list[dict[str, torch.Tensor]] = []
        error = error_of(lambda: loaded.append(self.load_state_dict(memory_map=True)))
        if error is None:
            for name, tensor in self.wanted.items():
                assert_bytes_equal(loaded[0][name], tensor)
        while error is not None:  # its frames keep the mapped tensors alive
            error.__traceback__, error = None, error.__cause__ or error.__context__

    def try_save(self, error_of: Callable[[Callable[[], object]], BaseException | None]) -> None:
        directory = self.root / f"out-{next(self._number)}"
        if error_of(lambda: self.save(directory)) is not None and not self._is_whole(directory, "save"):
            left = {path.name for path in directory.rglob("*") if path.is_file()} if directory.exists() else set()
            assert left <= {"lock", "journal.jsonl"}, left
            self.save(directory)
        assert _files(directory) == self.files["save"]

    def try_convert(self, error_of: Callable[[Callable[[], object]], BaseException | None]) -> None:
        directory = self.root / f"out-{next(self._number)}"
        if error_of(lambda: self.convert(directory)) is not None and not self._is_whole(directory, "convert"):
            if directory.exists():
                _assert_refused(directory)
            self.convert(directory)
        assert _files(directory) == self.files["convert"]

    def try_verify(self, error_of: Callable[[Callable[[], object]], BaseException | None]) -> None:
        error_of(self.verify)

    def _is_whole(self, directory: Path, verb: str) -> bool:
        """Return whether the fault came when only cleaning up was left."""
        return directory.exists() and _files(directory) == self.files[verb]


VERBS = ("load", "load_state_dict", "map", "save", "convert", "verify")


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def _assert_refused(directory: Path) -> None:
    try:
        amc.open_checkpoint(directory)
    except ConversionError:
        return
    raise AssertionError(f"{directory} opens as a checkpoint: {sorted(_files(directory))}")


@contextmanager
def watched(fault: Fault, before: Callable[[str, Real, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Replace the calls that a fault applies to with ``before``."""
    real = {name: getattr(fault.where, name) for name in fault.calls}
    for name, function in real.items():
        setattr(fault.where, name, lambda *given, n=name, f=function, **named: before(n, partial(f, **named), given))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(fault.where, name, function)


def count_calls(sweep: Sweep, verb: str, fault: Fault) -> int:
    """Return how many calls of a verb the fault applies to."""
    names: list[str] = []

    def counted(name: str, real: Real, arguments: tuple[Any, ...]) -> Any:
        names.append(name)
        return real(*arguments)

    def error_of(work: Callable[[], object]) -> None:
        with watched(fault, counted):
            work()

    getattr(sweep, f"try_{verb}")(error_of)
    return len(names)


def sweep_one(sweep: Sweep, verb: str, fault: Fault) -> Counter[str]:
    """Plant a fault at each call of a verb that it applies to. Count the faults that caused an error or none."""
    outcomes: Counter[str] = Counter()
    for number in range(count_calls(sweep, verb, fault)):
        happened, error = fault_at(sweep, verb, fault, number)
        if happened:  # the number of started threads varies
            outcomes["error" if error is not None else "none"] += 1
    return outcomes


def fault_at(sweep: Sweep, verb: str, fault: Fault, at: int) -> tuple[bool, BaseException | None]:
    """Plant a fault at the call with this number. Return whether the call happened, and the error if there was one."""
    numbers = itertools.count()
    happened: list[str] = []

    def faulty(name: str, real: Real, arguments: tuple[Any, ...]) -> Any:
        if next(numbers) == at:
            happened.append(name)
            return fault.happen(real, arguments)
        return real(*arguments)

    errors: list[BaseException] = []

    def error_of(work: Callable[[], object]) -> BaseException | None:
        with watched(fault, faulty):
            try:
                work()
            except (ConversionError, KeyboardInterrupt, SystemExit) as error:
                errors.append(error)
        return errors[0] if errors else None

    before = descriptors(), threading.active_count(), mapped_files()
    getattr(sweep, f"try_{verb}")(error_of)
    assert not (errors and fault.harmless), f"{verb}, {happened}: {errors[0]}"
    assert workers() == [], f"{verb}, {happened}: a thread is left over"
    after = descriptors(), threading.active_count(), mapped_files()
    assert after == before, f"{verb}, {happened}: something is left open"
    return bool(happened), errors[0] if errors else None


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m tests.fault_sweep", description=__doc__)
    parser.add_argument("--csv", metavar="FILE", help="write the counts and the versions")
    options = parser.parse_args()
    table = Table(title="each fault at each call that it applies to: errors / no error, and the right bytes")
    table.add_column("fault")
    for verb in VERBS:
        table.add_column(verb, justify="right")
    lines = []
    with tempfile.TemporaryDirectory() as root:
        sweep = Sweep(Path(root))
        for name, fault in FAULTS.items():
            counts_by_verb = {verb: sweep_one(sweep, verb, fault) for verb in VERBS}
            lines += [(name, verb, counts["error"], counts["none"]) for verb, counts in counts_by_verb.items()]
            table.add_row(name, *(f"{counts['error']} / {counts['none']}" for counts in counts_by_verb.values()))
    Console(width=120).print(table)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("fault", "verb", "errors", "none", *VERSIONS))
            writer.writerows((*line, *map(metadata.version, VERSIONS)) for line in lines)
    total = sum(errors + none for _, _, errors, none in lines)
    sys.stdout.write(f"{total} faults; nothing was left open, and no byte was wrong\n")


if __name__ == "__main__":
    main()
