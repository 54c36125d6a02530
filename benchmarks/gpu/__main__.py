"""Everything there is to know of one GPU, in one command of a few minutes, whatever goes wrong in it.

    python -m benchmarks.gpu OUT [--minutes 6] [--stage NAME ...] [--resume] [--commit NAME] [--layers N]
    python -m benchmarks.gpu --table FILE     (prints the README's tables from a gpu.json)
    python -m benchmarks.gpu OUT --smoke      (all of it, tiny, on the CPU, in Triton's interpreter)

The stages are the choices of --stage, in that order; before them, the environment. Kernels are measured against copy_
and against torch, the sweep tries other tiles, transfers bound a load; with the round trip come the tests that need all
memory.

OUT is a folder for gpu.json, which is whole after every row, and gpu.log, what each process of the stages said, written
when it ends, at most 8 MiB in all; all else is temporary. Each stage works in processes of its own, has a deadline from
the first second, and what fails in it costs only itself: a failed test is told, a way that writes a wrong byte is not
timed, one that kills its process is left out. --resume goes on from the file: what is there stays, what is missing, or
was wrong, is done. The exit code is 1 if anything was wrong; standard output ends with what was, what was left out for
want of time, and how long all took.

Checkpoints of up to 24 GB lie in --directory while it runs. Where /dev/shm has 30 GB, name that: no disk is timed then.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.gpu import record, tables
from benchmarks.gpu.checkpoints import layers_that_fit
from benchmarks.gpu.listening import Place
from benchmarks.gpu.stages import STAGES, Run, run_all

_LAYERS = 13
_ROOT = "benchmark-gpu-"
_LOCK = "lock"
_LOG = "gpu.log"
_DEVICE = "cuda:0"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", metavar="OUT", help="the folder for gpu.json and gpu.log")
    parser.add_argument("--minutes", type=float, default=6.0, help="what to stay within")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this one; may be given several times")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/gpu.json")
    parser.add_argument("--commit", help="of the code, where the checkout has no .git")
    parser.add_argument("--layers", type=int, help=f"of the long checkpoint, 1.2 GB each; {_LAYERS} by default")
    parser.add_argument("--directory", help="where a temporary directory is made, for the checkpoints")
    parser.add_argument("--tests", default="tests/gpu", help="the tests to run")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU; the times mean nothing")
    parser.add_argument("--table", metavar="FILE", help="print the tables of a gpu.json and do nothing else")
    options = parser.parse_args(arguments)
    if options.table:
        sys.stdout.write(tables.markdown(measure.read_json(options.table)))
        return
    if options.out is None:
        parser.error("OUT is missing: the folder for gpu.json")
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke tries everything on the CPU")
    if (Path(options.out) / record.NAME).exists() and not options.resume:
        parser.error(f"{options.out} has a {record.NAME} already; --resume goes on from it")
    sys.exit(run(options))


def run(options: argparse.Namespace) -> int:
    """Everything that was asked for; returns the exit code.

    Raises:
        SystemExit: it is not what the record was begun with.
    """
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    kept = record.Record.of if (out / record.NAME).exists() else record.Record.new
    found = kept(out / record.NAME)
    if options.layers not in (None, found.result.get("layers", options.layers)):
        # Rows of checkpoints of other lengths do not compare.
        raise SystemExit(f"the record's checkpoints have {found.result['layers']} layers; leave --layers out")
    found.say = _say
    found.result["runs"].append(
        {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "minutes": options.minutes,
            "stages": options.stage,
            "commit": options.commit,
        }
    )
    with _temporary(options.directory) as root:
        fitting = layers_that_fit(options.layers or _LAYERS, shutil.disk_usage(root).free)
        layers = found.result.setdefault("layers", fitting)
        found.write()
        work = Run(
            device="cpu" if options.smoke else _DEVICE,
            smoke=options.smoke,
            tests=os.path.abspath(options.tests) if os.path.exists(options.tests) else options.tests,
            layers=layers,
            root=root,
            place=Place(_variables(options.smoke), (out / _LOG).absolute()),
            record=found,
            only=tuple(options.stage or ()),
        )
        run_all(work, 60 * options.minutes, _say)
    sys.stdout.write(f"{tables.markdown(found.result)}\n{tables.ending(found.result)}")
    return int(bool(record.problems(found.result)))


@contextmanager
def _temporary(directory: str | None) -> Iterator[Path]:
    """A folder that goes at the end, or, if this process is killed, when the next begins: its lock is free then."""
    for path in Path(directory or tempfile.gettempdir()).glob(f"{_ROOT}*"):
        with suppress(OSError), _locked(path):
            shutil.rmtree(path)
    with tempfile.TemporaryDirectory(prefix=_ROOT, dir=directory) as root:
        Path(root, _LOCK).touch()
        with _locked(Path(root)):
            yield Path(root)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises:
    OSError: another process has it, or it is none of these folders.
    """
    with (folder / _LOCK).open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _variables(smoke: bool) -> dict[str, str]:
    """The interpreter on or off: the tests would turn it on."""
    return {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if smoke else {"TRITON_INTERPRET": "0"}


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
