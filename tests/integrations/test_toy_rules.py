"""Rules at odds with each other, on a model of two weights: the hook does what transformers does without it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import shutil
from functools import partial

import pytest
import torch

pytest.importorskip("transformers", reason="what is hooked is transformers' own")

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralForCausalLM, PreTrainedConfig, PreTrainedModel, conversion_mapping, core_model_loading
from transformers import modeling_utils as upstream
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter, WeightRenaming

import automodel_conv as amc
from automodel_conv.integrations import hooked_files, hooked_load
from automodel_conv.integrations import transformers as hook
from automodel_conv.integrations.hooked_plan import NOT_OPENED_HERE, WAITS_FOR_NAMES
from automodel_conv.testing import assert_bytes_equal
from tests.model_zoo import build_model, write_checkpoint

STOCK = upstream.convert_and_load_state_dict_in_model


@pytest.fixture(autouse=True)
def _restored():
    yield
    amc.uninstall()


class ToyConfig(PreTrainedConfig):
    model_type = "toy_of_two"


class Toy(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"

    def __init__(self, config, nested=False):
        super().__init__(config)
        self.q = nn.Linear(2, 2, bias=False)
        self.k = nn.Linear(2, 2, bias=False)
        if nested:
            self.model = nn.Module()
            self.model.k = nn.Linear(2, 2, bias=False)
        self.post_init()


def load(directory, rules, nested=False, between=lambda: None, **tensors):
    """Values of the weights that are loaded, the loading info, and the rules, which know whether they were used.

    ``between`` is called whenever a tensor was opened.
    """
    file = directory / "toy.safetensors"
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, file)
    model = Toy(ToyConfig(), nested).to("meta")
    slices = {}
    for name in load_file(file):
        slices[name] = upstream.safe_open(file, framework="pt", device="cpu").get_slice(name)
        between()
    more = {"tp_plan": None} if "tp_plan" in inspect.signature(STOCK).parameters else {}
    info, *_ = upstream.convert_and_load_state_dict_in_model(
        model=model,
        state_dict=slices,
        load_config=upstream.LoadStateDictConfig(weight_mapping=rules, dtype=torch.float32),
        **more,
    )
    values = {name: None if p.is_meta else p.tolist() for name, p in model.named_parameters()}
    return values, (info.missing_keys, info.unexpected_keys), [rule.was_used() for rule in rules]


def same_under_the_hook(directory, rules, **options):
    stock = load(directory, copy.deepcopy(rules), **options)
    with amc.accelerate_transformers() as acceleration:
        hooked = load(directory, copy.deepcopy(rules), **options)
    assert hooked == stock
    return acceleration.loads[0]


PARTS = {"ka__weight": torch.full((1, 2), 2.0), "kb__weight": torch.full((1, 2), 3.0)}


def joined():
    return WeightConverter(["ka.weight", "kb.weight"], ["k.weight"], operations=[Concatenate(dim=0)])


def test_a_target_that_a_rule_left_to_transformers_makes_too_is_left(tmp_path):
    class Own(Chunk):
        pass

    both_made = WeightConverter(["aqk.weight"], ["q.weight", "k.weight"], operations=[Own(dim=0)])
    done = same_under_the_hook(tmp_path, [both_made, joined()], aqk__weight=torch.ones(4, 2), **PARTS)
    assert done.lowered == ()
    assert set(done.left) == {"q.weight", "k.weight"}


def test_rules_that_a_plan_has_used_are_marked_as_used(tmp_path):
    unused = WeightRenaming(["nothing"], ["else"])
    renaming = WeightRenaming(["old_"], [""])  # of converted tensors alone
    tensors = {f"old_{name}": tensor for name, tensor in PARTS.items()} | {"q__weight": torch.ones(2, 2)}
    done = same_under_the_hook(tmp_path, [renaming, unused, joined()], **tensors)
    assert done.lowered == ("k.weight",), done.left


def test_a_final_name_that_would_get_the_prefix_once_more_is_left(tmp_path):
    done = same_under_the_hook(tmp_path, [joined()], nested=True, **PARTS)
    assert done.lowered == ()
    assert "prefix" in done.left["model.k.weight"]


def test_a_config_without_what_an_operation_asks_for_is_the_error_of_transformers(tmp_path):
    if "num_shards_attribute" not in Chunk.__init__.__code__.co_varnames:
        pytest.skip("Chunk of this transformers asks no config")
    chunked = WeightConverter(
        ["aqk.weight"], ["q.weight", "k.weight"], operations=[Chunk(dim=0, num_shards_attribute="nope")]
    )
    done = same_under_the_hook(tmp_path, [chunked], aqk__weight=torch.ones(4, 2))
    assert "nope" in done.left["q.weight"]


@pytest.mark.skipif(not hasattr(core_model_loading, "GroupWeightRename"), reason="this transformers has no such rule")
def test_names_that_wait_for_others_are_renamed_whichever_of_these_a_plan_takes(tmp_path, monkeypatch):
    write_checkpoint(build_model("mixtral"), tmp_path / "published")
    tensors = {}
    for file in (tmp_path / "published").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            new = name.replace(".w1.", ".w0.").replace("layers.0.input_layernorm", "layers.0.input_normq")
            if "layers.1.block_sparse_moe.experts.1." not in name:  # so that this layer is left to transformers
                tensors[new] = tensor
            if "layers.0.input_layernorm" in name:
                norm = tensor
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(tmp_path / "published" / "config.json", tmp_path / "other")
    group = core_model_loading.GroupWeightRename(
        [r"experts.(\d+).w0", "input_normq"], [r"experts.\1.w1", "input_layernorm"]
    )
    stock = conversion_mapping.get_checkpoint_conversion_mapping
    rules = {"mixtral": [group, *amc.get_checkpoint_conversion_mapping("mixtral")]}
    patched = lambda kind: copy.deepcopy(rules.get(kind)) or stock(kind)  # noqa: E731
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", patched)
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    stock_model, stock_info = MixtralForCausalLM.from_pretrained(tmp_path / "other", **options)
    with amc.accelerate_transformers() as acceleration:
        hooked, info = MixtralForCausalLM.from_pretrained(tmp_path / "other", **options)
    assert info == stock_info
    for loaded in (hooked, stock_model):
        assert_bytes_equal(loaded.model.layers[0].input_layernorm.weight.data, norm)
    assert WAITS_FOR_NAMES in acceleration.loads[0].left.values()


def test_a_header_that_is_not_accepted_here_is_the_reason_for_what_is_left(tmp_path, monkeypatch):
    def refused(source):
        raise amc.CheckpointError(f"odd header of {source.describe()}")

    monkeypatch.setattr(hooked_files, "read_header", refused)
    done = same_under_the_hook(tmp_path, [joined()], **PARTS)
    assert done.lowered == ()
    assert done.left == {hook.ALL: f"odd header of {tmp_path / 'toy.safetensors'}"}
    assert "0 converted by plan, all by transformers" in str(hook.Acceleration([done]))


def test_a_load_whose_files_were_opened_in_part_before_install_is_left(tmp_path):
    stock = load(tmp_path, [joined()], **PARTS)
    installed = []
    assert load(tmp_path, [joined()], between=lambda: installed.append(amc.install()), **PARTS) == stock
    assert len(installed) == 2
    assert installed[0].loads == [("Toy", (), {hook.ALL: NOT_OPENED_HERE}, (), (), 0)]


def test_a_load_whose_files_were_opened_in_part_before_uninstall_ends(tmp_path):
    stock = load(tmp_path, [joined()], **PARTS)
    acceleration = amc.install()
    assert load(tmp_path, [joined()], between=amc.uninstall, **PARTS) == stock
    assert acceleration.loads == []


def test_a_block_that_was_uninstalled_does_not_end_a_later_one():
    first, second = amc.accelerate_transformers(), amc.accelerate_transformers()
    first.__enter__()
    amc.uninstall()
    second.__enter__()
    first.__exit__(None, None, None)
    assert hook._HOOK.acceleration is not None
    second.__exit__(None, None, None)
    assert hook._HOOK.acceleration is None


def test_nothing_is_planned_after_uninstall_even_under_somebody_elses_replacement(tmp_path, monkeypatch):
    names = ("convert_and_load_state_dict_in_model", "safe_open")
    for name in names:
        monkeypatch.setattr(upstream, name, getattr(upstream, name))  # to be put back at the end
    done = amc.install()
    for name in names:
        monkeypatch.setattr(upstream, name, partial(getattr(upstream, name)))
    amc.uninstall()
    stock = load(tmp_path, [joined()], **PARTS)
    assert stock[0]["k.weight"] == [[2.0, 2.0], [3.0, 3.0]]
    assert done.loads == []
    assert type(upstream.safe_open(tmp_path / "toy.safetensors", framework="pt")) is safe_open
    with amc.accelerate_transformers() as again:  # over their replacement of ours, which stays without effect
        assert load(tmp_path, [joined()], **PARTS) == stock
    assert [load.lowered for load in again.loads] == [("k.weight",)]
    assert done.loads == []


def test_a_load_that_fails_is_not_reported_as_done(tmp_path, monkeypatch):
    with amc.accelerate_transformers() as done, monkeypatch.context() as patch:
        patch.setattr(hooked_load, "fill", lambda *args: (_ for _ in ()).throw(amc.ReadError("no")))
        with pytest.raises(amc.ReadError):
            load(tmp_path, [joined()], **PARTS)
        assert done.loads == []


def test_what_the_hook_hands_out_can_be_copied(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with amc.accelerate_transformers():
        opened = upstream.safe_open(tmp_path / "a.safetensors", framework="pt")
        assert copy.copy(opened).get_slice("a")[:].tolist() == copy.copy(opened.get_slice("a"))[:].tolist() == [1, 1]


def test_an_open_file_is_an_instance_of_what_opened_it(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    before = upstream.safe_open(tmp_path / "a.safetensors", framework="pt")
    with amc.accelerate_transformers():
        opened = upstream.safe_open(tmp_path / "a.safetensors", framework="pt")
        assert isinstance(opened, upstream.safe_open)
        assert isinstance(before, upstream.safe_open)
        assert not isinstance(opened.get_slice("a"), upstream.safe_open)


def test_a_transformers_whose_loader_has_no_plan_of_dtypes_is_refused(monkeypatch):
    monkeypatch.setattr(upstream, "LoadStateDictConfig", dataclasses.make_dataclass("Of50", ["weight_mapping"]))
    with pytest.raises(amc.UnsupportedError, match=r"expected: transformers 5\.1 or newer"):
        amc.install()
    assert upstream.convert_and_load_state_dict_in_model is STOCK
