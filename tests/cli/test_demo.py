"""Tests of ``demo``: it compares both loads, reports one bit that differs, and prints nothing of other packages."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from automodel_conv.cli import demo
from automodel_conv.cli.app import show_demo
from automodel_conv.errors import ConversionError, UnsupportedError, WriteError
from automodel_conv.upstream.registry import transformers_available
from tests.cli.support import GATE_UP, run

needs_transformers = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return the code file that every new interpreter runs at its start."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    return folder / "sitecustomize.py"


@needs_transformers
def test_demo_compares_both_loads_and_removes_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "RUNS", 1)
    assert show_demo(demo.TINY, str(tmp_path))
    shown = capsys.readouterr().out
    assert str(tmp_path) in shown
    assert "│         all │" in shown
    assert list(tmp_path.iterdir()) == []


@needs_transformers
def test_demo_shows_its_progress_and_no_output_of_other_packages(tmp_path, site, capfd, monkeypatch):
    site.write_text("import sys; print('from a package'); print('a warning', file=sys.stderr)")
    monkeypatch.setattr(demo, "RUNS", 1)
    lines = []
    result = demo.run_demo(demo.TINY, str(tmp_path), lines.append)
    assert [line.split()[0] for line in lines] == ["importing", "writing", "39", "loading", *demo.METHODS]
    assert result.different == ()
    assert capfd.readouterr() == ("", "")


@needs_transformers
def test_page_of_the_plan_is_written_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RUNS", 1)
    page, temporary = tmp_path / "plan.html", tmp_path / "temporary"
    temporary.mkdir()
    lines = []
    demo.run_demo(demo.TINY, str(temporary), lines.append, page)
    assert "2 layers with 3 experts each</title>" in page.read_text()
    assert [line for line in lines if str(page) in line] == [f"its plan, to look at in a browser: {page}"]
    assert list(temporary.iterdir()) == []


@needs_transformers
def test_page_that_cannot_be_written_is_an_error_before_the_loads(tmp_path):
    lines = []
    with pytest.raises(WriteError, match=r"absent/plan\.html"):
        demo.run_demo(demo.TINY, str(tmp_path), lines.append, tmp_path / "absent" / "plan.html")
    assert not [line for line in lines if line.startswith("loading")]
    assert list(tmp_path.iterdir()) == []


@needs_transformers
def test_interrupted_demo_ends_its_processes_and_removes_its_files(tmp_path):
    """Signal only the process that a user started, as ``kill`` does."""
    code = "import sys; from automodel_conv.cli import demo; demo.run_demo(demo.BIG, sys.argv[1], print)"
    command = [sys.executable, "-u", "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("writing"):
                break
        [child] = psutil.Process(process.pid).children()
        workers = [child, *child.children()]
        process.send_signal(signal.SIGINT)
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert list(tmp_path.iterdir()) == []


def test_output_of_a_step_that_fails_is_in_the_error(tmp_path, site):
    site.write_text("import sys; print('a warning', file=sys.stderr); sys.modules['torch'] = None")
    with pytest.raises(ConversionError, match=r"exit status 1(.|\n)*a warning(.|\n)*import of torch halted"):
        demo.run_demo(demo.TINY, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_demo_without_transformers_says_what_to_install(tmp_path, site):
    site.write_text("import sys; sys.modules['transformers'] = None")
    with pytest.raises(UnsupportedError, match=r"pip install 'automodel-conv\[transformers\]'"):
        demo.run_demo(demo.TINY, str(tmp_path))


@needs_transformers
def test_demo_fails_and_names_a_tensor_that_differs_in_one_bit(monkeypatch, tmp_path):
    events = demo._events

    def lying(*arguments):
        for event in events(*arguments):
            if event.get("method") == "automodel_conv":
                event["load"]["digests"][GATE_UP] = "0"
            yield event

    monkeypatch.setattr(demo, "_events", lying)
    monkeypatch.setattr(demo, "BIG", demo.TINY)
    result = run("demo", "--directory", tmp_path)
    assert result.exit_code == 1
    assert f"different: {GATE_UP}" in result.stderr
    assert "│         all │" not in result.stdout
    assert "│          no │" in result.stdout
