"""Tests of ``from_pretrained`` under the hook against ``from_pretrained`` without it."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="hooks from_pretrained of transformers")

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, modeling_utils
from transformers.core_model_loading import MergeModulelist

import automodel_conv as amc
from automodel_conv.files import system
from automodel_conv.files.header import read_header
from automodel_conv.files.source import LocalFile
from automodel_conv.integrations import hooked_files
from automodel_conv.integrations import transformers as hook
from automodel_conv.integrations.hooked_plan import ALL, NOT_OPENED_HERE
from automodel_conv.testing import assert_bytes_equal
from tests.integrations.support import assert_same_model, both, saved
from tests.integrations.toys import PARTS, joined, load
from tests.model_zoo import EXCLUDED, build_model, isolate_registry, write_checkpoint, zoo_names

NAMES = [name for name in zoo_names() if name not in EXCLUDED]
REPLACED = [
    (module, name)
    for module in hook._loaders()
    for name in ("convert_and_load_state_dict_in_model", "safe_open", "get_checkpoint_shard_files")
    if hasattr(module, name)
]
STOCK = [getattr(module, name) for module, name in REPLACED]


@pytest.fixture(autouse=True)
def _restored():
    yield
    amc.uninstall()
    assert [getattr(module, name) for module, name in REPLACED] == STOCK


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixtral")
    model = build_model("mixtral")
    write_checkpoint(model, directory)
    return type(model), directory


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_every_model_type_loads_and_saves_as_without_the_hook(name, tmp_path):
    model = build_model(name)
    write_checkpoint(model, tmp_path / "published")
    stock, hooked, [load] = both(type(model), tmp_path / "published")
    converted = any(getattr(rule, "operations", None) for rule in stock._weight_conversions)
    assert bool(load.lowered) == converted
    assert load.left == {}
    assert saved(hooked, tmp_path / "hooked") == saved(stock, tmp_path / "stock")
    write_checkpoint(model, tmp_path / "converted", original_format=False)
    both(type(model), tmp_path / "converted")


def test_auto_classes_are_hooked_too(mixtral):
    _, hooked, [load] = both(AutoModelForCausalLM, mixtral[1])
    assert load.model == type(hooked).__name__
    assert len(load.lowered) == 2 * hooked.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "auto"], ids=str)
def test_dtypes_are_those_of_transformers(mixtral, dtype):
    both(*mixtral, dtype=dtype)


def test_disk_offloaded_tensors_are_left_to_transformers(mixtral, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    layers = build_model("mixtral").config.num_hidden_layers
    device_map |= {f"model.layers.{n}": "disk" if n else "cpu" for n in range(layers)}
    _, hooked, [load] = both(*mixtral, device_map=device_map, offload_folder=str(tmp_path))
    assert all(name.startswith("model.layers.0.") for name in load.lowered)
    assert load.lowered
    assert {name.split(".")[2] for name in load.left} == {str(n) for n in range(1, layers)}
    assert "disk" in hooked.hf_device_map.values()


def rewritten(source: Path, directory: Path, change) -> Path:
    """Write the checkpoint as one file with changed tensors."""
    tensors = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    save_file(change(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


def test_a_missing_expert_is_a_mismatch_as_without_the_hook(mixtral, tmp_path):
    model_class, source = mixtral
    last = build_model("mixtral").config.num_local_experts - 1
    path = rewritten(
        source,
        tmp_path,
        lambda found: {n: t for n, t in found.items() if f"layers.0.block_sparse_moe.experts.{last}." not in n},
    )
    results = []
    for install in (lambda: None, amc.install):
        install()
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            model_class.from_pretrained(path)
        torch.manual_seed(0)
        results.append(model_class.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True))
    (stock, info), (hooked, hooked_info) = results
    assert len(info["mismatched_keys"]) == 2
    assert hooked_info == info
    assert_same_model(hooked, stock)


def test_expert_of_another_shape_is_the_same_error_as_without_the_hook(mixtral, tmp_path):
    def cut(found):
        name = next(name for name in sorted(found) if ".experts." in name)
        return found | {name: found[name][:-1].contiguous()}

    path = rewritten(mixtral[1], tmp_path, cut)
    errors = []
    for install in (lambda: None, amc.install):
        install()
        with pytest.raises(RuntimeError) as error:
            mixtral[0].from_pretrained(path)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_files_that_the_index_does_not_name_are_not_read(mixtral, tmp_path):
    model_class, source = mixtral
    model_class.from_pretrained(source).save_pretrained(tmp_path, max_shard_size="50KB")
    names = {n: torch.full_like(t, 7) for f in tmp_path.glob("*.safetensors") for n, t in load_file(f).items()}
    save_file(names, tmp_path / "consolidated.safetensors", metadata={"format": "pt"})
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    _, _, [load] = both(model_class, tmp_path)
    assert load.lowered


def test_key_mapping_is_obeyed(mixtral, tmp_path):
    path = rewritten(mixtral[1], tmp_path, lambda found: {f"odd.{name}": tensor for name, tensor in found.items()})
    _, _, [load] = both(mixtral[0], path, key_mapping={r"^odd\.": ""})
    assert load.lowered


def test_one_scale_for_all_experts_of_a_quantized_checkpoint(mixtral, tmp_path):
    def quantized(found):
        made = {}
        for name, tensor in found.items():
            if ".experts." in name:
                blocks = [-(-size // 128) for size in tensor.shape]
                made[name.replace(".weight", ".weight_scale_inv")] = torch.rand(blocks, generator=generator)
                tensor = tensor.to(torch.float8_e4m3fn)
            made[name] = tensor
        return made

    generator = torch.Generator().manual_seed(0)
    path = rewritten(mixtral[1], tmp_path, quantized)
    config = json.loads((path / "config.json").read_text())
    kept = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "gate"]
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["quantization_config"]["modules_to_not_convert"] = kept
    (path / "config.json").write_text(json.dumps(config))
    stock, _, [load] = both(mixtral[0], path, quantization_config=FineGrainedFP8Config(dequantize=True))
    assert load.lowered
    assert load.left == {}
    assert stock.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_an_adapter_is_loaded_onto_a_base_under_the_hook(mixtral, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model_class, source = mixtral
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model_class.from_pretrained(source), lora).save_pretrained(tmp_path)
    found = []
    for install in (lambda: None, amc.install):
        install()
        with_adapter = model_class.from_pretrained(source)
        with_adapter.load_adapter(tmp_path)
        found.append((with_adapter, PeftModel.from_pretrained(model_class.from_pretrained(source), tmp_path)))
    for stock, hooked in zip(*found, strict=True):
        assert_same_model(hooked, stock)


def test_state_dict_in_memory_is_left_to_transformers(mixtral):
    model_class, source = mixtral
    tensors = published(source)
    config = model_class.config_class.from_pretrained(source)
    with amc.accelerate_transformers() as acceleration:
        model = model_class.from_pretrained(None, config=config, state_dict=tensors)
    assert_same_model(model, model_class.from_pretrained(source))
    [load] = acceleration.loads
    assert (load.lowered, load.left) == ((), {ALL: NOT_OPENED_HERE})


def test_patched_operation_runs_as_without_the_hook(mixtral, monkeypatch):
    calls = []
    real = MergeModulelist.convert

    def convert(self, *args, **kwargs):
        calls.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MergeModulelist, "convert", convert)
    _, _, [load] = both(*mixtral)
    assert load.lowered == ()
    assert load.left
    assert all("MergeModulelist" in reason for reason in load.left.values())
    assert calls


def test_a_read_that_fails_names_file_and_tensor(mixtral, monkeypatch):
    def failing(fd, views, offset):
        raise OSError(5, "Input/output error")

    sources = [LocalFile(str(file)) for file in mixtral[1].glob("*.safetensors")]
    headers = {source: read_header(source) for source in sources}
    amc.install()
    with monkeypatch.context() as patch:
        patch.setattr(system, "preadv", failing)
        patch.setattr(hooked_files, "read_header", headers.__getitem__)
        with pytest.raises(amc.ReadError, match="Input/output error") as error:
            mixtral[0].from_pretrained(mixtral[1])
    assert ".experts." in str(error.value)


class OwnMerge(MergeModulelist):
    """An operation of a user that differs from transformers' own."""

    def convert(self, input_dict, *args, **kwargs):
        return {name: tensor * 2 for name, tensor in super().convert(input_dict, *args, **kwargs).items()}


def registered(monkeypatch, operation):
    """Register a user's rules for Mixtral, equal to transformers' except for one operation."""
    from transformers import conversion_mapping

    rules = amc.get_checkpoint_conversion_mapping("mixtral")
    for rule in rules:
        if hasattr(rule, "operations"):
            rule.operations = [operation(dim=0) if type(op) is MergeModulelist else op for op in rule.operations]
    isolate_registry(monkeypatch)
    conversion_mapping.register_checkpoint_conversion_mapping("mixtral", rules, overwrite=True)


def test_rules_that_a_user_registers_are_lowered_if_their_operations_are_stock(mixtral, monkeypatch):
    registered(monkeypatch, MergeModulelist)
    _, _, [load] = both(*mixtral)
    assert load.lowered
    assert load.left == {}


def test_operation_of_a_user_runs_as_without_the_hook(mixtral, monkeypatch):
    plain = mixtral[0].from_pretrained(mixtral[1]).model.layers[0].mlp.experts.down_proj
    registered(monkeypatch, OwnMerge)
    stock, _, [load] = both(*mixtral)
    assert load.lowered == ()
    assert all("OwnMerge" in reason for reason in load.left.values())
    assert_bytes_equal(stock.model.layers[0].mlp.experts.down_proj.detach(), 2 * plain.detach())


def test_install_is_idempotent_and_uninstall_restores_the_functions():
    acceleration = amc.install()
    assert amc.install() is acceleration
    assert all(getattr(module, name) is not stock for (module, name), stock in zip(REPLACED, STOCK, strict=True))
    convert = modeling_utils.convert_and_load_state_dict_in_model
    assert inspect.signature(convert) == inspect.signature(STOCK[0])
    amc.uninstall()
    amc.uninstall()
    assert [getattr(module, name) for module, name in REPLACED] == STOCK


FOLDERS = {
    "index": ("", "", "model.safetensors.index.json"),
    "subfolder": ("inner", "", "model.safetensors.index.json"),
    "variant": ("", "fp16", "model.safetensors.index.fp16.json"),
}


def published(directory):
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture
def mistaken(mixtral, tmp_path):
    """Write two files; the later one holds two extra tensors that the index assigns to the other file and to none."""

    def write(folder="", index="model.safetensors.index.json"):
        tensors = published(mixtral[1])
        names = sorted(tensors)
        a, b = names[::2], names[1::2]
        weight_map = {name: "a.safetensors" for name in a} | {name: "b.safetensors" for name in b}
        wrong = {a[0]: torch.full_like(tensors[a[0]], 9), "stale.weight": torch.ones(3)}
        directory = tmp_path / folder
        directory.mkdir(exist_ok=True)
        save_file({n: tensors[n] for n in a}, directory / "a.safetensors", {"format": "pt"})
        save_file({n: tensors[n] for n in b} | wrong, directory / "b.safetensors", {"format": "pt"})
        (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for config in mixtral[1].glob("*config.json"):
            (directory / config.name).write_bytes(config.read_bytes())
        return tmp_path, ((a[0], "b.safetensors"), ("stale.weight", "b.safetensors"))

    return write


@pytest.mark.parametrize(("folder", "variant", "index"), FOLDERS.values(), ids=FOLDERS.keys())
def test_index_determines_the_file_of_a_tensor(mixtral, mistaken, folder, variant, index):
    model_class, source = mixtral
    path, ignored = mistaken(folder, index)
    options = {"subfolder": folder} if folder else {"variant": variant} if variant else {}
    with amc.accelerate_transformers() as acceleration:
        hooked, info = model_class.from_pretrained(path, output_loading_info=True, **options)
    assert_same_model(hooked, model_class.from_pretrained(source))
    assert not info["unexpected_keys"]
    [load] = acceleration.loads
    assert load.unindexed == ignored
    assert load.left_out == ("stale.weight",)
    assert "stale.weight of b.safetensors" in str(acceleration)


def test_unindexed_tensor_is_missing_under_the_hook(mixtral, mistaken):
    model_class, _ = mixtral
    path, ignored = mistaken()
    index = path / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    del said["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(said))
    with amc.accelerate_transformers() as acceleration:
        _, info = model_class.from_pretrained(path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    [load] = acceleration.loads
    assert {name for name, _ in load.unindexed} == {"lm_head.weight", *(name for name, _ in ignored)}


def test_single_file_is_read_whole_despite_an_index(mixtral, mistaken):
    model_class, source = mixtral
    path, _ = mistaken()
    save_file(published(source), path / "model.safetensors", {"format": "pt"})
    with amc.accelerate_transformers() as acceleration:
        hooked = model_class.from_pretrained(path)
    assert_same_model(hooked, model_class.from_pretrained(source))
    assert acceleration.loads[0].unindexed == ()


def test_blocks_nest_and_keep_the_installed_hook():
    with amc.accelerate_transformers() as outer:
        with amc.accelerate_transformers() as inner:
            assert inner is outer
        assert modeling_utils.safe_open is not STOCK[1]
    assert modeling_utils.safe_open is STOCK[1]
    kept = amc.install()
    with amc.accelerate_transformers() as block:
        assert block is kept
    assert modeling_utils.safe_open is not STOCK[1]


def test_block_ends_even_if_its_load_fails(tmp_path):
    with pytest.raises(ValueError, match="model_type"), amc.accelerate_transformers():
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert modeling_utils.safe_open is STOCK[1]


def test_later_patch_of_others_stays():
    amc.install()
    other = modeling_utils.safe_open = lambda *args, **kwargs: None
    try:
        amc.uninstall()
        assert modeling_utils.safe_open is other
    finally:
        modeling_utils.safe_open = STOCK[1]


def test_threads_may_open_blocks_at_once(mixtral):
    model_class, source = mixtral
    stock = model_class.from_pretrained(source)
    found, barrier, one_load = [], threading.Barrier(3), threading.Lock()

    def load():
        for _ in range(20):
            barrier.wait()
            with amc.accelerate_transformers():
                assert modeling_utils.safe_open is not STOCK[1]
        # transformers sets torch's default dtype for the whole process while it builds a model.
        with amc.accelerate_transformers(), one_load:
            found.append(model_class.from_pretrained(source))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for model in found:
        assert_same_model(model, stock)
    assert modeling_utils.safe_open is STOCK[1]


@pytest.mark.parametrize("version", ["4.57.6", "6.0.0"])
def test_unsupported_transformers_is_refused(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(amc.UnsupportedError, match=version):
        amc.install()
    assert modeling_utils.safe_open is STOCK[1]


def test_report_has_counts_and_reasons(mixtral):
    with amc.accelerate_transformers() as acceleration:
        assert str(acceleration) == "no load yet"
        mixtral[0].from_pretrained(mixtral[1])
    assert str(acceleration).endswith("converted by plan, 0 by transformers; all other tensors need no conversion")


def test_load_with_files_opened_before_uninstall_ends(tmp_path):
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


def test_nothing_is_planned_after_uninstall_under_a_patch_of_others(tmp_path, monkeypatch):
    names = ("convert_and_load_state_dict_in_model", "safe_open")
    for name in names:
        monkeypatch.setattr(modeling_utils, name, getattr(modeling_utils, name))  # restores it at the end
    done = amc.install()
    for name in names:
        monkeypatch.setattr(modeling_utils, name, partial(getattr(modeling_utils, name)))
    amc.uninstall()
    stock = load(tmp_path, [joined()], **PARTS)
    assert stock[0]["k.weight"] == [[2.0, 2.0], [3.0, 3.0]]
    assert done.loads == []
    assert type(modeling_utils.safe_open(tmp_path / "toy.safetensors", framework="pt")) is safe_open
    with amc.accelerate_transformers() as again:  # over their replacement of ours, which then has no effect
        assert load(tmp_path, [joined()], **PARTS) == stock
    assert [load.lowered for load in again.loads] == [("k.weight",)]
    assert done.loads == []


def test_transformers_without_a_dtype_plan_is_refused(monkeypatch):
    monkeypatch.setattr(modeling_utils, "LoadStateDictConfig", dataclasses.make_dataclass("Of50", ["weight_mapping"]))
    with pytest.raises(amc.UnsupportedError, match=r"expected: transformers 5\.1 or newer"):
        amc.install()
    assert modeling_utils.convert_and_load_state_dict_in_model is STOCK[0]
