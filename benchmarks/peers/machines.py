"""States of a machine that a load may meet, each set up by a context manager, or an error with the reason why not.

Each receives the checkpoint, a directory of its own on the same file system, and whether to go to the machine's limit.
If not, it uses only 64 MiB, which is enough to exercise the code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks import measure, memory

_LITTLE = 64 << 20
# In addition to the model, an interpreter with torch and the modelling module uses 280 MB.
_LIMIT, _INTERPRETER_BYTES = 1.15, 320 << 20
_OVERLAY = 'mount -t overlay overlay -o "lowerdir=$1:$2" "$3" && shift 3 && exec "$@"'
_LIMITED = 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"'


class Unavailable(Exception):
    """The state cannot be set up on this machine, or not with these rights; with the reason."""


class State(NamedTuple):
    """How to load in that state.

    Args:
        directory: path at which a loading process sees the checkpoint.
        prefix: words to put before its command.
        loads: number of processes that load at once.
        before: function that is called before each run.
    """

    directory: str
    prefix: Sequence[str] = ()
    loads: int = 1
    before: Callable[[], None] = lambda: None


class Machine(NamedTuple):
    """A state: how to set it up, and the states of the page cache that it allows."""

    title: str
    make: Callable[[str, str, bool], AbstractContextManager[State]]
    caches: tuple[str, ...] = ("warm",)
    """The states of the page cache that the checkpoint can be in."""


@contextmanager
def quiet(checkpoint: str, root: str, fully: bool) -> Iterator[State]:
    """Change nothing."""
    yield State(checkpoint)


@contextmanager
def page_cache_full(checkpoint: str, root: str, fully: bool) -> Iterator[State]:
    """Fill all free memory except a little with the page cache of another file, which is sparse."""
    total = _total() if fully else _LITTLE
    left = max(512 << 20, total // 50) if fully else 0
    path = Path(root) / "other"
    with path.open("wb") as file:
        file.truncate(total)
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as other:

        def fill() -> None:
            for _ in range(0, total, len(buffer)):
                if _free() <= left:
                    return
                if not other.readinto(buffer):
                    other.seek(0)
                    other.readinto(buffer)
            if fully:
                raise Unavailable(f"{_free() >> 20} MiB are still free after reads of {total >> 20} MiB")

        fill()
        yield State(checkpoint, before=fill)


@contextmanager
def fragmented(checkpoint: str, root: str, fully: bool) -> Iterator[State]:
    """Run a process that allocates nearly all free memory in small pages and frees 15 of 16 pages."""
    nbytes = max(_free() - (512 << 20), _LITTLE) if fully else _LITTLE
    command = [sys.executable, "-m", "benchmarks.peers.holding", str(nbytes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=measure.REPOSITORY
    ) as helper:
        output, input_ = helper.stdout, helper.stdin
        assert output is not None
        assert input_ is not None

        def hold() -> None:  # repeated each time, because a load frees contiguous memory
            input_.write("\n")
            input_.flush()
            if output.readline() != "held\n":
                raise RuntimeError(f"who holds the memory has ended: {helper.wait()}")

        hold()
        yield State(checkpoint, before=hold)
        input_.close()


@contextmanager
def memory_limit(checkpoint: str, root: str, fully: bool) -> Iterator[State]:
    """Limit loads with a cgroup to 1.15 times the files, plus the memory of an interpreter."""
    limit = int(_LIMIT * measure.file_bytes(checkpoint)) + _INTERPRETER_BYTES
    if Path("/run/systemd/system").exists():
        user = () if os.geteuid() == 0 else ("--user",)
        scope = ("systemd-run", "--scope", "--quiet", *user, "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0")
        _try(scope)
        yield State(checkpoint, scope)
        return
    group = _parent_group() / f"benchmark-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Unavailable(f"no systemd, and no cgroup of one's own: {error}") from error
    try:
        (group / "memory.max").write_text(str(limit))
        prefix = ("sh", "-c", _LIMITED, "sh", str(group))
        _try(prefix)
        yield State(checkpoint, prefix)
    finally:
        group.rmdir()


@contextmanager
def two_loads(checkpoint: str, root: str, fully: bool) -> Iterator[State]:
    """Start two processes at the same time.

    The one that ends last counts.
    """
    yield State(checkpoint, loads=2)


@contextmanager
def overlayfs(checkpoint: str, root: str, fully: bool) -> Iterator[State]:
    """Put the files into the lower directory of an overlay, as in a container image."""
    empty, merged = (os.path.join(root, name) for name in ("empty", "merged"))
    os.mkdir(empty)
    os.mkdir(merged)
    prefix = ("unshare", "-rm", "sh", "-c", _OVERLAY, "sh", empty, checkpoint, merged)
    _try(prefix)
    yield State(merged, prefix)


def _try(prefix: Sequence[str]) -> None:
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable(f"there is no {prefix[0]}") from error
    if done.returncode:
        raise Unavailable(f"{prefix[0]}: {done.stderr.strip()}")


def _parent_group() -> Path:
    """Return the nearest cgroup above this process that allows its subgroups to limit memory."""
    lines = Path("/proc/self/mounts").read_text().splitlines() if Path("/proc/self/mounts").exists() else []
    mounts = [Path(line.split()[1]) for line in lines if line.split()[2] == "cgroup2"]
    if not mounts:
        raise Unavailable("no systemd and no cgroups of version 2")
    of_self = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    own = mounts[0] / of_self.removeprefix("0::").strip("/")
    for group in (own, *own.parents):
        control = group / "cgroup.subtree_control"
        if control.exists() and "memory" in control.read_text().split():
            return group
    raise Unavailable("no systemd, and no cgroup of version 2 above this process limits memory")


def _free() -> int:
    free = memory.free()["free_bytes"]
    if free is None:
        raise Unavailable("this system does not report its free memory")
    return free


def _total() -> int:
    total = memory.total_bytes()
    if total is None:
        raise Unavailable("this system does not report its memory")
    return total


QUIET = "quiet"
MACHINES: Mapping[str, Machine] = {
    QUIET: Machine("nothing else runs", quiet, ("warm", "cold")),
    "cold-cache": Machine("files not in the page cache", quiet, ("cold",)),
    "page-cache-full": Machine("page cache full of other files", page_cache_full),
    "fragmented": Machine("memory fragmented", fragmented),
    "memory-limit": Machine("cgroup limit of 1.15x the files", memory_limit),
    "two-loads": Machine("two loads at once", two_loads),
    "overlayfs": Machine("files on overlayfs", overlayfs),
}
