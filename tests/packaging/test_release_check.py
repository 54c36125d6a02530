"""Tests of the checks of `make release-check` before it builds anything."""

import shutil
import subprocess

import pytest

from tests.packaging.environments import REPOSITORY, run

pytestmark = pytest.mark.packaging


@pytest.fixture
def tree(tmp_path):
    """Create a clean checkout with a version under development."""
    for name in ("Makefile", "pyproject.toml", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, tmp_path)
    run("git", "init", "--quiet", cwd=tmp_path)
    commit(tmp_path)
    return tmp_path


def commit(tree):
    run("git", "add", ".", cwd=tree)
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    run("git", *who, "commit", "--quiet", "--message", "all", cwd=tree)


def make(tree, target):
    return subprocess.run(["make", target], cwd=tree, capture_output=True, text=True)


def test_a_file_that_is_not_committed_is_named(tree):
    assert make(tree, "release-tree").returncode == 0
    (tree / "forgotten.py").write_text("")
    done = make(tree, "release-tree")
    assert done.returncode
    assert "forgotten.py" in done.stdout


def test_a_version_under_development_is_refused(tree):
    done = make(tree, "release-notes")
    assert done.returncode
    assert "dev" in done.stderr


@pytest.mark.parametrize(("heading", "fits"), [("## [9.8.7] - 2026-01-31", True), ("## [9.8.7]", False), ("", False)])
def test_changelog_must_name_the_version_and_its_date(tree, heading, fits):
    settings = (tree / "pyproject.toml").read_text()
    [line] = [line for line in settings.splitlines() if line.startswith("version = ")]
    (tree / "pyproject.toml").write_text(settings.replace(line, 'version = "9.8.7"'))
    (tree / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    done = make(tree, "release-notes")
    assert (done.returncode == 0) == fits
    assert fits or "CHANGELOG.md" in done.stderr


def test_release_check_includes_the_whole_check():
    plan = run("make", "--dry-run", "release-check", cwd=REPOSITORY)
    for step in ("git status", "CHANGELOG.md", "pip-audit", "-m packaging", "twine check"):
        assert step in plan
