"""vLLM's own models, loaded by this package, equal those that vLLM's default loader loads: tensors and attributes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.vllm.cases import CASES, DENSE, NOT_BUILT, write
from tests.vllm.engine import (
    assert_same_models,
    engine_config,
    every_platform,
    join,
    loaded_by_vllm,
    loaded_here,
    not_written,
    registry,
    tensors,
)


@pytest.fixture(scope="module", autouse=True)
def engine(tmp_path_factory):
    # vLLM makes the group of experts only if the first model has some.
    directory = tmp_path_factory.mktemp("engine")
    write("Qwen3MoeForCausalLM", directory)
    with every_platform():
        join(engine_config(directory))
        yield


@pytest.mark.parametrize("architecture", CASES)
def test_model_equals_that_of_the_default_loader(architecture, tmp_path):
    case = CASES[architecture]
    write(architecture, tmp_path)
    config = engine_config(tmp_path)
    expected = loaded_by_vllm(config)
    assert all(case.left_out and re.search(case.left_out, name) for name in not_written(expected.model))

    traces = tmp_path / "traces"
    actual, again = loaded_here(config, traces), loaded_here(config, traces)

    has_experts = any(re.search(r"expert|\.ws$", name) for name in tensors(expected.model))
    assert has_experts == (architecture not in DENSE)
    assert_same_models(actual, expected)
    assert_same_models(again, expected)
    computed = {name for name in tensors(expected.model) if case.computed and re.search(case.computed, name)}
    assert actual.report.computed.keys() == again.report.computed.keys() == computed
    assert bool(computed) == (case.computed is not None)
    assert actual.runs == 1 + bool(computed)  # no values are read in the trace
    assert again.runs == bool(computed)
    assert all(case.left_out and re.search(case.left_out, name) for name in actual.report.left_out)


def source_of(module):
    """Return the text of a module of vLLM's registry, or of all files of its package."""
    name = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
    file = Path(importlib.util.find_spec(name).origin)
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return "".join(path.read_text() for path in files)


def test_each_architecture_with_experts_is_built_or_has_a_reason():
    models = registry._TEXT_GENERATION_MODELS | registry._MULTIMODAL_MODELS
    classes = {models[name] for name in CASES if name in models}
    missing = {
        name
        for name, (module, own) in models.items()
        if (module, own) not in classes and re.search("FusedMoE|fused_moe", source_of(module))
    }
    assert missing == NOT_BUILT.keys()
