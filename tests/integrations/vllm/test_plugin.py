"""Tests of the plugin: an engine finds the load format by the entry point of the installed package."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from automodel_conv.integrations.vllm import LOAD_FORMAT, register


def test_engine_finds_the_load_format_by_the_entry_point(vllm):
    from vllm.model_executor.model_loader import LOADERS
    from vllm.plugins import load_general_plugins

    del LOADERS[LOAD_FORMAT]
    load_general_plugins()
    assert LOADERS[LOAD_FORMAT].__name__ == "ModelLoader"


def test_entry_point_is_that_of_the_package():
    [point] = [
        point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == LOAD_FORMAT
    ]
    assert point.value == "automodel_conv.integrations.vllm:register"


def test_without_vllm_python_says_so():
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    with pytest.raises(ImportError, match="vllm"):
        register()


def test_plugin_is_loaded_without_importing_torch():
    """An engine loads all plugins in each of its processes."""
    code = "import sys, automodel_conv.integrations.vllm; print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=root).strip() == "False"
