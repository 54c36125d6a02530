"""Install the wheel with each extra on each Python, in new environments, and try it there.

    python tests/packaging/installs.py [--wheel FILE] [--python 3.12 ...] [--extra hub ...] [--lowest]

It needs uv on PATH and a package index. Environments are temporary, and share their files through uv's cache. One line
is printed for each environment; the exit code is 1 if any failed. ``--lowest`` installs the oldest release that
pyproject.toml allows of each requirement.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The extras that each environment has; "" is none. vllm is too large.
EXTRAS = ("", "transformers", "triton", "hub", "http", "s3", "gcs", "all")
SHOWN = ("torch", "transformers", "triton", "huggingface-hub", "certifi", "fsspec", "s3fs", "gcsfs", "numpy", "typer")


class Failed(Exception):
    """A command that exited with an error, and the end of its output."""


def run(*command: object, cwd: Path) -> str:
    """Return the output of a command; a failure raises with its last lines."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise Failed("\n".join((done.stdout + done.stderr).splitlines()[-25:]))
    return done.stdout


@dataclass(frozen=True)
class Trial:
    """One environment."""

    wheel: Path
    python: str
    """Version of Python, or path of an interpreter."""
    extra: str
    lowest: bool

    def install(self, root: Path) -> None:
        """Create the environment and install the wheel with its extra."""
        run("uv", "venv", "--quiet", "--python", self.python, root, cwd=root.parent)
        install = ("uv", "pip", "install", "--quiet", "--python", root)
        if self.lowest:  # direct requirements only, so they are read from pyproject.toml
            extra = ("--extra", self.extra) if self.extra else ()
            lowest = ("--resolution", "lowest-direct", "--requirements", REPOSITORY / "pyproject.toml", *extra)
            run(*install, *lowest, cwd=root.parent)
            run(*install, "--no-deps", self.wheel, cwd=root.parent)
        else:
            run(*install, f"automodel-conv[{self.extra}] @ {self.wheel.as_uri()}", cwd=root.parent)

    def use(self, root: Path) -> str:
        """Use the package as its users do, and return the versions of what it needs."""
        python, elsewhere = root / "bin" / "python", root.parent
        script = "import sysconfig; print(sysconfig.get_path('purelib'))"
        package = Path(run(python, "-c", script, cwd=elsewhere).strip(), "automodel_conv")
        run(python, HERE / "smoke.py", package, cwd=elsewhere)
        run(python, HERE / "trying.py", *filter(None, [self.extra]), cwd=elsewhere)
        version = run(root / "bin" / "automodel-conv", "--version", cwd=elsewhere).strip()
        if f"-{version}-" not in self.wheel.name:
            raise Failed(f"automodel-conv --version prints {version}")
        lines = run("uv", "pip", "list", "--format", "freeze", "--python", root, cwd=elsewhere).split()
        return " ".join(line for line in lines if line.partition("==")[0] in SHOWN)


def built_wheel(directory: Path) -> Path:
    """Build the wheel of this checkout."""
    run("uv", "build", "--quiet", "--wheel", "--out-dir", directory, REPOSITORY, cwd=directory)
    [wheel] = directory.glob("*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="the wheel to install; by default, that of this checkout")
    parser.add_argument("--python", action="append", help="version of Python, or interpreter; repeatable")
    parser.add_argument("--extra", action="append", help='extra to install; repeatable; "" installs none')
    parser.add_argument("--lowest", action="store_true", help="install the oldest releases that are allowed")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        wheel = options.wheel.resolve() if options.wheel else built_wheel(Path(directory))
        for python in options.python or PYTHONS:
            for extra in EXTRAS if options.extra is None else options.extra:
                trial = Trial(wheel, python, extra, options.lowest)
                with tempfile.TemporaryDirectory() as place:
                    try:
                        trial.install(Path(place, "environment"))
                        result = f"passed  {trial.use(Path(place, 'environment'))}"
                    except Failed as error:
                        failed += 1
                        result = f"FAILED\n{error}"
                print(f"{python:<5} {extra or '-':<13} {result}", flush=True)
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
