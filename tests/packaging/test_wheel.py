"""Tests that built distributions are complete, and work in an environment with only the wheel."""

import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.environments import build_wheel, run

pytestmark = pytest.mark.packaging

SMOKE = Path(__file__).with_name("smoke.py")


def files_of_the_package(sources: Path) -> set[str]:
    """Return the files that the wheel must hold: the link automodel_conv/kernels as the files behind it."""
    folders = (sources / "automodel_conv", sources / "automodel_conv" / "kernels")
    paths = {path for folder in folders for path in folder.rglob("*.py")}
    paths.add(sources / "automodel_conv" / "py.typed")
    paths |= {*(sources / "automodel_conv" / "pictures" / "assets").iterdir()}
    return {path.relative_to(sources).as_posix() for path in paths}


def files_of_the_wheel(wheel: Path) -> set[str]:
    """Return the wheel's files except its metadata; none of them is a link."""
    with zipfile.ZipFile(wheel) as archive:
        links = [i.filename for i in archive.infolist() if (i.external_attr >> 28) == 0o12]
        assert links == []
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def kernel_modules(sources: Path) -> list[str]:
    return sorted(path.stem for path in (sources / "kernels").glob("*.py"))


@pytest.fixture
def installed(environment, wheel, installed_packages):
    environment.install(wheel)
    environment.see(installed_packages)
    return environment


def test_wheel_holds_every_file_and_no_top_level_kernels(sources, wheel):
    files = files_of_the_wheel(wheel)
    assert kernel_modules(sources) != []
    assert "automodel_conv/pictures/assets/plan.html" in files
    assert files == files_of_the_package(sources)
    assert {name.partition("/")[0] for name in files} == {"automodel_conv"}


def test_a_source_distribution_builds_the_same_wheel(sources, wheel, tmp_path):
    # The build backend writes next to the sources, which other tests share.
    tree = shutil.copytree(sources, tmp_path / "tree", symlinks=True)
    build = "import setuptools.build_meta, sys; setuptools.build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not any(name.startswith("kernels") for name in names)
    assert files_of_the_package(sources) | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= names
    assert not any(name.startswith("tests") for name in names)
    again = build_wheel(sdist, tmp_path)
    assert files_of_the_wheel(again) == files_of_the_wheel(wheel)


@pytest.mark.parametrize("options", [[], ["-O"]], ids=["plain", "optimized"])
def test_the_installed_wheel_works_from_another_folder(installed, sources, tmp_path, options):
    script = Path(shutil.copy(SMOKE, tmp_path))
    package = installed.site_packages / "automodel_conv"
    command = (installed.python, *options, script, package, *kernel_modules(sources))
    assert "smoke passed" in run(*command, cwd=tmp_path)


def test_the_smoke_script_can_fail(installed, sources, tmp_path):
    script = Path(shutil.copy(SMOKE, tmp_path))
    (installed.site_packages / "automodel_conv" / "dtypes.py").unlink()
    with pytest.raises(RuntimeError, match=r"dtypes"):
        run(
            *(installed.python, script, installed.site_packages / "automodel_conv"),
            cwd=tmp_path,
        )


def test_the_console_script_answers_help(installed, tmp_path):
    script = installed.root / "bin" / "automodel-conv"
    assert "plan" in run(script, "--help", cwd=tmp_path)
