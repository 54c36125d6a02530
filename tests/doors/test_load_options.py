"""Tests of the keywords of the loaders and of ``compile_plan``: declared once, shown by each function, and checked."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import typing
from dataclasses import fields

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.compiling.options import (
    CompileOptions,
    CompileSettings,
    LoadOptions,
    LoadSettings,
    TraceOptions,
    TraceSettings,
)
from automodel_conv.doors import key_docs, keyword_options
from automodel_conv.files.source_options import SourceSettings

LOADERS = [amc.load_state_dict, amc.load_model]
OPTIONS = [
    (amc.compile_plan, CompileOptions, CompileSettings),
    *((loader, LoadOptions, LoadSettings) for loader in LOADERS),
    (amc.load_with, TraceOptions, TraceSettings),
]
SOURCE_DOORS = [
    amc.open_checkpoint,
    amc.compile_plan,
    amc.load_model,
    amc.load_state_dict,
    amc.load_with,
    amc.trace_loader,
    amc.convert_checkpoint,
    amc.verify_checkpoint,
    amc.save_checkpoint,
    amc.revert_state_dict,
    amc.published_tensors,
    amc.convert_adapter,
    amc.merge_adapter,
]
IDS = [function.__name__ for function, _, _ in OPTIONS]


def keywords_of(function):
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one for one in parameters if one.kind is one.KEYWORD_ONLY}


@pytest.fixture
def directory(tmp_path):
    save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(("options", "settings"), [one[1:] for one in OPTIONS[:2]])
def test_options_and_settings_have_the_same_fields(options, settings):
    declared = {name: kind.__forward_arg__ for name, kind in options.__annotations__.items()}
    assert list(declared.items()) == [(field.name, field.type) for field in fields(settings)]


@pytest.mark.parametrize(("function", "options", "settings"), OPTIONS, ids=IDS)
def test_the_signature_shows_every_keyword_and_its_default(function, options, settings):
    keywords = keywords_of(function)
    assert list(keywords) == list(options.__annotations__)
    defaults = {field.name: field.default for field in fields(settings)}
    if function is amc.load_state_dict:
        defaults["device"] = "cpu"
    assert {name: one.default for name, one in keywords.items()} == defaults
    assert {name: one.annotation for name, one in keywords.items()} == {
        field.name: field.type for field in fields(settings)
    }
    assert not any(one.kind is one.VAR_KEYWORD for one in inspect.signature(function).parameters.values())


@pytest.mark.parametrize(("function", "options", "settings"), OPTIONS, ids=IDS)
def test_every_key_is_documented_in_the_class_and_in_the_function(function, options, settings):
    texts = key_docs(options)
    assert list(texts) == list(options.__annotations__)
    lines = inspect.getdoc(function).splitlines()
    for name, text in texts.items():
        assert text[0].isupper() or text.startswith("``{"), name
        assert text.endswith("."), name
        [start] = [number for number, line in enumerate(lines) if line.startswith(f"    {name}: ")]
        entry = f"{lines[start].strip()} " + " ".join(line.strip() for line in lines[start + 1 : start + 20])
        assert entry.lower().startswith(f"{name}: {' '.join(text.split())}".lower()), name
    assert not any("**options" in line for line in lines)
    assert max(map(len, lines)) <= 120


def test_bool_keys_state_their_default():
    texts = key_docs(LoadOptions)
    for field in fields(LoadSettings):
        if isinstance(field.default, bool):
            assert texts[field.name].endswith(f"Default: {field.default}."), field.name
        else:
            assert "None: " in texts[field.name] or field.name in ("device_map", "plan", "subfolder"), field.name


@pytest.mark.parametrize("function", SOURCE_DOORS)
def test_every_function_that_reads_a_checkpoint_shows_the_options_of_sources(function):
    keywords, defaults = keywords_of(function), {field.name: field.default for field in fields(SourceSettings)}
    assert {name: keywords[name].default for name in defaults} == defaults
    lines = inspect.getdoc(function).splitlines()
    assert all(any(line.startswith(f"    {name}: ") for line in lines) for name in defaults)
    assert not any("**options" in line for line in lines)


@pytest.mark.parametrize("function", [function for function, _, _ in OPTIONS], ids=IDS)
def test_an_unknown_keyword_is_named(function):
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument 'strcit'$"):
        function("path", None, strcit=False)


def test_compile_plan_refuses_a_keyword_of_the_loaders(directory):
    with pytest.raises(TypeError, match="'strict'"):
        amc.compile_plan(directory, strict=False)


def test_hints_can_be_evaluated():
    hints = typing.get_type_hints(amc.LoadOptions)
    assert hints["strict"] is bool
    assert {"path", "model", "options", "return"} == typing.get_type_hints(amc.load_model).keys()


@pytest.mark.parametrize("device", [{}, {"device": None}, {"device": "cpu"}], ids=str)
def test_one_dict_of_options_serves_both_loaders(directory, device):
    options: amc.LoadOptions = {"strict": False, "threads": 1, **device}
    model = nn.Linear(3, 2, device="meta")
    tensors = amc.load_state_dict(directory, model, **options)
    report = amc.load_model(model, directory, **options)
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    assert torch.equal(model.weight, tensors["weight"])
    assert report.missing_keys == ()


def test_docstring_keeps_its_entry_without_source_code(monkeypatch):
    def refuse(thing):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", refuse)

    def function(path: str, **options: object) -> None:
        """Do nothing.

        Args:
            path: a path.
            **options: see ``CompileOptions``.
        """

    shown = keyword_options(CompileOptions, CompileSettings)(function)
    assert "**options: see ``CompileOptions``." in shown.__doc__
    assert list(inspect.signature(shown).parameters) == ["path", *CompileOptions.__annotations__]


CALLS = """\
from torch import nn
from automodel_conv import LoadOptions, compile_plan, load_model, load_state_dict

model = nn.Linear(3, 2)
options: LoadOptions = {"strict": False, "device": "cuda", "device_map": {"": 0}}
load_model(model, "path", **options)
load_state_dict("path", model, **options)
load_state_dict("path", layout="nemo", threads=None).report.bytes_read
compile_plan("path", model=model, rules=[]).summary()
wrong: LoadOptions = {"strcit": False}  # an error
load_model(model, "path", strcit=False)  # an error
load_model(model, "path", strict="no")  # an error
load_model(model)  # an error
load_state_dict("path", model, strcit=False)  # an error
compile_plan("path", strict=False)  # an error
"""


def test_a_type_checker_accepts_right_calls_and_refuses_wrong_ones(tmp_path):
    pytest.importorskip("pyright")
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(file)]
    run = subprocess.run(command, capture_output=True, text=True)
    problems = {problem["range"]["start"]["line"] for problem in json.loads(run.stdout)["generalDiagnostics"]}
    assert problems == {number for number, line in enumerate(CALLS.splitlines()) if line.endswith("# an error")}
