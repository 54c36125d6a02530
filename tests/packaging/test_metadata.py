"""Tests that the files that describe a release agree with pyproject.toml."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import automodel_conv
from tests.packaging import installs, trying

tomllib = pytest.importorskip("tomllib")

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {"torch": "pytorch", "typing-extensions": "typing_extensions"}


def recipe() -> dict:
    return yaml.safe_load((REPOSITORY / "conda" / "recipe.yaml").read_text())


def workflow(name: str) -> str:
    return (REPOSITORY / ".github" / "workflows" / name).read_text()


def test_conda_recipe_and_citation_have_the_version_of_the_package():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert PROJECT["dynamic"] == ["version"]
    assert citation["version"] == recipe()["context"]["version"] == automodel_conv.__version__


def test_conda_recipe_requires_what_the_package_requires():
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    expected = {f"{CONDA_NAMES.get(one.name, one.name)} {one.specifier}".strip() for one in requirements}
    python, system, *run = recipe()["requirements"]["run"]
    assert set(run) == expected
    assert (python, system) == ("python >=${{ python_min }}", "__linux")
    assert PROJECT["requires-python"] == f">={recipe()['context']['python_min']}"


def test_requirements_of_the_package_have_lower_bounds():
    without = [text for text in PROJECT["dependencies"] if ">=" not in text]
    assert without == []


def test_supported_pythons_are_those_of_classifiers_installs_and_workflows():
    listed = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    matrix = "python: [" + ", ".join(f'"{version}"' for version in listed) + "]"
    assert list(installs.PYTHONS) == listed
    assert matrix in workflow("ci.yml")
    assert matrix in workflow("release.yml")


def test_each_extra_of_a_user_is_installed_and_tried():
    users = set(EXTRAS) - {"dev", "vllm"}
    assert set(installs.EXTRAS) == users | {""}
    assert set(trying.TRIALS) == users | {""}


def test_all_has_every_extra_of_a_user_except_vllm():
    [everything] = EXTRAS["all"]
    assert Requirement(everything).extras == set(EXTRAS) - {"all", "dev", "vllm"}


def test_urls_are_those_of_the_repository_and_the_site():
    urls = PROJECT["urls"]
    assert set(urls) == {"Homepage", "Documentation", "Repository", "Changelog", "Issues"}
    for url in urls.values():
        assert url.startswith(("https://github.com/automodel-conv/automodel_conv", "https://automodel-conv.github.io/"))


def test_workflows_use_actions_of_one_exact_version():
    uses = re.findall(r"uses: (\S+)@(\S+)", "".join(workflow(name) for name in ("ci.yml", "docs.yml", "release.yml")))
    assert uses != []
    assert [version for _, version in uses if not re.fullmatch(r"v\d+\.\d+\.\d+", version)] == []
    assert len(set(uses)) == len({action for action, _ in uses})


def test_every_requirement_of_the_dockerfile_is_in_the_context():
    lines = (REPOSITORY / "benchmarks" / "Dockerfile").read_text().splitlines()
    copied = {name.rstrip("/") for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed


@pytest.mark.packaging
def test_wheel_has_the_metadata_of_the_project(wheel, environment):
    environment.install(wheel)
    [distribution] = metadata.distributions(name="automodel-conv", path=[str(environment.site_packages)])
    assert distribution.version == automodel_conv.__version__
    assert set(distribution.metadata.get_all("Provides-Extra") or []) == set(EXTRAS)
    core = {str(one) for one in map(Requirement, distribution.requires or []) if "extra ==" not in str(one.marker)}
    assert core == {str(Requirement(text)) for text in PROJECT["dependencies"]}
    assert len(distribution.metadata.get_all("Project-URL") or []) == len(PROJECT["urls"])
