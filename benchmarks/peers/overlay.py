"""The peers, pinned in ``benchmarks/peers.txt``, in a separate folder next to the development environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from benchmarks import measure

PINS = measure.REPOSITORY / "benchmarks" / "peers.txt"
FOLDER = measure.REPOSITORY / ".venv" / "peers"
_STAMP = "installed.txt"


def install(pins: Path = PINS, folder: Path = FOLDER) -> Path:
    """Install the pinned packages unless they are installed.

    Return the folder, which belongs on Python's path.

    Raises:
        subprocess.CalledProcessError: pip failed; it has printed the reason.
    """
    stamp = folder / _STAMP
    if not stamp.exists() or stamp.read_text() != pins.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        sys.stderr.write(f"  installing {pins.name} to {folder}\n")
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(folder), "-r", str(pins)]
        subprocess.run(pip, check=True)
        stamp.write_text(pins.read_text())
    return folder


def use() -> None:
    """Install the packages, and import from the folder what this process lacks."""
    folder = str(install())
    if folder not in sys.path:
        sys.path.append(folder)


def version(package: str) -> str | None:
    """Return the version of a package that is installed here or in the folder."""
    distributions = metadata.distributions(name=package, path=[*sys.path, str(FOLDER)])
    return next((distribution.version for distribution in distributions), None)
