"""Tests that one version of each tool is pinned everywhere."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def pins(text: str) -> dict[str, str]:
    """Return requirements of the form ``name[extra]==version``, by name."""
    return dict(re.findall(r"([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?==([^\s\"';]+)", text))


@pytest.mark.parametrize("tool", ["ruff", "pyright"])
def test_pre_commit_runs_the_pinned_version(tool):
    pinned = pins((REPOSITORY / "requirements-dev.txt").read_text())
    hooks = pins((REPOSITORY / ".pre-commit-config.yaml").read_text())
    assert hooks[tool] == pinned[tool]


def test_every_development_requirement_is_pinned():
    lines = (REPOSITORY / "requirements-dev.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in requirements if not pins(line)] == []
