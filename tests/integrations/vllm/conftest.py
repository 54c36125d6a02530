"""The load format beside a stand-in for vLLM, which has what a load format uses of it; `make test-vllm` tests vLLM."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

collect_ignore = ["engine"]
_OURS = "automodel_conv.integrations.vllm"


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """The package ``vllm``, with the load format registered."""
    pytest.importorskip("transformers", reason="vLLM requires it")
    with monkeypatch.context() as patched:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm" or name.startswith(_OURS)]:
            patched.delitem(sys.modules, name)
        patched.syspath_prepend(str(Path(__file__).parent / "engine"))
        engine = import_module("vllm")
        import_module(_OURS).register()
        patched.setattr(sys.modules["vllm.envs"], "VLLM_CACHE_ROOT", str(tmp_path / "cache"))
        yield engine
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm" or name.startswith(_OURS)]:
            del sys.modules[name]
