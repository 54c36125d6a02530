"""Tests of adapters for every model type that transformers converts, against float64 and against PEFT.

The list comes from the installed registry (``tests/model_zoo``), so another transformers is another sweep.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("transformers", reason="compares with models of transformers")
pytest.importorskip("peft", reason="compares with PEFT")

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.adapters.support import (
    RANK,
    Adapter,
    Factors,
    dyadic,
    exact_sum,
    expert_modules,
    gaussian,
    linear_modules,
    load_with_peft,
    merged,
    random_adapter,
    rank_of,
    read_adapter,
    scale_of,
    some,
    upstream_modules,
    write_adapter,
)
from tests.comparing import assert_same, tensors_of
from tests.model_zoo import DTYPE, EXCLUDED, build_model, write_checkpoint, zoo_names

pytestmark = pytest.mark.sweep
NAMES = [name for name in zoo_names() if name not in EXCLUDED]

# The types by which each way to name, arrange and publish experts is tested also where every type would take too long.
FEW = {
    *("qwen2_moe", "lfm2_moe", "hy_v3", "jamba", "phimoe", "mixtral", "minimax_m3_vl", "ernie4_5_vl_moe"),
    *("nemotron_h", "gpt_oss", "qwen3_vl_moe", "inkling_mm_model", "lara_mini", "step3p7", "laguna", "nemo_speechlm"),
}
few_types = pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[] if name in FEW else [pytest.mark.long]) for name in NAMES],
    indirect=True,
)

# Other ranks and scales than those of the other modules, for the last projection of every expert.
DOWN = ("down_proj", "w2", "fc2")
PROJECTIONS_IN_ORDER = ("gate_proj", "w1", "fc1", "up_proj", "w3", "fc3", *DOWN)
PATTERNS: dict[str, Any] = {"rank_pattern": dict.fromkeys(DOWN, 2), "alpha_pattern": dict.fromkeys(DOWN, 6)}


# Types without names of single experts, with the reason. Their adapters here have only layers; those of the stacks are
# written by PEFT.
WITHOUT_SINGLE_EXPERTS = {
    "published with stacks of experts": {
        *("gpt_oss", "inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text", "inkling_mm_model"),
        *("lara_mini", "qwen3_vl_moe", "step3p5_vision", "step3p7"),
    },
    "no experts": {
        *("Dinov2Backbone", "Dinov2Model", "Dinov2WithRegistersBackbone", "Dinov2WithRegistersModel"),
        *("Molmo2TextModel", "RfDetrModel", "Tipsv2TextModel", "Tipsv2VisionBackbone", "Tipsv2VisionModel"),
        *("gradium_phonon_tts", "gte", "hrm_text", "jina_embeddings_v3", "llama", "llava", "nomic_bert"),
        *("olmo_hybrid", "qianfan_ocr", "radio", "sapiens2"),
    },
}

# Types that have no form for vLLM, with the reason.
ONE_NAME_FOR_SEVERAL = {"ernie4_5_vl_moe": "published experts of one name become those of two modules"}

# Names of linear layers that PEFT takes for projections of experts in some types, and then does not adapt.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")


class Case(NamedTuple):
    """A published checkpoint, and an adapter with a module for each published matrix."""

    name: str
    base: Path
    tensors: Mapping[str, Tensor]
    model: PreTrainedModel
    """The model that transformers loads it into."""
    modules: frozenset[str]
    """All modules that could have been adapted."""
    adapter: Adapter
    path: Path


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory) -> Case:
    model = build_model(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(model, directory / "base")
    tensors = tensors_of(directory / "base")
    modules = expert_modules(tensors) | linear_modules(model, tensors)
    adapter = random_adapter(some(modules), **PATTERNS)
    path = write_adapter(directory / "adapter", adapter)
    return Case(request.param, directory / "base", tensors, model, frozenset(modules), adapter, path)


def test_every_type_is_tested_with_an_adapter_of_its_experts(case):
    experts = [module for module in case.adapter.factors if module in expert_modules(case.tensors)]
    stacks = [name for name, parameter in case.model.named_parameters() if is_stack_of_experts(name, parameter)]
    listed = {reason for reason, names in WITHOUT_SINGLE_EXPERTS.items() if case.name in names}
    expected = set() if experts else {"published with stacks of experts" if stacks else "no experts"}
    assert listed == expected
    assert case.adapter.factors.keys() - set(experts), "no layer has an adapter"


def test_models_that_are_promised_by_name_are_tested():
    from transformers import CONFIG_MAPPING

    wanted = {"qwen2_moe", "lfm2_moe", "hy_v3", "jamba", "phimoe"}
    assert {name for name in wanted if name in CONFIG_MAPPING} <= set(NAMES)
    assert wanted <= FEW


def test_merged_tensors_are_rounded_once_and_others_are_unchanged(case, tmp_path):
    report = amc.merge_adapter(case.base, case.path, tmp_path / "merged")
    assert_same(tensors_of(tmp_path / "merged"), merged(case.tensors, case.adapter))
    assert set(report.adapted) == {f"{module}.weight" for module in case.adapter.factors}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "phimoe"])
def test_merged_values_of_any_factors_are_nearly_rounded_once(name, tmp_path):
    model = build_model(name)
    write_checkpoint(model, tmp_path / "base")
    tensors = tensors_of(tmp_path / "base")
    adapter = random_adapter(expert_modules(tensors) | linear_modules(model, tensors), values=gaussian)
    write_adapter(tmp_path / "adapter", adapter)
    amc.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    written = tensors_of(tmp_path / "merged")
    for module in adapter.factors:
        weight, actual = tensors[f"{module}.weight"], written[f"{module}.weight"]
        exact = exact_sum(weight, adapter, module)
        positive = Factors(*(factor.abs() for factor in adapter.factors[module]))
        largest = exact_sum(weight.abs(), adapter._replace(factors={module: positive}), module)
        # Half a unit of the last place, and the errors of a sum in float32 of RANK + 1 terms.
        bound = unit_of(exact, actual.dtype) / 2 + (RANK + 1) * torch.finfo(torch.float32).eps * largest
        assert actual.dtype == weight.dtype
        assert bool(((actual.double() - exact).abs() <= bound).all()), module


def test_adapter_fused_for_peft_merges_to_the_same_weights(case, tmp_path):
    amc.merge_adapter(case.base, case.path, tmp_path / "merged")
    loaded = type(case.model).from_pretrained(tmp_path / "merged").state_dict()
    amc.convert_adapter(case.path, tmp_path / "fused", base=case.base, layout="transformers")
    model = load_with_peft(type(case.model).from_pretrained(case.base), tmp_path / "fused")
    assert_merged_alike(model.merge_and_unload().state_dict(), loaded)


@few_types
def test_adapter_merged_while_loading_gives_what_the_merged_checkpoint_holds(case, tmp_path):
    amc.merge_adapter(case.base, case.path, tmp_path / "merged")
    loaded = amc.load_state_dict(case.base, adapter=case.path)
    assert_merged_alike(loaded, amc.load_state_dict(tmp_path / "merged"))


@few_types
def test_stacks_for_vllm_have_the_products_of_all_experts(case, tmp_path):
    if case.name in ONE_NAME_FOR_SEVERAL:
        with pytest.raises(amc.UnsupportedError, match="has one name for several modules"):
            amc.convert_adapter(case.path, tmp_path / "stacked", base=case.base, layout="vllm")
        return
    amc.convert_adapter(case.path, tmp_path / "stacked", base=case.base, layout="vllm")
    stacked = read_adapter(tmp_path / "stacked")
    expected = stacked_products(case)
    for module, factors in stacked.factors.items():
        if module in expected:
            assert_bytes_equal(products(factors, stacked.config, module, len(expected[module])), expected[module])
        else:
            assert_same(factors._asdict(), case.adapter.factors[module]._asdict())
    layers = {module for module in case.adapter.factors if module not in expert_modules(case.tensors)}
    assert stacked.factors.keys() == expected.keys() | layers
    amc.convert_adapter(tmp_path / "stacked", tmp_path / "back", base=case.base, layout="per_expert")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(case.path))


@few_types
def test_fused_adapter_goes_back_to_the_same_bytes(case, tmp_path):
    amc.convert_adapter(case.path, tmp_path / "fused", base=case.base, layout="transformers")
    amc.convert_adapter(tmp_path / "fused", tmp_path / "back", base=case.base, layout="per_expert")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(case.path))
    assert_equivalent(read_adapter(tmp_path / "back"), case.adapter)
    config = LoraConfig.from_pretrained(str(tmp_path / "back"))
    targeted = {module for module in case.modules if check_target_module_exists(config, module)}
    assert targeted == case.adapter.factors.keys()


@few_types
def test_adapter_that_peft_fused_merges_to_the_same_weights(case, tmp_path):
    model = random_peft_model(type(case.model).from_pretrained(case.base), case)
    model.save_pretrained(tmp_path / "adapter")
    amc.merge_adapter(case.base, tmp_path / "adapter", tmp_path / "merged")
    loaded = type(case.model).from_pretrained(tmp_path / "merged").state_dict()
    assert_merged_alike(model.merge_and_unload().state_dict(), loaded)


def unit_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbouring values of a dtype around these values."""
    return torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps), values.frexp().exponent - 1)


def stacked_products(case: Case) -> dict[str, Tensor]:
    """Return the products of all experts ``[experts, out, in]`` by vLLM's name of a stack, zero if there is no module.

    vLLM 0.33, ``_stack_moe_lora_weights`` in ``lora/model_manager.py``: gate and up are ``experts.base_layer``, down is
    ``experts``.
    """
    shapes = expert_modules(case.tensors)
    found: dict[str, dict[int, list[Tensor]]] = {}
    for module in sorted(shapes, key=lambda name: PROJECTIONS_IN_ORDER.index(name.rpartition(".")[2])):
        experts, number, projection = module.rsplit(".", 2)
        stack = experts if projection in DOWN else f"{experts}.base_layer"
        factors = case.adapter.factors.get(module)
        product = torch.zeros(shapes[module]) if factors is None else factors.b @ factors.a
        scale = scale_of(case.adapter.config, module)
        found.setdefault(stack, {}).setdefault(int(number), []).append(scale * product)
    return {name: torch.stack([torch.cat(group[i]) for i in range(len(group))]) for name, group in found.items()}


def products(factors: Factors, config: Mapping[str, Any], module: str, experts: int) -> Tensor:
    """Return the product of each expert, element by element as vLLM and PEFT arrange them."""
    a = factors.a.unflatten(0, (experts, -1))
    b = factors.b.unflatten(1, (-1, experts))
    return scale_of(config, parameter_of(module)) * torch.einsum("eri,ore->eoi", a, b)


def parameter_of(module: str) -> str:
    """Return the name by which vLLM 0.33 finds rank and alpha: ``get_rank_and_scaling`` in ``lora/peft_helper.py``."""
    if module.endswith(".experts.base_layer"):
        return module.replace(".base_layer", ".gate_up_proj")
    return f"{module}.down_proj"


def assert_merged_alike(actual: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Check that PEFT gave a model the weights that transformers loads from a merged checkpoint.

    Where the model has float32 and the checkpoint bfloat16, only the checkpoint's are rounded.
    """

    def is_wider(name: str) -> bool:
        weight = loaded[name]
        return weight.dtype == torch.float32 and torch.equal(weight.to(DTYPE).float(), weight)

    assert_same({n: t.to(DTYPE).to(t.dtype) if is_wider(n) else t for n, t in actual.items()}, loaded)


def assert_equivalent(actual: Adapter, expected: Adapter) -> None:
    """Check that both configs give every module the same rank and scale."""
    for module in expected.factors:
        assert rank_of(actual.config, module) == rank_of(expected.config, module), module
        assert scale_of(actual.config, module) == scale_of(expected.config, module), module


def is_stack_of_experts(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 3 and "experts" in name


def random_peft_model(model: PreTrainedModel, case: Case):
    """Return a model with an adapter of PEFT on all experts and some linear layers, with random factors."""
    names = upstream_modules(model, case.tensors)
    modules = dict(model.named_modules())
    targets = [names[module] for module in some(linear_modules(model, case.tensors))]
    parameters = [n for n, p in model.named_parameters() if is_stack_of_experts(n, p)]
    is_parameter = {n: not isinstance(modules[n], nn.Linear) or n.split(".")[-1] in PROJECTIONS for n in targets}
    by_parameter = [f"{n}.weight" for n in targets if is_parameter[n]]
    by_module = [n for n in targets if not is_parameter[n]]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=by_module, target_parameters=parameters + by_parameter)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(dyadic(parameter.shape, generator))
    return peft_model
