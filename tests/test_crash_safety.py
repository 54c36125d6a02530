"""Conversions and saves that are killed, interrupted, or refused by the system: a checkpoint at the end, or none.

After each fault no loader takes the directory for a checkpoint, unless it is the whole one, byte for byte; and the same
call then makes it that.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="the converted model is transformers'")
if sys.platform != "linux":
    pytest.skip("the faults are made with what Linux has", allow_module_level=True)

import automodel_conv as amc  # noqa: E402
from automodel_conv import converting, saving  # noqa: E402
from automodel_conv.errors import (  # noqa: E402
    ConversionError,
    DestinationError,
    ReadError,
    VerificationError,
    WriteError,
)
from automodel_conv.execution import slabs, writing  # noqa: E402
from automodel_conv.execution.workers import work_off  # noqa: E402
from automodel_conv.files import destination as destination_module  # noqa: E402
from automodel_conv.files import system  # noqa: E402
from automodel_conv.files.destination import STAGING_NAME  # noqa: E402
from tests.faults import CHANGING, NEVER_FAILING, READING, Forks, descriptors, forks, replace_calls, workers  # noqa: E402
from tests.model_zoo import build_model, write_checkpoint  # noqa: E402

INDEX = "model.safetensors.index.json"
SIZES: dict[str, Any] = {"max_shard_size": 100_000, "threads": 2}
# With layout="nemo" most bytes are made in memory, otherwise the kernel copies them.
KINDS: dict[str, dict[str, Any]] = {
    "nemo": {"layout": "nemo", **SIZES},
    "transformers": {**SIZES},
    "regrouped": {"rules": [], "max_shard_size": 250_000, "threads": 2},
    "in few files": {"layout": "nemo", "max_shard_size": 250_000, "threads": 2},
}

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has written it has written, however it ends; the tests of lost power have a disk of their own."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("mixtral")


@pytest.fixture(scope="module")
def source(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_checkpoint(model, directory)
    return directory


@pytest.fixture(scope="module")
def wanted(model: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """The files of each kind, and of a save, that nobody interrupted."""
    root = tmp_path_factory.mktemp("wanted")
    for kind, arguments in KINDS.items():
        amc.convert_checkpoint(source, root / kind, **arguments)
    amc.save_checkpoint(model, root / "saved", **SIZES)
    return {kind: files(root / kind) for kind in (*KINDS, "saved")}


@pytest.fixture(scope="module")
def forked(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks() as program:
        warm = tmp_path_factory.mktemp("warm")
        program.run("warm", arguments={"source": str(source), "destination": str(warm / "out"), "layout": "nemo"})
        yield program


# --- what is looked at after each fault -------------------------------------------------------------------------------


def files(directory: Path) -> Files:
    """Names and bytes of the files of a directory, without those of an unfinished work."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def everything(directory: Path) -> Files:
    """Names and bytes of all files below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def new_directory(path: Path, source: Path) -> Path:
    """A directory with a config, so that only the weights keep transformers from loading it."""
    path.mkdir()
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    return path


def assert_whole_or_refused(directory: Path, whole: Files) -> bool:
    """Whether the directory is a checkpoint: then all of it; otherwise neither we nor transformers may load it."""
    if not directory.exists():
        return False
    found = files(directory)
    if INDEX in found:  # which comes last
        assert found == whole
        amc.open_checkpoint(directory)
        return True
    with pytest.raises(ConversionError):
        amc.open_checkpoint(directory)
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(directory)
    return False


def noted(directory: Path) -> set[str]:
    """Shards that the whole lines of the journal call finished."""
    journal = directory / STAGING_NAME / "journal.jsonl"
    if not journal.exists():
        return set()
    lines = journal.read_text().split("\n")[:-1]
    return {line["finished"] for line in map(json.loads, lines) if "finished" in line}


def states(directory: Path, names: set[str]) -> dict[str, tuple[int, int]]:
    found = {}
    for name in names:
        staged = directory / STAGING_NAME / name
        status = (staged if staged.exists() else directory / name).stat()
        found[name] = (status.st_ino, status.st_mtime_ns)
    return found


def finish(source: Path, directory: Path, kind: str, wanted: dict[str, Files]) -> int:
    """Call again what did not end; returns the number of files that were not made anew."""
    done = noted(directory)
    before = states(directory, done)
    if done or not directory.exists() or INDEX not in files(directory):
        resumed = amc.convert_checkpoint(source, directory, **KINDS[kind]).files_resumed
        assert resumed == len(done)
    else:  # killed after all of it, when the journal was gone
        with pytest.raises(DestinationError, match="holds a checkpoint already"):
            amc.convert_checkpoint(source, directory, **KINDS[kind])
        resumed = len(wanted[kind])
    assert states(directory, done) == before, "a finished file was written again"
    assert files(directory) == wanted[kind]
    assert not (directory / STAGING_NAME).exists()
    return resumed


def arguments_of(source: Path, directory: Path, kind: str) -> dict[str, Any]:
    return {"source": str(source), "destination": str(directory), **KINDS[kind]}


# --- killed -----------------------------------------------------------------------------------------------------------


def calls_of(forked: Forks, verb: str, arguments: dict[str, Any]) -> int:
    """How many calls that change something a run makes, which threads may vary by a few."""
    told = forked.run(verb, arguments=arguments)
    assert told["outcome"] == "done", told
    return told["calls"]


@pytest.mark.parametrize(("kind", "step"), [("nemo", 1), ("transformers", 3)])
def test_a_conversion_killed_at_any_file_call_is_refused_by_loaders_and_then_finished(
    forked, source, wanted, tmp_path, kind, step
):
    total = calls_of(forked, "convert", arguments_of(source, tmp_path / "counted", kind))
    assert files(tmp_path / "counted") == wanted[kind]
    kills, resumed = 0, set()
    for call in range(1, total + 1, step):
        directory = new_directory(tmp_path / f"{call}", source)
        when = "before" if call // step % 2 else "after"
        told = forked.run(
            "convert", arguments=arguments_of(source, directory, kind), signal="SIGKILL", call=call, when=when
        )
        kills += os.WIFSIGNALED(told["status"]) and os.WTERMSIG(told["status"]) == signal.SIGKILL
        assert_whole_or_refused(directory, wanted[kind])
        resumed.add(finish(source, directory, kind, wanted))
    assert kills >= 85 // step * (1 + (step > 1))
    shards = sum(name.endswith(".safetensors") for name in wanted[kind])
    assert shards >= 5
    assert resumed >= set(range(shards + 1)), "after some of the kills each number of files was finished"


def test_a_conversion_killed_at_random_times_is_refused_by_loaders_and_then_finished(forked, source, wanted, tmp_path):
    chosen = random.Random(1)
    kills = 0
    for number in range(30):
        kind = ("nemo", "transformers")[number % 2]
        directory = new_directory(tmp_path / f"{number}", source)
        told = forked.run(
            "convert",
            arguments=arguments_of(source, directory, kind),
            signal="SIGKILL",
            delay=chosen.uniform(0, 0.08),
        )
        kills += os.WIFSIGNALED(told["status"])
        assert_whole_or_refused(directory, wanted[kind])
        finish(source, directory, kind, wanted)
    assert kills


@pytest.mark.parametrize("kind", ["nemo", "transformers"])
def test_a_conversion_killed_again_and_again_is_finished_without_losing_a_file(forked, source, wanted, tmp_path, kind):
    chosen = random.Random(2)
    directory = new_directory(tmp_path / "out", source)
    kills, done = 0, set()
    for _ in range(100):
        call = chosen.randrange(12, 30 if kind == "nemo" else 60)
        told = forked.run("convert", arguments=arguments_of(source, directory, kind), signal="SIGKILL", call=call)
        if not os.WIFSIGNALED(told["status"]):
            break
        kills += 1
        if assert_whole_or_refused(directory, wanted[kind]) and not noted(directory):
            break  # killed after all of it, when the journal was gone
        assert noted(directory) >= done
        done = noted(directory)
    assert kills >= 3
    assert len(done) > 0
    assert told.get("resumed", len(done)) == len(done)
    assert files(directory) == wanted[kind]


def test_a_save_killed_at_any_file_call_leaves_nothing_that_loads_and_room_for_the_next(
    forked, model, source, wanted, tmp_path
):
    total = calls_of(forked, "save", {"directory": str(tmp_path / "counted"), **SIZES})
    assert files(tmp_path / "counted") == wanted["saved"]
    kills = 0
    for call in range(1, total + 1):
        directory = new_directory(tmp_path / f"{call}", source)
        when = "before" if call % 2 else "after"
        arguments = {"directory": str(directory), **SIZES}
        told = forked.run("save", arguments=arguments, signal="SIGKILL", call=call, when=when)
        kills += os.WIFSIGNALED(told["status"])
        if assert_whole_or_refused(directory, wanted["saved"]):
            with pytest.raises(DestinationError, match="holds a checkpoint already"):
                amc.save_checkpoint(model, directory, **SIZES)
        else:
            amc.save_checkpoint(model, directory, **SIZES)
        assert everything(directory) == wanted["saved"]
    assert kills >= 60


# --- no room ----------------------------------------------------------------------------------------------------------


def fail_calls(monkeypatch: pytest.MonkeyPatch, name: str, code: int, numbers: Callable[[int], bool]) -> list[int]:
    """Let those calls of one function fail; returns the numbers of all its calls, as they come."""
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
    """The call raises this error and none else, tells this, and leaves nothing open."""
    before = descriptors()
    with pytest.raises(error) as caught:
        call()
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    assert descriptors() == before
    assert workers() == []
    return caught.value


@contextlib.contextmanager
def small_disk(path: Path, nbytes: int) -> Iterator[None]:
    """A file system of this size."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting takes root: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("kind", ["nemo", "transformers"])
def test_a_disk_that_is_full_is_told_and_more_room_is_enough(source, wanted, tmp_path, monkeypatch, kind):
    with small_disk(tmp_path / "disk", 1 << 20):
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes(600_000))
        directory = new_directory(tmp_path / "disk" / "out", source)
        arguments = {"source": source, "destination": directory, **KINDS[kind]}
        assert_refused(lambda: amc.convert_checkpoint(**arguments), WriteError, "too little room", str(directory))
        assert not assert_whole_or_refused(directory, wanted[kind])
        with monkeypatch.context() as patch:  # somebody else takes the room after it was looked for
            patch.setattr(system, "free_bytes", lambda path: 1 << 40)
            assert_refused(lambda: amc.convert_checkpoint(**arguments), WriteError, "No space left", "room for")
        assert not assert_whole_or_refused(directory, wanted[kind])
        assert 0 < len(noted(directory)) < 5
        ballast.unlink()
        assert finish(source, directory, kind, wanted) > 0


def test_a_save_to_a_disk_that_is_full_leaves_it_as_it_was(model, source, wanted, tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20):
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes(600_000))
        directory = new_directory(tmp_path / "disk" / "out", source)
        before = everything(directory)
        assert_refused(
            lambda: amc.save_checkpoint(model, directory, **SIZES), WriteError, "No space left", str(directory)
        )
        assert everything(directory) == before
        ballast.unlink()
        amc.save_checkpoint(model, directory, **SIZES)
        assert everything(directory) == wanted["saved"]


def test_room_that_a_file_cut_short_takes_is_room_for_it(source, wanted, tmp_path):
    with small_disk(tmp_path / "disk", 900_000):
        directory = new_directory(tmp_path / "disk" / "out", source)
        big = KINDS["nemo"] | {"max_shard_size": "1GB"}
        with pytest.MonkeyPatch.context() as patch:
            fail_calls(patch, "sync", errno.EIO, lambda number: number == 2)  # the first is the journal's
            assert_refused(lambda: amc.convert_checkpoint(source, directory, **big), WriteError, "Input/output error")
        assert os.path.getsize(directory / STAGING_NAME / "model.safetensors") > 450_000
        amc.convert_checkpoint(source, directory, **big)
        amc.open_checkpoint(directory)


@pytest.mark.parametrize("limit", [0, 100, 40_000, 90_000])
@pytest.mark.parametrize("kind", ["nemo", "transformers"])
def test_a_limit_of_the_size_of_a_file_is_told_and_then_lifted(forked, source, wanted, tmp_path, kind, limit):
    directory = new_directory(tmp_path / "out", source)
    told = forked.run("convert", arguments=arguments_of(source, directory, kind), limit=limit)
    assert told["outcome"] == "WriteError", told
    assert "File too large" in told["text"]
    assert (told["descriptors"], told["workers"], told["later"]) == (0, [], 0)
    assert not assert_whole_or_refused(directory, wanted[kind])
    finish(source, directory, kind, wanted)


def count_calls(names: tuple[str, ...], call: Callable[[], Any]) -> list[str]:
    """Names of the calls that a run makes, in their order."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        replace_calls(names, before=lambda number, name, arguments: seen.append(name), put=patch.setattr)
        call()
    return seen


@pytest.mark.parametrize("name", ["pwritev", "reserve", "write_end", "copy_file"])
def test_a_disk_that_is_full_from_some_call_on(source, wanted, tmp_path, monkeypatch, name):
    total = len(count_calls((name,), lambda: amc.convert_checkpoint(source, tmp_path / "counted", **KINDS["nemo"])))
    assert total > 1
    for first in range(1, total + 1):
        directory = new_directory(tmp_path / f"{first}", source)
        with monkeypatch.context() as patch:
            fail_calls(patch, name, errno.ENOSPC, lambda number, first=first: number >= first)
            call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
            assert_refused(call, WriteError, "No space left", str(directory))
        assert not assert_whole_or_refused(directory, wanted["nemo"])
        finish(source, directory, "nemo", wanted)


# --- the system refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_error_within_a_file_names_it_and_what_was_finished_stays(source, wanted, tmp_path, monkeypatch, kind):
    directory = new_directory(tmp_path / "out", source)
    broken = str(source / "model-00005-of-00005.safetensors")

    def fail(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        file, at = arguments[0], arguments[2 if name == "preadv" else 1]
        if os.path.realpath(f"/proc/self/fd/{file}") == broken and at > 8:  # after the header
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        replace_calls(("preadv", "copy_range"), before=fail, put=patch.setattr)
        call = partial(amc.convert_checkpoint, source, directory, **KINDS[kind])
        assert_refused(call, ReadError, broken, "Input/output error", "model.layers.")
    assert not assert_whole_or_refused(directory, wanted[kind])
    assert noted(directory)
    assert finish(source, directory, kind, wanted) > 0


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["make_directory", "open_append", "create", "rename"])
def test_a_directory_that_may_not_be_written_to(model, source, wanted, tmp_path, monkeypatch, name, code):
    directory = new_directory(tmp_path / "out", source)
    before = everything(directory)
    with monkeypatch.context() as patch:
        fail_calls(patch, name, code, lambda number: True)
        assert_refused(
            lambda: amc.save_checkpoint(model, directory, **SIZES), WriteError, os.strerror(code), str(directory)
        )
        if name != "open_append":  # without which a lock cannot be taken
            assert everything(directory) == before
        call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
        assert_refused(call, WriteError, os.strerror(code), str(directory))
    assert not assert_whole_or_refused(directory, wanted["nemo"])
    finish(source, directory, "nemo", wanted)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_directory_without_permission(source, wanted, tmp_path):
    directory = new_directory(tmp_path / "out", source)
    directory.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
        assert_refused(call, WriteError, "Permission denied", str(directory))
    finally:
        directory.chmod(stat.S_IRWXU)
    finish(source, directory, "nemo", wanted)


def test_files_beside_the_weights_that_may_only_be_read(model, source, wanted, tmp_path):
    copied = copy_of(source, tmp_path / "source")
    (copied / "config.json").chmod(0o444)
    directory = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        fail_calls(patch, "rename", errno.EIO, lambda number: True)
        call = partial(amc.convert_checkpoint, copied, directory, **KINDS["nemo"])
        assert_refused(call, WriteError, "Input/output error")
    finish(copied, directory, "nemo", wanted)


# --- the source changes -----------------------------------------------------------------------------------------------


def copy_of(source: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
        os.utime(directory / path.name, ns=(1, 10**18))
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_cut_off_while_it_is_read(source, wanted, tmp_path, monkeypatch, kind):
    copied, directory = copy_of(source, tmp_path / "source"), new_directory(tmp_path / "out", source)
    cut = copied / "model-00005-of-00005.safetensors"

    def truncate(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == 2:
            os.truncate(cut, 20_000)

    call = partial(amc.convert_checkpoint, copied, directory, **KINDS[kind])
    with monkeypatch.context() as patch:
        replace_calls(("create",), after=truncate, put=patch.setattr)
        assert_refused(call, ReadError, "ends too early", str(cut))
    assert not assert_whole_or_refused(directory, wanted[kind])
    assert_refused(call, ConversionError, str(cut))
    cut.write_bytes((source / cut.name).read_bytes())
    assert_refused(call, DestinationError, "not this one", "source files", cut.name)  # it may be another one
    os.utime(cut, ns=(1, 10**18))
    assert finish(copied, directory, kind, wanted) > 0


@pytest.mark.parametrize("change", ["bytes", "time"])
def test_a_source_that_changed_since_is_refused_by_name(forked, source, wanted, tmp_path, change):
    copied, directory = copy_of(source, tmp_path / "source"), new_directory(tmp_path / "out", source)
    forked.run("convert", arguments=arguments_of(copied, directory, "nemo"), signal="SIGKILL", call=40)
    changed = copied / "model-00005-of-00005.safetensors"
    if change == "bytes":
        changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    else:
        os.utime(changed, ns=(1, 2 * 10**18))
    before = everything(directory)
    assert before
    call = partial(amc.convert_checkpoint, copied, directory, **KINDS["nemo"])
    error = assert_refused(call, DestinationError, "not this one", changed.name, "resume=False")
    assert "model-00001-of-00005" not in str(error)
    assert everything(directory) == before
    report = amc.convert_checkpoint(copied, directory, resume=False, **KINDS["nemo"])
    assert report.files_resumed == 0
    if change == "time":
        assert everything(directory) == wanted["nemo"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_source_that_changes_during_the_run_is_refused_at_its_end(source, wanted, tmp_path, monkeypatch, gone):
    copied, directory = copy_of(source, tmp_path / "source"), new_directory(tmp_path / "out", source)
    changed = copied / "model-00001-of-00005.safetensors"

    def change(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == 1 + len([name for name in wanted["nemo"] if name.endswith(".safetensors")]):
            changed.unlink() if gone else os.utime(changed, ns=(1, 2 * 10**18))

    with monkeypatch.context() as patch:
        replace_calls(("write_end",), after=change, put=patch.setattr)
        call = partial(amc.convert_checkpoint, copied, directory, **KINDS["nemo"])
        assert_refused(call, ReadError if gone else DestinationError, changed.name)
    assert not assert_whole_or_refused(directory, wanted["nemo"])


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nemo", "transformers"])
def test_ctrl_c_ends_all_threads_and_closes_all_files(forked, source, wanted, tmp_path, kind):
    interrupted = 0
    for call in range(1, 91, 6):
        directory = new_directory(tmp_path / f"{call}", source)
        told = forked.run("convert", arguments=arguments_of(source, directory, kind), signal="SIGINT", call=call)
        assert told["outcome"] in ("KeyboardInterrupt", "done"), told
        interrupted += told["outcome"] == "KeyboardInterrupt"
        assert (told["descriptors"], told["workers"], told["later"]) == (0, [], 0)
        assert_whole_or_refused(directory, wanted[kind])
        if told["outcome"] == "KeyboardInterrupt":
            finish(source, directory, kind, wanted)
    assert interrupted >= 10


def test_a_save_that_is_interrupted_leaves_the_directory_as_it_was(forked, source, tmp_path):
    interrupted = 0
    for call in range(1, 66, 4):
        directory = new_directory(tmp_path / f"{call}", source)
        told = forked.run("save", arguments={"directory": str(directory), **SIZES}, signal="SIGINT", call=call)
        assert (told["descriptors"], told["workers"], told["later"]) == (0, [], 0)
        if told["outcome"] == "KeyboardInterrupt":
            interrupted += 1
            left = everything(directory)
            assert set(left) <= {"config.json"}, left.keys()
    assert interrupted >= 10


def test_an_interrupt_while_the_main_thread_waits_for_others(source, wanted, tmp_path, monkeypatch):
    directory = new_directory(tmp_path / "out", source)
    main = threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def interrupt(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == 5:
            assert threading.current_thread() is not main
            signal.pthread_kill(main.ident or 0, signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(slabs, "_SLAB_BYTES", 4096)  # several a file, for several threads
        replace_calls(("copy_range",), before=interrupt, put=patch.setattr)
        assert_refused(
            partial(amc.convert_checkpoint, source, directory, **KINDS["transformers"]),
            KeyboardInterrupt,  # type: ignore[arg-type]
        )
    signal.signal(signal.SIGINT, handler)
    assert not assert_whole_or_refused(directory, wanted["transformers"])
    finish(source, directory, "transformers", wanted)


def test_no_thread_works_on_after_an_interrupt_even_one_whose_start_was_cut_short(monkeypatch):
    start, working = threading.Thread.start, []

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        while thread.name.startswith("automodel_conv") and not working:
            time.sleep(0.001)
        if working:
            raise KeyboardInterrupt  # before the pool has noted that it has this thread

    def take(item: int) -> None:
        working.append(item)
        time.sleep(0.1)
        working.remove(item)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            work_off(range(3), 2, lambda: take)
    assert not working
    assert workers() == []


# --- two at once ------------------------------------------------------------------------------------------------------


def test_a_second_conversion_of_the_same_process_is_refused(source, wanted, tmp_path, monkeypatch):
    directory = new_directory(tmp_path / "out", source)
    call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
    refused = []

    def again(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number in (2, 5):
            assert_refused(call, DestinationError, "another process writes", str(directory))
            refused.append(number)

    with monkeypatch.context() as patch:
        replace_calls(("create",), before=again, put=patch.setattr)
        call()
    assert refused == [2, 5]
    assert files(directory) == wanted["nemo"]


def test_a_second_process_is_refused_and_a_killed_one_bars_nobody(forked, model, source, wanted, tmp_path):
    directory = new_directory(tmp_path / "out", source)
    forked.start("convert", arguments=arguments_of(source, directory, "nemo"), call=50, hold=True)
    child = forked.answer()["holds"]
    before = everything(directory)
    call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
    assert_refused(call, DestinationError, "another process writes", str(directory))
    assert_refused(partial(call, resume=False), DestinationError, "another process writes")
    assert_refused(partial(amc.save_checkpoint, model, directory), DestinationError, "another process writes")
    assert everything(directory) == before
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(forked.answer()["status"])
    assert finish(source, directory, "nemo", wanted) > 0


# --- what lies there already ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [INDEX, "model.safetensors", "pytorch_model.bin", "model-00001-of-00009.safetensors", "model.gguf"]
)
def test_a_directory_with_a_checkpoint_is_refused_and_left_alone(model, source, tmp_path, name):
    directory = new_directory(tmp_path / "out", source)
    (directory / name).write_bytes(b"mine")
    before = everything(directory)
    for call in (
        partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"]),
        partial(amc.convert_checkpoint, source, directory, resume=False, **KINDS["nemo"]),
        partial(amc.save_checkpoint, model, directory, **SIZES),
    ):
        assert_refused(call, DestinationError, "holds a checkpoint already", name, str(directory))
        assert everything(directory) == before
        assert sorted(os.listdir(directory)) == sorted(before)


def test_converting_onto_the_source_itself_is_refused(source, tmp_path):
    copied = copy_of(source, tmp_path / "source")
    before = everything(copied)
    assert_refused(partial(amc.convert_checkpoint, copied, copied), DestinationError, "holds a checkpoint already")
    assert everything(copied) == before


@pytest.mark.parametrize("call", [8, 40, 70])
def test_an_unfinished_work_of_another_kind_is_refused_and_can_still_be_finished(
    forked, model, source, wanted, tmp_path, call
):
    directory = new_directory(tmp_path / "out", source)
    forked.run("convert", arguments=arguments_of(source, directory, "nemo"), signal="SIGKILL", call=call)
    before = everything(directory)
    other = partial(amc.convert_checkpoint, source, directory, **KINDS["transformers"])
    error = assert_refused(other, DestinationError, "an unfinished work that is not this one", "tensors: ")
    assert "source files" not in str(error)
    assert_refused(partial(amc.save_checkpoint, model, directory), DestinationError, "an unfinished work", "tensors: ")
    assert everything(directory) == before
    finish(source, directory, "nemo", wanted)


@pytest.mark.parametrize("call", [8, 40, 86, 89])
def test_without_resume_it_starts_anew_also_as_another_kind(forked, source, wanted, tmp_path, call):
    directory = new_directory(tmp_path / "out", source)
    forked.run("convert", arguments=arguments_of(source, directory, "nemo"), signal="SIGKILL", call=call)
    assert (directory / STAGING_NAME).is_dir()
    report = amc.convert_checkpoint(source, directory, resume=False, **KINDS["transformers"])
    assert report.files_resumed == 0
    assert everything(directory) == wanted["transformers"]


GARBAGE = {
    "torn": b'{"finished": "model-0000',
    "no JSON": b"\0\xff\xfe\n",
    "other JSON": b'[1]\n{"finished": []}\n',
    "work of no kind": b'{"work": 5}\n',
    "a list that is finished": b'{"finished": [[]]}\n',
    "a number that is placed": b'{"placing": 3}\n',
}


@pytest.mark.parametrize("text", GARBAGE)
@pytest.mark.parametrize("whole", [False, True], ids=["appended", "alone"])
def test_a_journal_that_is_not_one_costs_at_most_the_work(forked, source, wanted, tmp_path, text, whole):
    directory = new_directory(tmp_path / "out", source)
    forked.run("convert", arguments=arguments_of(source, directory, "nemo"), signal="SIGKILL", call=40)
    done = noted(directory)
    journal = directory / STAGING_NAME / "journal.jsonl"
    journal.write_bytes((b"" if whole else journal.read_bytes()) + GARBAGE[text])
    report = amc.convert_checkpoint(source, directory, **KINDS["nemo"])
    assert report.files_resumed == (len(done) if text == "torn" and not whole else 0)
    assert everything(directory) == wanted["nemo"]


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_finished_file_that_was_damaged_is_written_again_whatever_happens_then(source, wanted, tmp_path, damage):
    directory = new_directory(tmp_path / "out", source)
    call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
    stop(call, 60)
    done = noted(directory)
    assert len(done) > 2
    damaged = directory / STAGING_NAME / min(done)
    lengths = set()
    for number in range(4, 14):  # in some of these it has its length again, but not its bytes
        if damage == "removed":
            damaged.unlink(missing_ok=True)
        else:
            os.truncate(damaged, 100)
        stop(call, number)
        lengths.add(os.path.getsize(damaged) if damaged.exists() else None)
        lengths_again = len(wanted["nemo"][damaged.name]) in lengths
        if lengths_again:
            break
        damaged.touch()
    assert lengths_again
    assert call().files_resumed == len(done) - 1
    assert everything(directory) == wanted["nemo"]


def test_files_that_were_finished_unverified_are_compared_when_that_is_asked_for(source, wanted, tmp_path):
    directory = new_directory(tmp_path / "out", source)
    call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
    stop(partial(call, verify=False), 60)
    done = noted(directory)
    assert len(done) > 2
    damaged = directory / STAGING_NAME / min(done)
    data, times = bytearray(damaged.read_bytes()), damaged.stat()
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(VerificationError, match=damaged.name):
        call()
    data[-1] ^= 1
    damaged.write_bytes(data)
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert call().files_resumed == len(done)
    assert everything(directory) == wanted["nemo"]


def test_what_makes_it_a_checkpoint_is_taken_back_first(model, source, wanted, tmp_path, monkeypatch):
    directory = new_directory(tmp_path / "out", source)

    def look(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if not arguments[0].startswith(str(directory / STAGING_NAME)):
            assert_whole_or_refused(directory, wanted["saved"])

    last = count_calls(("sync_directory",), partial(amc.save_checkpoint, model, tmp_path / "counted", **SIZES))
    with monkeypatch.context() as patch:
        fail_calls(patch, "sync_directory", errno.EIO, lambda number: number == len(last))
        replace_calls(("remove",), after=look, put=patch.setattr)
        assert_refused(partial(amc.save_checkpoint, model, directory, **SIZES), WriteError, "Input/output error")
    assert not everything(directory)


def test_a_reference_whose_files_are_not_numbered_is_refused_until_it_is_whole(forked, source, tmp_path):
    reference = copy_of(source, tmp_path / "reference")
    index = json.loads((reference / INDEX).read_text())
    names = {f"model-{number:05}-of-00005.safetensors": f"part{number}.safetensors" for number in range(2, 6)}
    names["model-00001-of-00005.safetensors"] = "model.safetensors"
    for old, new in names.items():
        (reference / old).rename(reference / new)
    index["weight_map"] = {name: names[file] for name, file in index["weight_map"].items()}
    (reference / INDEX).write_text(json.dumps(index))
    arguments = {"reference": str(reference), "threads": 2}
    total = calls_of(forked, "save", {"directory": str(tmp_path / "counted"), **arguments})
    whole = files(tmp_path / "counted")
    assert set(names.values()) < set(whole)
    for call in range(total - 20, total + 1):
        directory = new_directory(tmp_path / f"{call}", source)
        forked.run(
            "save", arguments={"directory": str(directory), **arguments}, signal="SIGKILL", call=call, when="after"
        )
        if files(directory) != whole:
            with pytest.raises(ConversionError):
                amc.open_checkpoint(directory)
            with pytest.raises((OSError, ValueError)):
                transformers.AutoModelForCausalLM.from_pretrained(directory)


# --- each call fails once ---------------------------------------------------------------------------------------------


def test_every_file_call_is_watched():
    public = {
        name
        for name, value in vars(system).items()
        if inspect.isfunction(value) and value.__module__ == system.__name__ and not name.startswith("_")
    }
    assert sorted((*CHANGING, *READING, *NEVER_FAILING)) == sorted(public)


def fail_each(call: Callable[[Path], Any], root: Path, then: Callable[[Path, str, bool], None]) -> int:
    """Let each file call of ``call(directory)`` that can fail do so once.

    Args:
        then: called after each with the directory, the function that failed, and whether the caller was told.
    """
    names = (*CHANGING, *READING)
    total = len(count_calls(names, lambda: call(root / "counted")))
    for fails in range(1, total + 1):
        failed = []

        def fail(number: int, name: str, arguments: tuple[Any, ...], fails: int = fails, failed: list = failed) -> None:
            if number == fails:
                failed.append(name)
                raise OSError(errno.EIO, os.strerror(errno.EIO), "/some/file")

        directory = root / f"{fails}"
        before = descriptors()
        with pytest.MonkeyPatch.context() as patch:
            replace_calls(names, before=fail, put=patch.setattr)
            told = None
            try:
                call(directory)
            except ConversionError as error:
                told = str(error)
        assert told is None or "Input/output error" in told
        assert descriptors() == before, failed
        assert workers() == []
        if failed:
            then(directory, failed[0], told is not None)
    return total


# What may fail once without harm: what the kernel cannot copy is read and written, and what stays is removed later.
HARMLESS = {"copy_range", "open_readonly", "remove", "remove_directory", "list_names"}


def test_each_call_that_fails_is_told_and_the_conversion_then_finished(source, wanted, tmp_path):
    kind, harmless = "in few files", []

    def then(directory: Path, name: str, told: bool) -> None:
        if told:
            if directory.exists():
                assert_whole_or_refused(directory, wanted[kind])
            finish(source, directory, kind, wanted)
        else:
            harmless.append(name)
        assert files(directory) == wanted[kind]

    total = fail_each(lambda directory: amc.convert_checkpoint(source, directory, **KINDS[kind]), tmp_path, then)
    assert total > 100
    assert set(harmless) <= HARMLESS


@pytest.mark.parametrize("verb", ["convert", "save"])
def test_each_call_that_fails_is_told_also_while_checksums_are_written(model, source, tmp_path, verb):
    def call(directory: Path) -> None:
        if verb == "convert":
            amc.convert_checkpoint(source, directory, rules=[], max_shard_size="1GB", threads=1, checksums=True)
        else:
            amc.save_checkpoint(model, directory, threads=1, checksums=True)

    call(tmp_path / "whole")
    whole, harmless = files(tmp_path / "whole"), []

    def then(directory: Path, name: str, told: bool) -> None:
        if told:
            if verb == "save" and directory.exists():  # the two may stay where no lock can be had
                assert everything(directory).keys() <= {f"{STAGING_NAME}/lock", f"{STAGING_NAME}/journal.jsonl"}
            call(directory)
        else:
            harmless.append(name)
        assert files(directory) == whole

    assert fail_each(call, tmp_path, then) > 50
    assert set(harmless) <= HARMLESS


# --- the power fails --------------------------------------------------------------------------------------------------


class PowerFailed(BaseException):
    """Raised by each file call from some call on, so that nothing can be tidied up either."""


class Disk:
    """Knows what a disk has for certain, and loses the rest when the power fails.

    Of a file that was changed since its last ``sync``, the bytes; of renamings since the last ``sync_directory`` of the
    directory they lead to, any. By chance each is lost or not.
    """

    def __init__(self, fails: int):
        self._fails = fails
        self._failed = False
        self._lock = threading.Lock()
        self._synced: dict[tuple[int, int], int] = {}  # bytes that are safe, of files that were changed
        self._renamed: list[tuple[str, str]] = []
        self.calls = 0

    def before(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        with self._lock:
            self.calls = number
            self._failed |= number >= self._fails
            if self._failed:
                raise PowerFailed
            if name in ("pwritev", "reserve", "truncate", "write_end"):
                self._change(os.fstat(arguments[0]), appends=name == "write_end")
            elif name == "copy_range":
                self._change(os.fstat(arguments[2]))

    def after(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        with self._lock:
            if name in ("sync", "write_end"):
                self._synced.pop(self._key(os.fstat(arguments[0])), None)
            elif name in ("create", "copy_file"):
                self._change(os.stat(arguments[-1]))
            elif name == "rename":
                self._renamed.append(arguments)
            elif name == "sync_directory":
                self._renamed = [pair for pair in self._renamed if os.path.dirname(pair[1]) != arguments[0]]

    @staticmethod
    def _key(status: os.stat_result) -> tuple[int, int]:
        return status.st_dev, status.st_ino

    def _change(self, status: os.stat_result, appends: bool = False) -> None:
        self._synced.setdefault(self._key(status), status.st_size if appends else 0)

    def lose(self, directory: Path, chosen: random.Random) -> None:
        for path in [path for path in directory.rglob("*") if path.is_file()]:
            status = path.stat()
            safe = self._synced.get(self._key(status))
            if safe is not None and chosen.random() < 0.7:
                data = path.read_bytes()[:safe]
                if chosen.random() < 0.7:  # the length may have reached the disk before the bytes
                    data = data.ljust(status.st_size, b"\0")
                path.write_bytes(data)
        for old, new in reversed(self._renamed):
            if os.path.isdir(os.path.dirname(old)) and os.path.exists(new) and chosen.random() < 0.5:
                os.rename(new, old)


def stop(call: Callable[[], Any], number: int) -> Disk:
    """Run until the power fails before that call; what the disk has for certain."""
    disk = Disk(number)
    with pytest.MonkeyPatch.context() as patch:
        replace_calls(CHANGING, disk.before, disk.after, patch.setattr)
        with contextlib.suppress(PowerFailed):
            call()
    return disk


def fail_power(
    call: Callable[[Path], Any], root: Path, source: Path, wanted: Files, *, last: int | None = None, seeds: int = 1
) -> int:
    """Let the power fail before each call of ``call(directory)`` that changes something, and then call it again.

    Args:
        last: only before that many of the last ones.
    """
    root.mkdir()
    total = stop(lambda: call(root / "counted"), 10**9).calls
    for seed in range(seeds):
        for number in range(total, 0 if last is None else total - last, -1):
            directory = new_directory(root / f"{seed}-{number}", source)
            disk = stop(partial(call, directory), number)
            disk.lose(directory, random.Random(1000 * seed + number))
            whole = assert_whole_or_refused(directory, wanted)
            if whole:
                with contextlib.suppress(DestinationError):
                    call(directory)
            else:
                call(directory)
            assert everything(directory) == wanted
    return total


def converts(source: Path, kind: str) -> Callable[[Path], Any]:
    return lambda directory: amc.convert_checkpoint(source, directory, **KINDS[kind])


def saves(model: Any) -> Callable[[Path], Any]:
    return lambda directory: amc.save_checkpoint(model, directory, **SIZES)


def test_a_conversion_whose_power_fails_is_refused_by_loaders_and_then_finished(source, wanted, tmp_path):
    kind = "in few files"
    assert fail_power(converts(source, kind), tmp_path / "out", source, wanted[kind]) > 50


def test_a_save_whose_power_fails_leaves_nothing_that_loads_and_room_for_the_next(model, source, wanted, tmp_path):
    assert fail_power(saves(model), tmp_path / "out", source, wanted["saved"]) > 50


# --- faults that are planted ------------------------------------------------------------------------------------------


def planted(module: types.ModuleType, text: str, replacement: str) -> types.ModuleType:
    """A module with a fault in it."""
    source = inspect.getsource(module)
    assert source.count(text) == 1
    mutated = types.ModuleType("mutated")
    mutated.__dict__["__name__"] = module.__name__  # for its dataclasses
    exec(compile(source.replace(text, replacement), "mutated", "exec"), mutated.__dict__)
    return mutated


MUTANTS = {
    "a file is noted before it is on the disk": (writing, "            system.sync(fd)\n", ""),
    "a file is noted before it is written": (
        converting,
        "                if to_write:\n",
        "                if to_write:\n                    place.finish(shard)\n",
    ),
    "the index comes first": (
        destination_module,
        "        return [*shards, INDEX_NAME]",
        "        return [INDEX_NAME, *shards]",
    ),
    "the index may reach the disk before the files": (
        destination_module,
        "                if name == names[-1]:",
        "                if False:",
    ),
    "files may reach their places before their bytes": (
        destination_module,
        "            for name in others:\n                _sync(self.path(name))\n",
        "",
    ),
    "a file is written where it will lie": (
        destination_module,
        "        return os.path.join(self.staging, name)",
        "        return os.path.join(self.directory, name)",
    ),
    "what was put in its place stays": (
        destination_module,
        '            system.write_end(self._journal, _line({"placing": placed}))\n',
        "",
    ),
}


def use(patch: pytest.MonkeyPatch, module: types.ModuleType, mutated: types.ModuleType) -> None:
    """Put what the front doors use of a module in the place of its own."""
    if module is converting:
        patch.setattr(amc, "convert_checkpoint", mutated.convert_checkpoint)
    for name in ("begin_shard", "write_slabs", "open_destination"):
        for door in (converting, saving):
            if hasattr(mutated, name) and module is not converting:
                patch.setattr(door, name, getattr(mutated, name))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_failing_power_finds_each_fault_that_is_planted(model, source, wanted, tmp_path, monkeypatch, mutant):
    module, *change = MUTANTS[mutant]
    use(monkeypatch, module, planted(module, *change))
    kind = "saved" if "placing" in change[0] else "regrouped"
    call = saves(model) if kind == "saved" else converts(source, kind)
    with pytest.raises((AssertionError, DestinationError, VerificationError, pytest.fail.Exception)):
        fail_power(call, tmp_path / "out", source, wanted[kind], last=35, seeds=10)


FOUND_BY = {
    "nobody takes the lock": (
        destination_module,
        "            if not system.lock(fd):",
        "            if False:",
        test_a_second_conversion_of_the_same_process_is_refused,
        {},
    ),
    "an error is swallowed": (
        writing,
        "            system.reserve(fd, shard.nbytes)\n",
        "            try: system.reserve(fd, shard.nbytes)\n            except OSError: pass\n",
        test_a_disk_that_is_full_from_some_call_on,
        {"name": "reserve"},
    ),
    "a file that is written anew counts as finished": (
        destination_module,
        '_line({"again": name})',
        '_line({"finished": name})',
        test_a_finished_file_that_was_damaged_is_written_again_whatever_happens_then,
        {"damage": "truncated"},
    ),
    "another work is taken for this one": (
        destination_module,
        "        if earlier.work != work:",
        "        if False:",
        test_an_unfinished_work_of_another_kind_is_refused_and_can_still_be_finished,
        {"call": 40},
    ),
    "a source may change": (
        converting,
        "        if now != state:",
        "        if False:",
        test_a_source_that_changes_during_the_run_is_refused_at_its_end,
        {"gone": False},
    ),
    "a checkpoint is overwritten": (
        destination_module,
        "    if present:",
        "    if False:",
        test_a_directory_with_a_checkpoint_is_refused_and_left_alone,
        {"name": INDEX},
    ),
    "what makes it a checkpoint is taken back last": (
        destination_module,
        "reversed(list(placed))",
        "list(placed)",
        test_what_makes_it_a_checkpoint_is_taken_back_first,
        {},
    ),
}


@pytest.mark.parametrize("mutant", FOUND_BY)
def test_a_test_finds_each_fault_that_is_planted(forked, model, source, wanted, tmp_path, monkeypatch, mutant):
    module, text, replacement, test, arguments = FOUND_BY[mutant]
    use(monkeypatch, module, planted(module, text, replacement))
    given = {"forked": forked, "model": model, "source": source, "wanted": wanted, "tmp_path": tmp_path}
    given |= {"monkeypatch": monkeypatch, **arguments}
    with pytest.raises((AssertionError, ConversionError, pytest.fail.Exception)):
        test(**{name: given[name] for name in inspect.signature(test).parameters})
