"""Tests of fuzzing: inputs of the corpus, mutations of the seeds, and a few seconds of coverage-guided fuzzing.

Coverage-guided fuzzing needs atheris (``make test-fuzz``). ``python -m tests.fuzz`` fuzzes for longer; ``runs.csv``
records the runs so far.
"""

import importlib.util
import os
from random import Random

import pytest

from automodel_conv.files import header, system
from tests.fuzz.__main__ import CORPUS, NAMES, fuzz
from tests.fuzz.memory import Memory
from tests.fuzz.planted import PLANTED, plant
from tests.fuzz.targets import TARGETS, Finding, check_header, packed

SECONDS = 8
MOST_SECONDS_FOR_A_MISTAKE = 60
MUTATIONS = 300

every_target = pytest.mark.parametrize("name", NAMES)
every_mistake = pytest.mark.parametrize("mistake", PLANTED)
with_atheris = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")


@every_target
def test_every_input_of_the_corpus_is_accepted_or_refused(name):
    inputs = [*TARGETS[name].seeds(), *(path.read_bytes() for path in sorted((CORPUS / name).glob("*")))]
    assert len(inputs) > len(TARGETS[name].seeds())
    for data in inputs:
        TARGETS[name].check(data)


@every_target
def test_mutations_of_the_seeds_are_accepted_or_refused(name):
    random = Random(1)
    for _ in range(MUTATIONS):
        data = random.choice(TARGETS[name].seeds())
        for _ in range(random.randint(1, 2)):
            data = TARGETS[name].mutate(data, random)
        TARGETS[name].check(data)


@with_atheris
@every_target
def test_fuzzing_finds_nothing(name, monkeypatch, tmp_path):
    run = in_folder(tmp_path, monkeypatch, name, SECONDS)
    assert not run.found, run.found
    assert run.executions > 100 * SECONDS


@with_atheris
@every_mistake
def test_fuzzing_finds_a_planted_mistake(mistake, monkeypatch, tmp_path):
    run = in_folder(tmp_path, monkeypatch, "header", MOST_SECONDS_FOR_A_MISTAKE, mistake)
    assert "Finding" in run.found, f"not within {run.executions} executions"


def in_folder(folder, monkeypatch, name, seconds, mistake=None):
    """Fuzz in a folder that collects the inputs of findings."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(folder)
    return fuzz(name, seconds, seed=1, planted=mistake)


@every_mistake
def test_planted_mistake_changes_the_functions(mistake, monkeypatch):
    """Check that the functions differ and still accept valid files."""
    before = dict(vars(header))
    try:
        plant(mistake, header)
        for data in TARGETS["header"].seeds():
            check_header(data)
        changed = [name for name, value in before.items() if callable(value) and vars(header)[name] is not value]
        assert "read_header" in changed
    finally:
        vars(header).update(before)


def test_file_refused_by_safetensors_is_a_finding(monkeypatch):
    truncated = packed({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"abc")
    check_header(truncated)
    monkeypatch.setattr(header, "_check_coverage", lambda *_: None)
    with pytest.raises(Finding, match="safetensors says"):
        check_header(truncated)


def test_files_in_memory_are_read_like_real_files():
    real = system.open_readonly
    with Memory({"/c/a": b"abcdef", "/c/d/b": b""}) as memory:
        fd = system.open_readonly("/c/d/../a").fileno()
        views = [memoryview(bytearray(2)), memoryview(bytearray(5))]
        assert system.preadv(fd, views, 1) == 5
        assert [bytes(view) for view in views] == [b"bc", b"def\0\0"]
        assert system.size(fd) == 6
        assert system.list_names("/c") == ["a", "d"]
        assert system.is_directory("/c/d")
        assert not system.exists("/c/e")
        with pytest.raises(FileNotFoundError):
            system.open_readonly("/c/e")
    assert memory.opened == ["/c/a"]
    assert memory.reads == [("/c/a", 1, 8)]
    assert system.open_readonly is real
