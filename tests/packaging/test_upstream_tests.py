"""Tests that run transformers' own tests under the hook, from its source distribution."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from tests.packaging.environments import REPOSITORY, run

pytestmark = pytest.mark.packaging

INSTALLED = importlib.metadata.version("transformers")
# Other releases, if `make` has installed them next to this environment.
BESIDE = {path.name.removeprefix("transformers-"): path for path in sorted(Path(sys.prefix).glob("transformers-*"))}
# Modules missing from the distribution that are imported there for other tests.
STUBS = {
    "upstream/__init__.py": "",
    "upstream/exporters/__init__.py": "",
    "upstream/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "upstream/generation/__init__.py": "",
    "upstream/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "parameterized.py": "class parameterized:\n    expand = staticmethod(lambda *args, **kwargs: lambda test: None)\n",
}
# These load grouped experts, and so show that targets were converted by plan.
CONVERTING = ("save_load", "load_contiguous_weights", "correct_missing_keys", "reverse_loading_mapping")


@pytest.mark.parametrize("version", [INSTALLED, *BESIDE])
def test_outcomes_are_those_without_the_hook(tmp_path, version):
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
    run(*download, "--no-binary=transformers", f"transformers=={version}", cwd=tmp_path)
    [distribution] = tmp_path.glob("*.tar.gz")
    for name, text in STUBS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with tarfile.open(distribution) as files:
        for member in files:
            if member.isfile() and Path(member.name).parts[1:-1] == ("tests",) and member.name.endswith(".py"):
                member.name = Path(member.name).name
                files.extract(member, tmp_path / "upstream", filter="data")
    paths = [*([BESIDE[version]] if version in BESIDE else []), tmp_path, REPOSITORY]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    output = run(sys.executable, "-m", "tests.packaging.upstream_common", cwd=REPOSITORY, env=environment)
    outcomes = json.loads(output.splitlines()[-1])
    for name, ended in outcomes.items():
        assert ended["hooked"] == ended["stock"], name
        assert ended["left"] == 0, name
        if name.split()[1] in CONVERTING:
            assert ended["stock"] == "passed", name
            assert ended["lowered"], name
    assert sum(ended["hooked"] == "passed" for ended in outcomes.values()) > len(outcomes) / 2
