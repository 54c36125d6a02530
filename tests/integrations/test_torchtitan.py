"""Tests of torchtitan's adapters as loading code: traced and executed, each does what it does when it is run.

They are skipped if it is not installed; ``make test`` installs it. The models are those that it has for debugging.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest
import torch

from tests.integrations.loading_code import addressed, load_both

models = pytest.importorskip("torchtitan.models", reason="its adapters are run")
_MOST_ROWS, _MOST_COLUMNS = 200, 24


def with_registry() -> list[ModuleType]:
    """Return the modules of models that can be imported."""
    names = [f"{models.__name__}.{info.name}" for info in pkgutil.iter_modules(models.__path__)]
    modules = [pytest.importorskip(name) for name in names if not name.endswith(".flux")]  # a model of images
    return [module for module in modules if hasattr(module, "model_registry")]


def flavors(module: ModuleType) -> list[str]:
    """Return the names of a module's models for debugging."""
    tables = (value for name, value in vars(module).items() if name.endswith("_configs") and isinstance(value, dict))
    return [flavor for flavor in next(tables) if flavor.startswith("debugmodel")]


FLAVORS = [(module.__name__, flavor) for module in with_registry() for flavor in flavors(module)]


def build(module: str, flavor: str):
    """Return the spec of a model with few layers, and its tensors in bfloat16 on the meta device.

    Experts have few columns, and matrices of tokens few rows: adapters divide and join only other dimensions.
    """
    spec = importlib.import_module(module).model_registry(flavor)
    spec.model.layers = spec.model.layers[:2]
    with torch.device("meta"):
        tensors = spec.model.build().state_dict()
    return spec, {name: _cut(name, tensor).to(torch.bfloat16) for name, tensor in tensors.items()}


def _cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.startswith(("tok_embeddings", "output", "lm_head")):
        return tensor[:_MOST_ROWS]
    return tensor[..., :_MOST_COLUMNS] if "experts" in name and tensor.dim() == 3 else tensor


def test_all_kinds_of_models_are_tested():
    kinds = {module.rpartition(".")[2] for module, _ in FLAVORS}
    assert {"deepseek_v3", "gpt_oss", "kimi_k2_7", "llama3", "muse_glimmer", "qwen3", "qwen3_5"} <= kinds


@pytest.mark.parametrize(("module", "flavor"), FLAVORS)
def test_both_ways_of_an_adapter_equal_its_own(module, flavor, tmp_path):
    spec, tensors = build(module, flavor)

    def adapter():
        return spec.state_dict_adapter(spec.model, None)

    hf, report = load_both(adapter().to_hf, adapter().to_hf, addressed(tensors), tmp_path)
    assert not report.computed
    _, report = load_both(adapter().from_hf, adapter().from_hf, addressed(hf), tmp_path)
    assert not report.computed
