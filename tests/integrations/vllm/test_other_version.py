"""Tests of other versions of vLLM: the load format refuses them by name, and other load formats work."""

from __future__ import annotations

import sys

import pytest

from automodel_conv import UnsupportedError
from automodel_conv.integrations.vllm import register


@pytest.fixture
def other_version(vllm, monkeypatch):
    """A version of vLLM that lacks modules that the load format uses, with the load format registered."""
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    for name in ("vllm.tracing", "vllm.model_executor.model_loader.weight_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("loader", "trace_key"):
        monkeypatch.delitem(sys.modules, f"automodel_conv.integrations.vllm.{name}", raising=False)
    register()


def test_other_versions_are_refused_by_name(other_version):
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    with pytest.raises(UnsupportedError, match=r"expected: vllm 0\.33\n *found: +vllm 0\.34\.0\n"):
        get_model_loader(LoadConfig("automodel_conv"))


def test_other_load_formats_of_other_versions_work(other_version):
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    assert type(get_model_loader(LoadConfig())).__name__ == "DefaultModelLoader"
