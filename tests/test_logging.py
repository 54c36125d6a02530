"""Tests of what the package logs: the steps of a job at INFO, choices at DEBUG, and what to act on at WARNING."""

import json
import logging
import re
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.files.remote.connections import Connections, Traffic
from automodel_conv.files.remote.requests import PassingFault, Retries


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def lines(caplog):
    """Return a function that returns the messages of this package so far, and forgets them."""
    caplog.set_level(logging.DEBUG, "automodel_conv")

    def taken(level=logging.INFO):
        records = [record for record in caplog.records if record.name.startswith("automodel_conv.")]
        found = [record.getMessage() for record in records if record.levelno == level]
        caplog.clear()
        return [re.sub(r"[\d.]+ (?:\w*B|bytes?)/s", "SPEED", re.sub(r"\d+\.\d+ s\b", "TIME", text)) for text in found]

    return taken


def test_a_load_is_logged_step_by_step(source, lines):
    amc.load_state_dict(source, rules=[])
    assert lines() == [
        f"opened {source}: 2 tensors in 1 file",
        f"planned the load of {source}: 2 targets of 2 sources",
        f"loaded {source}: 32 bytes in TIME, SPEED",
    ]


def test_choices_are_logged_for_who_looks_for_them(source, lines):
    amc.load_state_dict(source, rules=[], threads=1)
    assert lines(logging.DEBUG) == ["load to cpu: 1 threads, new memory: no new memory of 4 MiB or more"]


def test_targets_that_keep_their_values_are_a_warning(source, lines):
    amc.load_model(nn.Linear(3, 2), source)
    assert lines(logging.WARNING) == []
    model = nn.ModuleDict({"weight": nn.Linear(1, 1)})
    amc.load_model(model, source, strict=False)
    assert lines(logging.WARNING) == [
        f"2 targets keep their values, because no tensor of {source} fits them; the first is weight.weight",
    ]


def test_a_conversion_is_logged_from_its_start_to_its_end(source, tmp_path, lines):
    new = tmp_path / "new"
    amc.convert_checkpoint(source, new, rules=[])
    opened = f"opened {source}: 2 tensors in 1 file"
    started, ended = f"converting {source} to {new}: 1 file", f"converted {source} to {new}: 4.1 kB in TIME"
    assert lines() == [opened, started, ended]
    amc.convert_checkpoint(source, new, rules=[])
    assert lines() == [opened, f"{new} is complete already: it was compared with the source"]


def test_a_conversion_that_continues_says_what_is_done(source, tmp_path, lines, monkeypatch):
    from automodel_conv.publishing import conversion_files

    options = {"rules": [], "max_shard_size": 30, "verify": False}
    write, files = conversion_files.write_slabs, []

    def write_one(slabs, path, *others):
        if files:
            raise KeyboardInterrupt
        files.append(path)
        write(slabs, path, *others)

    with monkeypatch.context() as patched:
        patched.setattr(conversion_files, "write_slabs", write_one)
        with pytest.raises(KeyboardInterrupt):
            amc.convert_checkpoint(source, tmp_path / "new", **options)
    lines()
    amc.convert_checkpoint(source, tmp_path / "new", **options)
    assert "1 of them were finished by an earlier call" in lines()


def test_a_comparison_is_logged(source, tmp_path, lines):
    amc.convert_checkpoint(source, tmp_path / "new", rules=[])
    lines()
    amc.verify_checkpoint(source, tmp_path / "new", rules=[])
    assert lines()[-1] == f"verified {tmp_path / 'new'}: 32 bytes as converted from {source}"


def test_a_save_is_logged(tmp_path, lines):
    amc.save_checkpoint(nn.Linear(3, 2), tmp_path / "saved")
    assert lines() == [f"saved {tmp_path / 'saved'}: 4.1 kB in TIME"]


def test_a_trace_that_is_found_is_logged(source, tmp_path, lines):
    options = {"calls": "dict", "trace_cache": tmp_path / "traces", "trace_key": "1"}
    found = f"found the trace of the loading code in {tmp_path / 'traces'}"
    amc.load_with(dict, source, **options)
    assert found not in lines()
    amc.load_with(dict, source, **options)
    assert found in lines()


def test_a_request_that_is_repeated_is_logged(lines, monkeypatch):
    connections = Connections(Traffic())
    monkeypatch.setattr("automodel_conv.files.remote.requests.wait_seconds", lambda failures, error: 0.0)
    Retries(connections, threading.Event()).wait(PassingFault("503 Service Unavailable"))
    assert lines() == ["a request failed and is repeated in TIME: 503 Service Unavailable"]


def test_a_load_under_the_hook_is_logged(tmp_path, lines):
    transformers = pytest.importorskip("transformers")
    from tests.model_zoo import build_model, write_checkpoint

    write_checkpoint(build_model("mixtral"), tmp_path)
    with amc.accelerate_transformers():
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    [text] = [line for line in lines() if line.startswith("from_pretrained")]
    assert re.fullmatch("from_pretrained of MixtralForCausalLM: [1-9][0-9]* targets converted by plan, 0 by .*", text)


def test_nothing_is_logged_at_import_and_nothing_is_printed_without_a_handler(source):
    code = """
import logging, sys
before = set(logging.getLogger().handlers)
import automodel_conv as amc
from torch import nn
amc.load_model(nn.ModuleDict({"a": nn.Linear(1, 1)}), sys.argv[1], strict=False)
assert set(logging.getLogger().handlers) == before
"""
    run = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
    assert "fits them" not in run.stdout + run.stderr  # Python prints warnings if there is no handler at all


def test_handlers_of_the_caller_get_the_messages(source):
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s")
import automodel_conv as amc
amc.load_state_dict(sys.argv[1], rules=[])
"""
    run = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "INFO automodel_conv.files.checkpoint",
        "INFO automodel_conv.compiling.planned",
        "INFO automodel_conv.execution.report",
    ]


def test_messages_of_an_open_checkpoint_have_no_credentials(source, lines):
    amc.open_checkpoint(source, token="hf_secret", storage_options=None)
    assert "hf_secret" not in json.dumps(lines() + lines(logging.DEBUG))
