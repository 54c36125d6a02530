"""Tests of taking adapters out of a model that PEFT has put them into."""

import pytest
import torch
from torch import nn

from automodel_conv.errors import UnsupportedError
from automodel_conv.lora.peft_models import base_and_adapters, base_in_memory, published_base
from automodel_conv.testing import assert_bytes_equal

pytest.importorskip("peft", reason="takes models of PEFT")

from peft import LoraConfig, get_peft_model

from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.upstream.models import state_table


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.layers = nn.ModuleList([nn.Linear(4, 6, bias=False), nn.Linear(6, 4)])

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        for layer in self.layers:
            x = layer(x)
        return x


def peft_model(model=None, **settings):
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["0", "1"]} | settings
    return get_peft_model(model or Toy(), LoraConfig(**settings))


def test_base_has_the_names_and_the_parameters_of_the_model_before():
    toy = Toy()
    before = dict(toy.state_dict())
    base, [adapter] = base_and_adapters(peft_model(toy, target_modules=["0", "embed"], modules_to_save=["norm"]))
    after = base.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].data_ptr() == tensor.data_ptr(), name
    assert {pair.module for pair in adapter.pairs} == {"layers.0", "embed"}
    assert [pair.is_embedding for pair in adapter.pairs if pair.module == "embed"] == [True]
    assert adapter.whole.keys() == {"norm.weight", "norm.bias"}
    assert (adapter.sources, adapter.form, adapter.weight) == ((), None, 1.0)


def test_model_itself_does_not_change():
    model = peft_model()
    names, modules = list(model.state_dict()), list(model.modules())
    base_and_adapters(model)
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


def test_matrices_are_those_of_the_model():
    model = peft_model()
    layer = model.base_model.model.layers[0]
    _, [adapter] = base_and_adapters(model)
    [pair] = [pair for pair in adapter.pairs if pair.module == "layers.0"]
    a, b = adapter.tensors.read([pair.a, pair.b])
    assert_bytes_equal(a, layer.lora_A["default"].weight.detach())
    assert_bytes_equal(b, layer.lora_B["default"].weight.detach())
    assert not a.requires_grad
    assert adapter.config.scale("layers.0") == 2.0


def test_only_active_adapters_are_taken():
    model = peft_model()
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=3, target_modules=["1"]))
    _, [adapter] = base_and_adapters(model)
    assert "'default'" in adapter.path
    model.set_adapter("second")
    _, [adapter] = base_and_adapters(model)
    assert "'second'" in adapter.path
    assert [pair.module for pair in adapter.pairs] == ["layers.1"]
    assert adapter.config.rank("layers.1") == 3
    model.base_model.set_adapter(["default", "second"])
    _, adapters = base_and_adapters(model)
    assert [adapter.config.settings["r"] for adapter in adapters] == [2, 3]


def test_wrappers_of_torch_around_the_model_are_removed():
    model = peft_model()
    base, [adapter] = base_and_adapters(torch.compile(model, backend="eager"))
    assert list(base.state_dict()) == list(Toy().state_dict())
    assert len(adapter.pairs) == 2


@pytest.mark.parametrize("thing", [Toy(), {}, None, nn.Linear], ids=["model", "dict", "none", "class"])
def test_anything_without_adapters_is_refused(thing):
    with pytest.raises(UnsupportedError, match=r"(?s)no model with adapters of PEFT.*found.*leave"):
        base_and_adapters(thing)


def test_merged_adapters_are_named():
    model = peft_model()
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"(?s)merged into the weights.*layers.0\n.*layers.1\n.*unmerge_adapter"):
        base_and_adapters(model)
    model.unmerge_adapter()
    assert len(base_and_adapters(model)[1]) == 1


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"init_lora_weights": "pissa"}, "pissa")],
)
def test_variants_are_refused_by_name(settings, name):
    with pytest.raises(UnsupportedError, match=f"(?s)adapter 'default' of the model.*{name}"):
        base_and_adapters(peft_model(**settings))


def test_other_methods_than_lora_are_refused():
    from peft import IA3Config

    model = get_peft_model(Toy(), IA3Config(target_modules=["0"], feedforward_modules=["0"]))
    with pytest.raises(UnsupportedError, match=r"(?s)not LoRA.*IA3"):
        base_and_adapters(model)


def test_tied_weights_are_one_target_of_the_base():
    toy = Toy()
    toy.head = nn.Linear(4, 7, bias=False)
    toy.head.weight = toy.embed.weight
    without_head = {name: tensor for name, tensor in toy.state_dict().items() if name != "head.weight"}
    base = base_in_memory(toy, saving_plan(state_table(without_head)))
    assert base.targets["head.weight"] is base.targets["embed.weight"]
    assert base.where == "the Toy in memory"
    assert published_base(toy).rows.keys() == toy.state_dict().keys()


def test_base_in_memory_has_the_published_tensors_as_its_checkpoint():
    zoo = pytest.importorskip("tests.model_zoo", reason="needs models of transformers")
    model = zoo.build_model("qwen3_moe")
    plan = saving_plan(state_table(dict(model.state_dict())), model=model)
    base = base_in_memory(model, plan)
    assert list(base.table.names) == [target.name for target in plan.targets]
    assert any(".experts.0.gate_proj.weight" in name for name in base.rows)
    assert any(name.endswith(".experts.gate_up_proj") for name in base.targets)
    assert base.loading.model is model
    assert base.published.targets == plan.targets
