"""Run the blocks of one page, in the current folder: ``python driver.py JOB``, a JSON file that ``running`` writes.

This file imports nothing else of the tests, and nothing that a page should import itself. Standard output of each block
goes to a file, from every process that the block starts, and is compared with the output that the page expects.
"""

from __future__ import annotations

import difflib
import doctest
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class Failure(Exception):
    """A block that does not do what its page says."""


def main() -> None:
    """Run the blocks of the job; exit with status 1 and a message that names page and line if one fails."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    module = types.ModuleType("__main__")  # the names of the page, not those of this file
    sys.modules["__main__"] = module
    sys.path[0] = os.getcwd()  # as for a script in this folder
    sys.argv = [job["page"]]
    for block in job["blocks"]:
        try:
            run_block(block, job["page"], vars(module), job["has_gpu"])
        except Failure as failure:
            sys.stderr.write(f"{job['page']}:{block['line']}: {failure}\n")
            sys.exit(1)


def run_block(block: Mapping[str, Any], page: str, names: dict[str, Any], has_gpu: bool) -> None:
    """Run, write or compile a block, as the page marks it, and compare its output."""
    if block["title"] is not None:
        _compile_python(block, block["title"], first_line=1)
        Path(block["title"]).parent.mkdir(parents=True, exist_ok=True)
        Path(block["title"]).write_text(block["code"], encoding="utf-8")
        return
    runnable = {"python": _compile_python, "bash": _compile_bash}[block["language"]](block, page, block["line"])
    if block["needs_gpu"] and not has_gpu:
        return
    if block["needs_package"] is not None and find_spec(block["needs_package"]) is None:
        return
    output = _output_of(runnable, names)
    if block["expected"] is not None and (difference := difference_of(block["expected"], output)):
        raise Failure(f"the block prints something else\n{difference}")


def difference_of(expected: str, output: str) -> str:
    """Return how an output differs from the expected one; empty if it does not.

    ``...`` matches anything. Spaces next to it are for the reader: they keep the columns of a table in line.
    """
    want, got = re.sub(r" *\.\.\. *", "...", _plain(expected)), _plain(output)
    if doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS):
        return ""
    lines = difflib.unified_diff(want.splitlines(), got.splitlines(), "expected", "printed", lineterm="")
    return "\n".join([*lines, "the whole output:", got])


def _plain(text: str) -> str:
    """Remove empty lines at both ends, and spaces at the ends of lines, which editors remove too."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()).rstrip() + "\n"


def _compile_python(block: Mapping[str, Any], file: str, first_line: int) -> Callable[[dict[str, Any]], None]:
    """Compile a block so that tracebacks show its lines in the page."""
    try:
        code = compile("\n" * (first_line - 1) + block["code"], file, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise Failure("".join(traceback.format_exception_only(error))) from None

    def run(names: dict[str, Any]) -> None:
        try:
            exec(code, names)
        except SystemExit as error:
            if error.code not in (None, 0):
                raise Failure(f"the block ends with sys.exit({error.code!r})") from None
        except BaseException as error:
            frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
            raise Failure("".join(traceback.format_exception(type(error), error, frames))) from None

    return run


def _compile_bash(block: Mapping[str, Any], page: str, first_line: int) -> Callable[[dict[str, Any]], None]:
    """Check the syntax of a block; its messages have the lines of the page."""
    # On one line, so that the lines below keep their numbers.
    trap = """trap 's=$?; echo "$0:$LINENO: exit status $s" >&2' ERR;"""
    code = ("\n" * (first_line - 2) + trap + "\n" if first_line > 1 else trap) + block["code"]
    parsed = subprocess.run(["bash", "-n", "-c", code, page], capture_output=True, text=True)
    if parsed.returncode:
        raise Failure(parsed.stderr)

    def run(names: dict[str, Any]) -> None:
        done = subprocess.run(["bash", "-E", "-e", "-c", code, page], stdin=subprocess.DEVNULL)
        if done.returncode:
            raise Failure(f"bash ends with status {done.returncode}")

    return run


def _output_of(run: Callable[[dict[str, Any]], None], names: dict[str, Any]) -> str:
    """Run a block and return what it and its processes write to standard output, which is also shown."""
    sys.stdout.flush()
    shown = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            run(names)
        finally:
            sys.stdout.flush()
            os.dup2(shown, 1)
            os.close(shown)
            file.seek(0)
            output = file.read().decode(errors="replace")
            sys.stdout.write(output)
            sys.stdout.flush()
    return output


if __name__ == "__main__":
    main()
