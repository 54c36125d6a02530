"""Virtual environments, and distributions built for them."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path, **kwargs) -> str:
    """Return standard output of a command; a failure raises with all its output."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, **kwargs)
    if done.returncode:
        raise RuntimeError(f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A new virtual environment that sees its own packages first, then those of this test run."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.root / "lib" / version / "site-packages"

    def pip(self, *arguments: object) -> None:
        run(
            *(sys.executable, "-m", "pip", "--python", self.python, "--quiet"),
            *arguments,
            cwd=self.root,
        )

    def install(self, *requirements: object) -> None:
        self.pip("install", "--no-deps", *requirements)

    def uninstall(self, distribution: str) -> None:
        self.pip("uninstall", "--yes", distribution)

    def see(self, *folders: Path) -> None:
        """Add folders of packages without reading their .pth files (an editable install)."""
        lines = "".join(f"{folder}\n" for folder in folders)
        (self.site_packages / "behind.pth").write_text(lines)


def build_wheel(source: Path, directory: Path) -> Path:
    """Build the wheel of a source tree or of a source distribution."""
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", directory, source, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built
