"""Tests of the model of a checkpoint's config: the class that an Auto class picks, and the dtype of a load."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="the models and their references are those of transformers")

import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from automodel_conv.upstream.from_config import meta_model, model_class
from tests.model_zoo import build_model, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def changed_config(path, **changes):
    """Write another config for the same weights; None removes a key."""
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))


def assert_as_upstream(path, auto=AutoModelForCausalLM, **options):
    stock = auto.from_pretrained(path, **options)
    loaded = amc.load_state_dict(path, **options)
    with amc.accelerate_transformers():
        hooked = auto.from_pretrained(path, **options)
    model = meta_model(amc.open_checkpoint(path), options.get("dtype"))
    assert type(model) is type(stock)
    amc.load_model(model, path)
    expected = stock.state_dict()
    for state in (loaded, hooked.state_dict(), model.state_dict()):
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_bytes_equal(state[name], tensor)
    return stock


# Source: config.json of bryce-hoehn/Qwen3.5-18B-REAP-A3B-Coding, moonshotai/Kimi-K2.5 and stepfun-ai/Step-3.7-Flash,
# which name classes of another type, or of their own code.
FOREIGN = [
    ("qwen3_5_moe_text", "Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    ("kimi_k25", "KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
    ("step3p7", "Step3p7FlashForCausalLM", "Step3p7ForConditionalGeneration"),
]
# The heads of a type in addition to its causal language model.
OWN = [
    ("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeForCausalLM"),
    ("qwen3_moe", "Qwen3MoeModel", "Qwen3MoeModel"),
    ("qwen3_moe", "Qwen3MoeForSequenceClassification", "Qwen3MoeForSequenceClassification"),
    ("qwen3_moe", "Qwen3MoeForTokenClassification", "Qwen3MoeForTokenClassification"),
    ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
    ("llama4", "Llama4ForConditionalGeneration", "Llama4ForConditionalGeneration"),
]
# The head that a checkpoint most probably has.
UNSAID = [
    ("qwen3_moe", None, "Qwen3MoeForCausalLM"),
    ("qwen3_moe", "SomebodysForCausalLM", "Qwen3MoeForCausalLM"),
    ("qwen3_moe", "PreTrainedModel", "Qwen3MoeForCausalLM"),
    ("qwen3_moe", "MixtralForCausalLM", "Qwen3MoeForCausalLM"),
    ("llama4", "Somebodys", "Llama4ForConditionalGeneration"),
    ("qwen3_vl_moe", None, "Qwen3VLMoeForConditionalGeneration"),
    ("t5", None, "T5ForConditionalGeneration"),
    ("distilbert", None, "DistilBertForMaskedLM"),
]


@pytest.mark.parametrize(("model_type", "named", "expected"), [*FOREIGN, *OWN, *UNSAID])
def test_class_comes_from_architectures_or_is_the_default_of_the_type(model_type, named, expected):
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError:
        pytest.skip(f"this transformers has no {model_type}")
    config.architectures = None if named is None else [named]
    cls, taken = model_class(config, "config.json")
    assert cls.__name__ == expected
    assert taken is config


def test_first_architecture_of_the_type_counts():
    config = AutoConfig.for_model("qwen3_moe")
    config.architectures = ["Somebodys", "Qwen3MoeModel", "Qwen3MoeForCausalLM"]
    assert model_class(config, "")[0].__name__ == "Qwen3MoeModel"


def test_language_model_uses_the_text_config():
    config = AutoConfig.for_model("llama4")
    config.architectures = ["Llama4ForCausalLM"]
    cls, taken = model_class(config, "")
    assert cls.__name__ == "Llama4ForCausalLM"
    assert taken is config.text_config


def test_class_registered_by_a_user_is_found():
    class OwnConfig(transformers.MixtralConfig):
        model_type = "own_mixtral"

    class OwnMixtral(transformers.MixtralForCausalLM):
        config_class = OwnConfig

    AutoConfig.register("own_mixtral", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnMixtral, exist_ok=True)
    assert model_class(OwnConfig(), "")[0] is OwnMixtral


def test_config_without_a_class_is_an_error():
    class Lonely(transformers.PreTrainedConfig):
        model_type = "lonely"

    with pytest.raises(amc.UnsupportedError, match="no model class"):
        model_class(Lonely(), "config.json")


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoint_whose_architecture_is_foreign_loads_whole(tmp_path, strict):
    write_checkpoint(build_model("mixtral"), tmp_path)
    changed_config(tmp_path, architectures=["SomebodysForConditionalGeneration"])
    stock = assert_as_upstream(tmp_path)
    assert amc.load_state_dict(tmp_path, strict=strict).keys() == stock.state_dict().keys()


def test_base_model_and_other_head_keep_their_class(tmp_path):
    config = build_model("mixtral").config
    for name, auto in (
        ("MixtralModel", AutoModel),
        ("MixtralForSequenceClassification", transformers.AutoModelForSequenceClassification),
    ):
        model = getattr(transformers, name)._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        assert type(assert_as_upstream(tmp_path / name, auto)).__name__ == name


def test_composite_models_without_architectures_are_found(tmp_path):
    model = build_model("qwen3_vl_moe")
    write_checkpoint(model, tmp_path)
    changed_config(tmp_path, architectures=None)
    assert type(assert_as_upstream(tmp_path, AutoModelForImageTextToText)) is type(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "nobodys", "auto_map": {"AutoConfig": "configuration.Own", "AutoModelForCausalLM": "own.Own"}},
        {"model_type": "nobodys"},
        {"dtype": "auto"},
        {"dtype": "bf16"},
        {"dtype": "int8"},
        {"num_hidden_layers": "two"},
        {"hidden_act": "nobodys"},
    ],
    ids=["remote code", "unknown type", "dtype auto", "no dtype of torch", "no floating dtype", "no number", "no act"],
)
def test_config_that_transformers_fails_on_is_one_error(tmp_path, changes):
    write_checkpoint(build_model("mixtral"), tmp_path)
    changed_config(tmp_path, **changes)
    for action in (amc.load_state_dict, amc.compile_plan):
        with pytest.raises(amc.UnsupportedError, match=r"config\.json"):
            action(tmp_path)


UNKNOWN = {
    # A type, the names of its experts, and the advice.
    "a recipe": ("kimi_k3", "w1 w2 w3", r"pass rules=automodel_conv\.recipes\.kimi_k3\(\);"),
    "names of experts": (
        "nobodys",
        "gate_proj up_proj down_proj",
        r'pass rules=automodel_conv\.recipes\.grouped_experts\("mlp\.experts", gate="gate_proj", up="up_proj", '
        r'down="down_proj"\) if these are its experts;',
    ),
    "other names": ("nobodys", "a b", r"pass rules=\[\.\.\.\], rules of your own: https://\S*/tasks/recipes/;"),
}


@pytest.mark.parametrize("code", [{}, {"auto_map": {"AutoConfig": "configuration.Own"}}], ids=["", "remote code"])
@pytest.mark.parametrize(("model_type", "matrices", "advice"), UNKNOWN.values(), ids=UNKNOWN)
def test_type_that_transformers_lacks_is_named_with_rules_for_it(tmp_path, model_type, matrices, advice, code):
    names = [f"model.layers.0.mlp.experts.{e}.{matrix}.weight" for e in range(2) for matrix in matrices.split()]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **code}))
    for action in (amc.load_state_dict, amc.compile_plan, lambda path: amc.convert_checkpoint(path, path / "new")):
        with pytest.raises(amc.UnsupportedError, match=f"has no model type '{model_type}'") as caught:
            action(tmp_path)
        assert re.search(advice, str(caught.value))


@pytest.mark.parametrize(
    ("architectures", "known_type"),
    [(["DeepseekV3ForCausalLM"], "deepseek_v3"), (["Nobodys", "MixtralForCausalLM"], "mixtral")],
)
def test_type_with_a_class_of_transformers_is_advised_the_rules_of_that_class(tmp_path, architectures, known_type):
    # Source: config.json of sgl-project/DeepSeek-V4-Flash-FP8, of type deepseek_ref.
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    config = {"model_type": "nobodys", "architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(amc.UnsupportedError) as caught:
        amc.compile_plan(tmp_path)
    call = f'automodel_conv.get_checkpoint_conversion_mapping("{known_type}")'
    assert f"pass rules={call} if its names are those of {architectures[-1]};" in str(caught.value)
    assert eval(call, {"automodel_conv": amc})


class WithoutPackage(type):
    """The type of transformers' stand-ins for classes that need a package that is not installed, as ``DummyObject``."""

    def __getattribute__(cls, name):
        if name.startswith("_"):
            return super().__getattribute__(name)
        raise ImportError(f"{name} needs a package")


class NeedsPackage(metaclass=WithoutPackage):
    """Such a stand-in."""


@pytest.mark.parametrize(
    "architectures",
    [["LlamaForCausalLM"], ["Nobodys"], ["NeedsPackage"], ["path"], "Text", [3], None],
    ids=str,
)
def test_classes_without_rules_are_passed_over(tmp_path, monkeypatch, architectures):
    monkeypatch.setattr(sys.modules["transformers"], "NeedsPackage", NeedsPackage, raising=False)
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    config = {"model_type": "nobodys", "architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(amc.UnsupportedError, match=r"has no model type(.|\n)*pass rules=\[\.\.\.\], rules of your own"):
        amc.compile_plan(tmp_path)


def test_sizes_that_a_composite_config_does_not_read_are_one_error(tmp_path):
    # Source: config.json of stepfun-ai/Step-3.7-Flash as some tools flatten it. from_pretrained takes default sizes.
    if "step3p7" not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no step3p7")
    sizes = {"num_hidden_layers": 4, "hidden_size": 24, "vocab_size": 9, "moe_intermediate_size": 16}
    weight = {f"model.layers.3.moe.{name}_proj.weight": torch.randn(2, 16, 24) for name in ("gate", "up")}
    save_file(weight | {"model.layers.3.moe.down_proj.weight": torch.randn(2, 24, 16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "step3p7", **sizes}))
    text = r"Step3p7Config[\s\S]*num_hidden_layers 4, read as 45[\s\S]*get_checkpoint_conversion_mapping\(\"step3p7\"\)"
    for action in (amc.load_state_dict, amc.compile_plan, lambda path: amc.convert_checkpoint(path, path / "new")):
        with pytest.raises(amc.UnsupportedError, match=text):
            action(tmp_path)
    rules = amc.get_checkpoint_conversion_mapping("step3p7")
    loaded = amc.load_state_dict(tmp_path, rules=rules, layout="nemo")
    experts = "model.language_model.layers.3.mlp.experts"
    assert_bytes_equal(loaded[f"{experts}.gate_and_up_projs"], torch.cat(list(weight.values()), 1).mT.contiguous())


def test_sizes_in_text_config_and_those_that_a_class_moves_there_are_read(tmp_path):
    for sizes in ({"text_config": {"hidden_size": 128}, "hidden_size": 64}, {"hidden_size": 128}):
        config = AutoConfig.for_model("qwen2_vl", **sizes)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", **sizes}))
        save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
        assert config.get_text_config().hidden_size == 128
        assert meta_model(amc.open_checkpoint(tmp_path), None).config.get_text_config().hidden_size == 128


def test_type_registered_by_a_user_is_not_unknown(tmp_path):
    class KimiConfig(transformers.PreTrainedConfig):
        model_type = "kimi_k2"

        def __init__(self, **arguments):
            raise ValueError("no half experts")

    AutoConfig.register("kimi_k2", KimiConfig)
    try:
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))
        with pytest.raises(amc.UnsupportedError, match="no half experts"):
            amc.compile_plan(tmp_path)
    finally:
        del transformers.CONFIG_MAPPING._extra_content["kimi_k2"]


@pytest.mark.parametrize("class_part", ["__init__", "_from_config"])
def test_any_error_of_a_transformers_class_is_one_error(tmp_path, monkeypatch, class_part):
    model = build_model("mixtral")
    write_checkpoint(model, tmp_path)

    def broken(*args, **kwargs):
        raise AttributeError("no attribute 'half'")

    monkeypatch.setattr(type(model), class_part, broken)
    error = r"MixtralForCausalLM[\s\S]*config\.json[\s\S]*AttributeError: no attribute 'half'[\s\S]*model="
    with pytest.raises(amc.UnsupportedError, match=error):
        amc.compile_plan(tmp_path)


def test_pointer_in_place_of_a_config_is_reported(tmp_path):
    write_checkpoint(build_model("mixtral"), tmp_path)
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for action in (amc.load_state_dict, amc.compile_plan):
        with pytest.raises(amc.CheckpointError, match=r"config\.json[\s\S]*Git-LFS pointer[\s\S]*git lfs pull"):
            action(tmp_path)


def mixed(directory, first, others, names=("lm_head.weight",)):
    """Write a checkpoint without a dtype in its config: ``names`` have one dtype, the other tensors another."""
    write_checkpoint(build_model("mixtral"), directory, 1 << 30)
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.to(first if name in names else others) for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    changed_config(directory, dtype=None, torch_dtype=None)


@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("others", [torch.float16, torch.bfloat16, torch.float32])
def test_without_a_dtype_in_the_config_the_first_tensor_by_name_has_it(tmp_path, first, others):
    """safetensors writes the widest dtypes first, so the first tensor in the file is not the first by name."""
    mixed(tmp_path, first, others)
    assert assert_as_upstream(tmp_path).dtype == first


@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_first_tensor_of_codes_is_passed_over(tmp_path, code):
    mixed(tmp_path, torch.float16, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"a.first": torch.zeros(2, dtype=code)}, tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = amc.load_state_dict(tmp_path, strict=False)
    for name, tensor in model.state_dict().items():
        assert_bytes_equal(loaded[name], tensor)
    assert model.dtype == torch.float16


@pytest.mark.parametrize("stored_dtype", [None, "bfloat16"], ids=["not in the index", "in the index"])
def test_first_file_has_the_dtype_unless_the_index_has_it(tmp_path, stored_dtype):
    mixed(tmp_path, torch.float16, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    last, files = "lm_head.weight", ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file({n: t for n, t in tensors.items() if n != last}, tmp_path / files[0], metadata={"format": "pt"})
    save_file({last: tensors[last]}, tmp_path / files[1], metadata={"format": "pt"})
    weight_map = {name: files[name == last] for name in tensors}
    metadata = {"total_size": 1} | ({} if stored_dtype is None else {"dtype": stored_dtype})
    index = {"metadata": metadata, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert assert_as_upstream(tmp_path).dtype == (torch.float32 if stored_dtype is None else torch.bfloat16)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_of_the_config_wins_over_that_of_the_files(tmp_path, key, dtype):
    mixed(tmp_path, torch.bfloat16, torch.bfloat16)
    changed_config(tmp_path, **{key: dtype})
    assert assert_as_upstream(tmp_path).dtype == getattr(torch, dtype)


def test_requested_dtype_wins_over_both(tmp_path):
    mixed(tmp_path, torch.bfloat16, torch.float32)
    assert assert_as_upstream(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_dtype_of_the_text_part_is_not_the_dtype_of_the_model(tmp_path):
    model = build_model("qwen3_vl_moe")
    write_checkpoint(model, tmp_path, 1 << 30)
    config = json.loads((tmp_path / "config.json").read_text())
    changed_config(tmp_path, dtype=None, text_config=config["text_config"] | {"dtype": "float16"})
    assert assert_as_upstream(tmp_path, AutoModelForImageTextToText).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_modules_of_a_model_stay_float32_in_each_dtype(tmp_path, dtype):
    """DeepSeek-V4 keeps its norms in float32, and some of its projections only for float16."""
    write_checkpoint(build_model("deepseek_v4"), tmp_path)
    model = assert_as_upstream(tmp_path, dtype=dtype)
    assert model.state_dict()["model.norm.weight"].dtype == torch.float32
