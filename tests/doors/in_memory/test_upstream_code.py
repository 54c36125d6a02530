"""Tests of state dicts that need code of transformers or of a user: run as transformers runs it, or refused."""

import pytest
import torch
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import NameProblems, UnsupportedError
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.comparing import assert_same
from tests.doors.in_memory.support import Experts, merging, projections

try:
    from transformers import core_model_loading as core
    from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

    from tests.planning import oracles
except ModuleNotFoundError:
    core = None

needs_transformers = pytest.mark.skipif(core is None, reason="transformers is not installed")


if core is not None:

    class BackToFront(MergeModulelist):
        """An operation of a user that reverses the order of the experts."""

        def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
            turned = {pattern: tensors[::-1] for pattern, tensors in input_dict.items()}
            return super().convert(turned, source_patterns, target_patterns, **kwargs)


def with_user_operation():
    rules = merging()
    down = WeightConverter("experts.*.w2.weight", "experts.down_proj", operations=[BackToFront(dim=0)])
    return [rules[0], down]


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operation_of_a_user_runs_as_in_transformers(dtype):
    tensors, model = projections(), Experts(dtype)
    converted = amc.convert_state_dict(tensors, model, rules=with_user_operation())
    expected = oracles.upstream_values(with_user_operation(), tensors, model, model.state_dict())
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(converted[name], tensor.to(torch.float32 if name == "norm" else dtype))
    down = converted["layers.0.experts.down_proj"]
    assert_bytes_equal(down[0], tensors["layers.0.experts.2.w2.weight"].to(dtype))


@needs_transformers
def test_an_operation_of_a_user_without_a_model_is_refused():
    with pytest.raises(NameProblems, match=r"BackToFront(.|\n)*only a model has"):
        amc.convert_state_dict(projections(), rules=with_user_operation())


@needs_transformers
def test_an_operation_of_a_user_under_the_same_name_is_not_skipped():
    model = nn.Module()
    model.a = nn.Parameter(torch.empty(3, 3, device="meta"))
    model.config = None

    class Turn(Transpose):
        pass

    tensors = {"a": address_valued((3, 3), torch.float32)}
    rules = [WeightConverter("a", "a", operations=[Turn(0, 1)])]
    assert_bytes_equal(amc.convert_state_dict(tensors, model, rules=rules)["a"], tensors["a"].t().contiguous())
    for arguments in ({"source_layout": "nemo"}, {"layout": "nemo"}):
        try:
            converted = amc.convert_state_dict(tensors, model, rules=rules, **arguments)
        except UnsupportedError:
            continue
        assert_bytes_equal(converted["a"], tensors["a"].t().contiguous())


@pytest.fixture
def mixtral(tmp_path):
    """Return a small model and write its checkpoint in the published format."""
    if core is None:
        pytest.skip("transformers is not installed")
    from tests.model_zoo import build_model, write_checkpoint

    model = build_model("mixtral")
    write_checkpoint(model, tmp_path)
    return model, tmp_path


def assert_loads_as_upstream(model, directory, has_fallbacks):
    upstream = type(model).from_pretrained(directory)
    loaded = amc.load_state_dict(directory)
    assert_same(loaded, upstream.state_dict())
    assert (len(loaded.report.fallbacks) > 0) == has_fallbacks
    assert all("experts" in name for name in loaded.report.fallbacks)
    plan = amc.compile_plan(amc.open_checkpoint(directory))
    assert plan.fallbacks == tuple(name for name in plan_names(plan) if name in loaded.report.fallbacks)
    assert ("upstream" in plan.summary().partition("reads")[0]) == has_fallbacks


def plan_names(plan):
    return [target.name for target in plan.targets]


@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm", "vllm_w31"])
def test_experts_in_another_layout_than_the_model_are_an_error(mixtral, layout):
    mixtral, _ = mixtral
    converted = amc.convert_state_dict(mixtral.state_dict(), mixtral, layout=layout)
    with pytest.raises(UnsupportedError, match="source_layout="):
        amc.convert_state_dict(converted, mixtral)
    with pytest.raises(UnsupportedError, match=r"(?s)experts.* layout="):
        amc.revert_state_dict(converted, mixtral)
    assert_same(amc.convert_state_dict(converted, mixtral, source_layout=layout), mixtral.state_dict())


def test_patched_convert_runs_as_in_transformers(mixtral, monkeypatch):
    assert_loads_as_upstream(*mixtral, has_fallbacks=False)
    stock = MergeModulelist.convert

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        converted = stock(self, input_dict, source_patterns, target_patterns, **kwargs)
        return {pattern: tensor.flip(0) for pattern, tensor in converted.items()}

    monkeypatch.setattr(MergeModulelist, "convert", convert)
    assert_loads_as_upstream(*mixtral, has_fallbacks=True)


def test_converter_registered_by_a_user_runs_as_in_transformers(mixtral, monkeypatch):
    from copy import deepcopy

    from transformers import conversion_mapping as registry

    rules = deepcopy(registry.get_checkpoint_conversion_mapping("mixtral"))
    down = next(rule for rule in rules if "w2" in str(rule.source_patterns))
    mine = WeightConverter(
        list(down._original_source_patterns) if hasattr(down, "_original_source_patterns") else down.source_patterns,
        list(down._original_target_patterns) if hasattr(down, "_original_target_patterns") else down.target_patterns,
        operations=[BackToFront(dim=0)],
    )
    rules[rules.index(down)] = mine
    from tests.model_zoo import isolate_registry

    isolate_registry(monkeypatch)
    registry.register_checkpoint_conversion_mapping("mixtral", rules, overwrite=True)
    assert_loads_as_upstream(*mixtral, has_fallbacks=True)
