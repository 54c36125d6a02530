"""Tests of ``device_map``: look-up as in accelerate, refusal of misfits before anything is read, and placement."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.destinations.device_map import DeviceMap
from automodel_conv.execution import filling
from automodel_conv.testing import POISON, assert_bytes_equal
from tests.destinations.support import MAP, TENSORS, WHERE, Model, Weight, assert_loaded, meta
from tests.execution.elsewhere import FIRST, HOST, SECOND, Elsewhere


def poisoned(model):
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    return model


def simple(entries):
    """Return a map to numbers in place of devices."""
    device_map_of_numbers = DeviceMap({})
    device_map_of_numbers.entries = entries
    return device_map_of_numbers


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.1.mlp.weight", "layer 1"),
        ("model.layers.10.mlp.weight", "rest"),
        ("model.layers.1", "layer 1"),
        ("model.layers", "rest"),
        ("model.layers.1.norm.weight", "norm"),
        ("model.layers.1.norm.weights", "layer 1"),
        ("lm_head.weight", "rest"),
    ],
)
def test_longest_name_of_whole_components_decides(name, wanted):
    entries = {"": "rest", "model.layers.1": "layer 1", "model.layers.1.norm.weight": "norm"}
    assert simple(entries).device_of(name) == wanted


def test_names_without_a_matching_entry_use_the_empty_one():
    assert simple({"a": "first"}).device_of("b.weight") is None
    assert simple({"a": "first", "": "rest"}).device_of("b.weight") == "rest"


paths = st.lists(st.sampled_from(["a", "ab", "layers", "1", "10"]), min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(paths | st.just(""), st.integers(0, 7), max_size=6), paths)
def test_names_are_looked_up_as_accelerate_does(entries, name):
    modeling = pytest.importorskip("accelerate.utils.modeling")
    try:
        wanted = modeling._get_param_device(name, entries)
    except ValueError:
        wanted = None
    assert simple(entries).device_of(name) == wanted


def test_numbers_are_cuda_devices(devices):
    assert DeviceMap({"a": 0, "b": "cuda:1", "c": torch.device("cuda", 1), "d": "cpu", "e": "cpu:0"}).entries == {
        "a": FIRST, "b": SECOND, "c": SECOND, "d": HOST, "e": HOST,
    }  # fmt: skip


def test_state_dict_is_placed_by_the_map(published, devices):
    for arguments in ({"model": meta(Model())}, {"rules": []}):
        loaded = amc.load_state_dict(published, device_map=MAP, **arguments)
        assert_loaded(loaded, WHERE)
        assert all(isinstance(loaded[name], Elsewhere) == (home != HOST) for name, home in WHERE.items())
    assert devices.keys() == {FIRST, SECOND}


def test_new_parameters_are_placed_by_the_map(published, devices):
    model = meta(Model())
    report = amc.load_model(model, published, device_map=MAP)
    assert_loaded(model.state_dict(keep_vars=True), WHERE)
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    assert report.bytes_read == sum(tensor.nbytes for tensor in TENSORS.values())


def test_devices_of_a_map_are_filled_at_the_same_time(published, devices, monkeypatch):
    meeting, stock = threading.Barrier(3, timeout=30), filling._fill_device

    def met(*arguments):
        meeting.wait()
        return stock(*arguments)

    monkeypatch.setattr(filling, "_fill_device", met)
    amc.load_state_dict(published, rules=[], device_map=MAP)


def test_parameters_that_have_memory_are_filled_in_place_if_the_map_agrees(published):
    model = poisoned(Model())
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    amc.load_model(model, published, device_map={"": "cpu"})
    assert_loaded(model.state_dict(), dict.fromkeys(TENSORS, HOST))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places


def test_parameters_that_have_memory_elsewhere_are_refused(published, devices, reads):
    model = poisoned(Model())
    with pytest.raises(amc.ConversionError, match=r"filled where they are[\s\S]*embed.weight: xpu:0 in the map, cpu"):
        amc.load_model(model, published, device_map=MAP)
    assert reads == []
    assert all((tensor.view(torch.uint8) == POISON).all() for tensor in model.state_dict().values())


def test_parameter_elsewhere_is_refused_even_if_the_checkpoint_lacks_it(tmp_path, devices, reads):
    save_file({name: TENSORS[name] for name in TENSORS if name != "head.weight"}, tmp_path / "model.safetensors")
    model = meta(Model())
    model.head = Weight(30, 40)
    with pytest.raises(amc.ConversionError, match=r"filled where they are[\s\S]*head.weight: xpu:1 in the map, cpu"):
        amc.load_model(model, tmp_path, device_map=MAP, strict=False)
    assert reads == []


def test_parameters_of_another_dtype_are_replaced_where_they_were(published, devices):
    model = Model().to(torch.float64)
    with pytest.raises(amc.ConversionError, match="filled where they are"):
        amc.load_model(model, published, device_map=MAP, dtype=torch.float32)
    amc.load_model(model, published, device_map={"": "cpu"}, dtype=torch.float32)
    assert_loaded(model.state_dict(), dict.fromkeys(TENSORS, HOST))


def mixtral(tmp_path):
    from tests.model_zoo import build_model, write_checkpoint

    write_checkpoint(build_model("mixtral"), tmp_path)
    return build_model("mixtral")


def test_map_from_accelerate_places_every_tensor_of_a_model(tmp_path, devices):
    pytest.importorskip("transformers", reason="the model is a transformers model")
    accelerate = pytest.importorskip("accelerate")
    model = mixtral(tmp_path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    device_map = accelerate.infer_auto_device_map(
        model,
        max_memory={0: size * 2 // 3, 1: size * 2 // 3, "cpu": size},
        no_split_module_classes=["MixtralDecoderLayer"],
    )
    assert set(device_map.values()) == {0, 1}
    wanted = amc.load_state_dict(tmp_path)
    computed = {name: buffer.clone() for name, buffer in model.named_buffers()}
    amc.load_model(meta(model), tmp_path, device_map=device_map)
    where = {name: DeviceMap(device_map).device_of(name) for name in (*wanted, *computed)}
    assert_loaded(model.state_dict(keep_vars=True), where, wanted)
    for name, buffer in model.named_buffers():
        assert buffer.device == where[name]
        assert_bytes_equal(buffer.as_subclass(torch.Tensor), computed[name])
    assert_loaded(amc.load_state_dict(tmp_path, device_map=device_map), where, wanted)


@pytest.mark.parametrize("rotary", [FIRST, HOST])
def test_computed_buffers_go_where_their_module_does(tmp_path, devices, rotary):
    pytest.importorskip("transformers", reason="the model is a transformers model")
    model = mixtral(tmp_path)
    computed = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert computed
    amc.load_model(meta(model), tmp_path, device_map={"": 1, "model.rotary_emb": 0 if rotary == FIRST else "cpu"})
    for name, buffer in model.named_buffers():
        assert buffer.device == rotary
        assert_bytes_equal(buffer.as_subclass(torch.Tensor), computed[name])


def test_computed_buffer_that_no_entry_covers_is_named(tmp_path, devices):
    pytest.importorskip("transformers", reason="the model is a transformers model")
    model = mixtral(tmp_path)
    device_map = dict.fromkeys(["model.embed_tokens", "model.layers", "model.norm", "lm_head"], 0)
    with pytest.raises(amc.ConversionError, match=r"has no device[\s\S]*model\.rotary_emb\.inv_freq"):
        amc.load_model(meta(model), tmp_path, device_map=device_map)


def empty_copy(model, build):
    """Return a model of the same config, built as by callers who want parameters without memory."""
    accelerate = pytest.importorskip("accelerate") if build == "init_empty_weights" else None
    with torch.device("meta") if accelerate is None else accelerate.init_empty_weights():
        return type(model)._from_config(model.config, dtype=torch.bfloat16)


def zoo_model(name):
    """Return a tiny model of a type, or of ``"tied"``: a model whose head is its embedding."""
    from tests.model_zoo import build_model

    if name != "tied":
        return build_model(name)
    config = build_model("mixtral").config
    config.tie_word_embeddings = True
    return type(build_model("mixtral"))._from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("build", ["meta device", "init_empty_weights"])
@pytest.mark.parametrize("name", ["mixtral", "tied", "deepseek_v3", "qwen3_vl_moe"])
def test_every_tensor_of_an_empty_model_is_placed_by_the_map(tmp_path, devices, name, build):
    pytest.importorskip("transformers", reason="the model is a transformers model")
    from tests.model_zoo import write_checkpoint

    full = zoo_model(name)
    write_checkpoint(full, tmp_path)
    wanted = {name: tensor.detach() for name, tensor in full.state_dict(keep_vars=True).items()}
    wanted |= dict(full.named_buffers())
    rotary = next(name for name in wanted if name.endswith("inv_freq")).rpartition(".")[0]
    device_map = {"": 1, rotary: 0, "lm_head": 1}
    model = empty_copy(full, build)
    # A buffer with memory would keep its dtype, but some new buffers are float32.
    report = amc.load_model(model, tmp_path, device_map=device_map, dtype=torch.bfloat16)
    assert report.missing_keys == ()
    state = model.state_dict(keep_vars=True) | dict(model.named_buffers())
    assert_loaded(state, {name: DeviceMap(device_map).device_of(name) for name in wanted}, wanted)
    if name == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("build", ["meta device", "init_empty_weights"])
def test_lenient_load_places_present_tensors(tmp_path, devices, build):
    pytest.importorskip("transformers", reason="the model is a transformers model")
    full = mixtral(tmp_path)
    tensors = amc.load_state_dict(tmp_path, rules=[])
    del tensors["lm_head.weight"], tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "some.safetensors")
    model = empty_copy(full, build)
    device_map = {"": 1, "no.such.module": 0}
    report = amc.load_model(model, tmp_path / "some.safetensors", device_map=device_map, strict=False)
    assert set(report.missing_keys) == {"lm_head.weight", "model.norm.weight"}
    for name, tensor in (model.state_dict(keep_vars=True) | dict(model.named_buffers())).items():
        assert tensor.device == (torch.device("meta") if name in report.missing_keys else SECOND), name
