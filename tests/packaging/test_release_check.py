"""Tests of the checks of `make release-check` before it builds anything."""

import re
import shutil
import subprocess

import pytest

from tests.packaging.environments import REPOSITORY, run

pytestmark = pytest.mark.packaging


@pytest.fixture
def tree(tmp_path):
    """Create a clean checkout with the version 9.8.7."""
    for name in ("Makefile", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "automodel_conv").mkdir()
    set_version(tmp_path, "9.8.7")
    run("git", "init", "--quiet", cwd=tmp_path)
    commit(tmp_path)
    return tmp_path


def set_version(tree, version):
    text = (REPOSITORY / "automodel_conv" / "__init__.py").read_text()
    changed, count = re.subn(r'^__version__ = ".*"$', f'__version__ = "{version}"', text, flags=re.MULTILINE)
    assert count == 1
    (tree / "automodel_conv" / "__init__.py").write_text(changed)


def commit(tree):
    run("git", "add", ".", cwd=tree)
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    run("git", *who, "commit", "--quiet", "--message", "all", cwd=tree)


def make(tree, target):
    return subprocess.run(["make", "--no-print-directory", target], cwd=tree, capture_output=True, text=True)


def test_a_file_that_is_not_committed_is_named(tree):
    assert make(tree, "release-tree").returncode == 0
    (tree / "forgotten.py").write_text("")
    done = make(tree, "release-tree")
    assert done.returncode
    assert "forgotten.py" in done.stdout


def test_a_version_under_development_is_refused(tree):
    set_version(tree, "9.8.7.dev0")
    done = make(tree, "release-notes")
    assert done.returncode
    assert "dev" in done.stderr


@pytest.mark.parametrize(("heading", "fits"), [("## [9.8.7] - 2026-01-31", True), ("## [9.8.7]", False), ("", False)])
def test_changelog_must_name_the_version_and_its_date(tree, heading, fits):
    (tree / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    done = make(tree, "release-notes")
    assert (done.returncode == 0) == fits
    assert fits or "CHANGELOG.md" in done.stderr


def test_notes_of_a_release_are_its_section_of_the_changelog(tree):
    (tree / ".ci").mkdir()
    script = shutil.copy(REPOSITORY / ".ci" / "release-notes", tree / ".ci")
    parts = ("## [Unreleased]", "## [9.8.7] - 2026-01-31", "### Added", "- a", "## [9.8.6] - 2026-01-30", "- b")
    (tree / "CHANGELOG.md").write_text("\n\n".join(parts))
    assert run(script, "9.8.7", cwd=tree) == "### Added\n\n- a\n\n"
    assert run(script, make(tree, "version").stdout.strip(), cwd=tree) == "### Added\n\n- a\n\n"
    with pytest.raises(RuntimeError, match="no section for 9"):
        run(script, "9", cwd=tree)


def test_release_check_includes_the_whole_check():
    plan = run("make", "--dry-run", "release-check", cwd=REPOSITORY)
    for step in ("git status", "CHANGELOG.md", "pip-audit", "-m packaging", "twine check"):
        assert step in plan
