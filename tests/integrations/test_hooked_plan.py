"""Tests of plans under the hook with conflicting rules, and of the reasons to leave targets to transformers."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="hooks functions of transformers")

from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM, conversion_mapping, core_model_loading
from transformers.core_model_loading import Chunk, WeightConverter

import automodel_conv as amc
from automodel_conv.integrations import hooked_files
from automodel_conv.integrations import transformers as hook
from automodel_conv.integrations.hooked_plan import ALL, NOT_OPENED_HERE, WAITS_FOR_NAMES
from automodel_conv.testing import assert_bytes_equal
from tests.integrations.toys import PARTS, joined, load, same_under_the_hook
from tests.model_zoo import build_model, write_checkpoint


@pytest.fixture(autouse=True)
def _restored():
    yield
    amc.uninstall()


def test_target_of_a_rule_left_to_transformers_is_left(tmp_path):
    class Own(Chunk):
        pass

    both_made = WeightConverter(["aqk.weight"], ["q.weight", "k.weight"], operations=[Own(dim=0)])
    done = same_under_the_hook(tmp_path, [both_made, joined()], aqk__weight=torch.ones(4, 2), **PARTS)
    assert done.lowered == ()
    assert set(done.left) == {"q.weight", "k.weight"}


def test_final_name_that_would_get_a_second_prefix_is_left(tmp_path):
    done = same_under_the_hook(tmp_path, [joined()], nested=True, **PARTS)
    assert done.lowered == ()
    assert "prefix" in done.left["model.k.weight"]


def test_config_without_a_required_attribute_is_the_error_of_transformers(tmp_path):
    if "num_shards_attribute" not in Chunk.__init__.__code__.co_varnames:
        pytest.skip("Chunk of this transformers reads no config")
    chunked = WeightConverter(
        ["aqk.weight"], ["q.weight", "k.weight"], operations=[Chunk(dim=0, num_shards_attribute="nope")]
    )
    done = same_under_the_hook(tmp_path, [chunked], aqk__weight=torch.ones(4, 2))
    assert "nope" in done.left["q.weight"]


@pytest.mark.skipif(not hasattr(core_model_loading, "GroupWeightRename"), reason="this transformers has no such rule")
def test_group_renames_apply_whichever_names_a_plan_converts(tmp_path, monkeypatch):
    write_checkpoint(build_model("mixtral"), tmp_path / "published")
    tensors = {}
    for file in (tmp_path / "published").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            new = name.replace(".w1.", ".w0.").replace("layers.0.input_layernorm", "layers.0.input_normq")
            if "layers.1.block_sparse_moe.experts.1." not in name:  # leaves this layer to transformers
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


def test_refused_header_is_the_reason_for_targets_left(tmp_path, monkeypatch):
    def refused(source):
        raise amc.CheckpointError(f"odd header of {source.describe()}")

    monkeypatch.setattr(hooked_files, "read_header", refused)
    done = same_under_the_hook(tmp_path, [joined()], **PARTS)
    assert done.lowered == ()
    assert done.left == {ALL: f"odd header of {tmp_path / 'toy.safetensors'}"}
    assert "0 converted by plan, all by transformers" in str(hook.Acceleration([done]))


def test_load_with_files_opened_before_install_is_left(tmp_path):
    stock = load(tmp_path, [joined()], **PARTS)
    installed = []
    assert load(tmp_path, [joined()], between=lambda: installed.append(amc.install()), **PARTS) == stock
    assert len(installed) == 2
    assert installed[0].loads == [("Toy", (), {ALL: NOT_OPENED_HERE}, (), (), 0)]
