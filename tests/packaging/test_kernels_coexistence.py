"""Tests next to PyPI's ``kernels``, which owns that import name and which transformers imports: ours gives way."""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest

from tests.packaging.environments import REPOSITORY, Environment, run

pytestmark = pytest.mark.packaging

# A compatible pair: transformers ignores a `kernels` outside its required range.
TRANSFORMERS = "transformers==5.17.0"
THEIRS = ("kernels==0.16.2", "kernels-data==0.16.2")

THEIRS_IMPORTS = """
import sys
from pathlib import Path
import kernels

if getattr(kernels, "__file__", None) != str(Path(sys.argv[1], "kernels", "__init__.py")):
    raise SystemExit(f"not theirs: {kernels}")
"""
TRANSFORMERS_USES_THEIRS = """
import transformers.modeling_utils
from transformers.integrations import hub_kernels

if hub_kernels.LayerRepository is not kernels.LayerRepository:
    raise SystemExit("transformers does not use kernels")
"""
OURS_IMPORTS = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module("automodel_conv.kernels." + name)
"""


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory) -> Path:
    # `make test` runs a leg with this release, and installs it there.
    folder = Path(sys.prefix, TRANSFORMERS.replace("==", "-"))
    if folder.is_dir():
        return folder
    folder = tmp_path_factory.mktemp("transformers")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder)
    run(*pip, TRANSFORMERS, cwd=folder)
    return folder


@pytest.fixture
def behind(transformers_folder, installed_packages) -> tuple[Path, Path]:
    """Return the folders of the pair's transformers and of torch."""
    return transformers_folder, installed_packages


@pytest.fixture(params=["ours first", "theirs first"])
def both(request, environment, wheel, behind) -> Environment:
    steps = [(wheel,), THEIRS]
    for requirements in steps if request.param == "ours first" else reversed(steps):
        environment.install(*requirements)
    environment.see(*behind)
    return environment


@pytest.fixture
def only_theirs(environment, behind) -> Environment:
    environment.install(*THEIRS)
    environment.see(*behind)
    return environment


def check(environment: Environment, code: str, *, cwd: Path) -> None:
    names = sorted(path.stem for path in (REPOSITORY / "kernels").glob("*.py"))
    run(environment.python, "-B", "-c", code, environment.site_packages, *names, cwd=cwd)


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_both_import_and_uninstalling_ours_leaves_theirs_whole(both, tmp_path):
    check(both, THEIRS_IMPORTS + TRANSFORMERS_USES_THEIRS + OURS_IMPORTS, cwd=tmp_path)
    check(both, OURS_IMPORTS + THEIRS_IMPORTS, cwd=tmp_path)
    before = digests(both.site_packages / "kernels")
    both.uninstall("automodel-conv")
    assert not (both.site_packages / "automodel_conv").exists()
    assert before != {}
    assert digests(both.site_packages / "kernels") == before
    check(both, THEIRS_IMPORTS, cwd=tmp_path)


def test_from_the_root_of_a_checkout_both_import(only_theirs):
    code = THEIRS_IMPORTS + TRANSFORMERS_USES_THEIRS + OURS_IMPORTS
    check(only_theirs, code, cwd=REPOSITORY)


def test_from_the_root_of_a_checkout_transformers_imports_without_theirs(environment, behind):
    environment.see(*behind)
    check(environment, "import transformers.modeling_utils" + OURS_IMPORTS, cwd=REPOSITORY)
    with pytest.raises(RuntimeError, match="not theirs"):
        check(environment, THEIRS_IMPORTS, cwd=REPOSITORY)


def test_init_file_in_our_folder_would_shadow_their_package(only_theirs, sources, tmp_path):
    # This is why it has none.
    tree = shutil.copytree(sources, tmp_path / "tree", symlinks=True)
    check(only_theirs, THEIRS_IMPORTS, cwd=tree)
    (tree / "kernels" / "__init__.py").touch()
    with pytest.raises(RuntimeError, match="not theirs"):
        check(only_theirs, THEIRS_IMPORTS, cwd=tree)
