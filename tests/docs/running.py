"""Start one process for the blocks of a page, in an empty folder, with a Hub on the loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.docs.blocks import Block
from tests.loopback_hub import Hub, environment

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("driver.py")
EXIT = ROOT / "tests" / "exit"
# Far above the seconds of any page, even on a machine that does much else.
TIME_LIMIT = 900.0
# The default size of a terminal. Settings of this run are not those of a user.
_SET = {"COLUMNS": "80", "LINES": "24", "TERM": "dumb", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
_UNSET = ("TRITON_INTERPRET", "FORCE_COLOR", "PYTEST_CURRENT_TEST", "PYTHONWARNINGS")


def run_blocks(
    blocks: Sequence[Block],
    page: Path,
    folder: Path,
    hub: Hub,
    *,
    variables: Mapping[str, str] | None = None,
    has_gpu: bool = False,
    time_limit: float = TIME_LIMIT,
) -> subprocess.CompletedProcess[str]:
    """Run the blocks of a page and return the finished process, with all that it and its children printed.

    Args:
        page: the page, whose path messages and tracebacks show.
        folder: directory for the files of the run. The blocks run in an empty folder inside it.
        variables: environment variables for the blocks, in addition to those that direct them to the Hub.
        has_gpu: whether blocks that need a GPU run.
        time_limit: seconds after which the page and all processes that it has started are killed.
    """
    work = folder / "work"
    work.mkdir()
    job = folder / "job.json"
    settings = {"page": str(page), "blocks": [block._asdict() for block in blocks], "has_gpu": has_gpu}
    job.write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, str(DRIVER), str(job)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        command,
        cwd=work,
        env={**_environment(hub, folder), **(variables or {})},
        text=True,
        start_new_session=True,
        **pipes,
    )
    try:
        output, errors = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        _kill_all(process)
        output, errors = process.communicate()
        errors += f"{page}: not finished after {time_limit:.0f} s\n"
    finally:
        _kill_all(process)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a process and those that it has started, which are a process group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(hub: Hub, folder: Path) -> dict[str, str]:
    variables = environment(hub, folder / "hub")
    paths = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH"), str(EXIT)])),
        "HF_HOME": str(folder / "hf"),
    }
    kept = {name: value for name, value in variables.items() if name not in _UNSET and not _of_pytest(name)}
    return kept | paths | _SET


def _of_pytest(name: str) -> bool:
    return name.startswith("PYTEST_")
