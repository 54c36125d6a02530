"""Test and measure one GPU, in one command of a few minutes that continues after any failure.

    python -m benchmarks.gpu OUT [--minutes 6] [--stage NAME ...] [--resume] [--commit NAME] [--layers N]
    python -m benchmarks.gpu --table FILE     (prints the tables of a gpu.json for docs/performance.md)
    python -m benchmarks.gpu OUT --smoke      (all of it, tiny, on the CPU, in Triton's interpreter)

The stages are the choices of --stage, in that order, after the environment. A stage consists of cells, each of which is
one measurement or test. Kernels are measured against copy_ and against torch, the sweep tries other tiles, and
transfers show the bounds of a load. The tests that need all memory run with the round trip.

OUT is a folder for gpu.json, which is complete after every row, and gpu.log, the output of each stage's processes,
written when they end, at most 8 MiB in all. Everything else is temporary. Each stage runs in processes of its own and
has a deadline from the first second. A failure affects only its own cell: a failed test is reported, a way that writes
a wrong byte is not timed, a way that kills its process is left out. --resume continues from the file: it keeps correct
rows and runs what is missing or was wrong. The exit code is 1 if anything was wrong. Standard output ends with the
failures, the cells that were left out for lack of time, and the time of each stage.

Checkpoints of up to 24 GB are stored in --directory while the command runs. If /dev/shm has 30 GB, pass it: then no
disk is timed.
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
    parser.add_argument("--minutes", type=float, default=6.0, help="time limit")
    parser.add_argument("--stage", action="append", choices=STAGES, help="run only this stage; repeatable")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/gpu.json")
    parser.add_argument("--commit", help="commit of the code, if the checkout has no .git")
    parser.add_argument("--layers", type=int, help=f"layers of the long checkpoint, 1.2 GB each; {_LAYERS} by default")
    parser.add_argument("--directory", help="parent of the temporary directory for the checkpoints")
    parser.add_argument("--tests", default="tests/gpu", help="the tests to run")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU; the times are meaningless")
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
    """Run everything that was requested and return the exit code.

    Raises:
        SystemExit: the options differ from those with which the record was begun.
    """
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    kept = record.Record.of if (out / record.NAME).exists() else record.Record.new
    kept_record = kept(out / record.NAME)
    if options.layers not in (None, kept_record.result.get("layers", options.layers)):
        # Rows of checkpoints with other lengths are not comparable.
        raise SystemExit(f"the record's checkpoints have {kept_record.result['layers']} layers; leave --layers out")
    kept_record.say = _say
    kept_record.result["runs"].append(
        {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "minutes": options.minutes,
            "stages": options.stage,
            "commit": options.commit,
        }
    )
    with _temporary(options.directory) as root:
        fitting = layers_that_fit(options.layers or _LAYERS, shutil.disk_usage(root).free)
        layers = kept_record.result.setdefault("layers", fitting)
        kept_record.write()
        work = Run(
            device="cpu" if options.smoke else _DEVICE,
            smoke=options.smoke,
            tests=os.path.abspath(options.tests) if os.path.exists(options.tests) else options.tests,
            layers=layers,
            root=root,
            place=Place(_variables(options.smoke), (out / _LOG).absolute()),
            record=kept_record,
            only=tuple(options.stage or ()),
        )
        run_all(work, 60 * options.minutes, _say)
    sys.stdout.write(f"{tables.markdown(kept_record.result)}\n{tables.ending(kept_record.result)}")
    return int(bool(record.problems(kept_record.result)))


@contextmanager
def _temporary(directory: str | None) -> Iterator[Path]:
    """Create a folder and remove it at the end.

    If this process is killed, the next call removes it.
    """
    for path in Path(directory or tempfile.gettempdir()).glob(f"{_ROOT}*"):
        with suppress(OSError), _locked(path):
            shutil.rmtree(path)
    with tempfile.TemporaryDirectory(prefix=_ROOT, dir=directory) as root:
        Path(root, _LOCK).touch()
        with _locked(Path(root)):
            yield Path(root)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a temporary folder.

    Raises:
        OSError: another process holds the lock, or it is not one of these folders.
    """
    with (folder / _LOCK).open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _variables(smoke: bool) -> dict[str, str]:
    """Return the variables that turn the interpreter on or off.

    The tests would turn it on.
    """
    return {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if smoke else {"TRITON_INTERPRET": "0"}


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
