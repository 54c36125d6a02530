"""Tests of the types of texts: a type checker knows them, and they are what the code accepts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from automodel_conv import types
from automodel_conv.execution.copy_batch import BACKENDS
from automodel_conv.integrations import vllm
from automodel_conv.lora.forms import FORMS
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT, get_layout
from automodel_conv.saving import _FORMS

CALLS = """\
import automodel_conv as amc
from automodel_conv.types import LayoutName
from torch import nn

def load(path: str, layout: LayoutName):
    return amc.load_state_dict(path, layout=layout, source_layout="per_expert", dtype="auto")

model = nn.Linear(3, 2)
load("path", "nemo")
options: amc.LoadOptions = {"layout": "vllm", "dtype": "bfloat16", "broadcast": "node"}
amc.load_model(model, "path", **options)
amc.convert_checkpoint("path", "new", layout="per_expert", dtype=None)
amc.convert_adapter("path", "new", base="base", layout="vllm")
amc.convert_state_dict({}, model, layout="gpt_oss", backend="torch")
amc.save_checkpoint(model, "path", adapter="merged")
amc.load_with(print, "path", calls="dict")
load("path", "numo")  # an error
amc.load_state_dict("path", layout="numo")  # an error
amc.load_model(model, "path", broadcast="nodes")  # an error
amc.compile_plan("path", source_layout="per expert")  # an error
wrong: amc.LoadOptions = {"layout": "numo"}  # an error
amc.load_state_dict("path", dtype=16)  # an error
amc.convert_checkpoint("path", "new", layout="per_experts")  # an error
amc.verify_checkpoint("path", "new", layout="per_experts")  # an error
amc.merge_adapter("path", "adapter", "new", layout="per_experts")  # an error
amc.convert_adapter("path", "new", base="base", layout="nemo")  # an error
amc.convert_state_dict({}, model, backend="cuda")  # an error
amc.revert_state_dict({}, model, layout="per_expert")  # an error
amc.save_checkpoint(model, "path", adapter="all")  # an error
amc.load_with(print, "path", calls="list")  # an error
amc.Refit(model, sends=True, layout="numo")  # an error
amc.published_tensors(model, layout="numo")  # an error
"""


def test_a_type_checker_finds_texts_that_no_function_accepts(tmp_path):
    pytest.importorskip("pyright")
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(file)]
    run = subprocess.run(command, capture_output=True, text=True)
    problems = {problem["range"]["start"]["line"] for problem in json.loads(run.stdout)["generalDiagnostics"]}
    assert problems == {number for number, line in enumerate(CALLS.splitlines()) if line.endswith("# an error")}


def texts_of(kind):
    """Return the texts that a type allows, also in a union of types."""
    parts = [texts_of(one) if get_args(one) else {one} for one in get_args(kind)]
    return {text for part in parts for text in part if isinstance(text, str)}


def test_layouts_are_those_that_exist():
    assert list(get_args(types.LayoutName)) == list(LAYOUTS)
    assert texts_of(types.LayoutInFiles) == {*LAYOUTS, PER_EXPERT}
    for name in get_args(types.LayoutName):
        get_layout(name)


def test_forms_of_adapters_are_those_that_exist():
    assert texts_of(types.AdapterForm) == {*FORMS}
    assert texts_of(types.SavedAdapter) == {*_FORMS}


def test_backends_are_those_that_are_accepted():
    assert get_args(types.Backend) == BACKENDS


def test_owners_are_those_that_exist():
    source = Path(vllm.__file__).with_name("weight_source.py").read_text(encoding="utf-8")
    assert f"OWNERS = {get_args(types.Owners)!r}".replace("'", '"') in source  # vLLM need not be installed


@pytest.mark.parametrize("name", types.__all__)
def test_every_type_is_a_type_of_texts(name):
    assert texts_of(getattr(types, name))
