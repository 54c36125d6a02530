"""Tests of invalid device maps: refused by name before anything is read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.destinations import device_map as device_map_module
from automodel_conv.destinations.device_map import DeviceMap
from automodel_conv.execution import device as streaming
from automodel_conv.execution import host as cpu
from tests.destinations.support import MAP, TENSORS, WHERE, Model, assert_loaded, meta, tied
from tests.execution.elsewhere import FIRST, HOST


def both(path, model, **arguments):
    """Run the two loads that accept a map."""
    return (
        lambda: amc.load_state_dict(path, model(), **arguments),
        lambda: amc.load_model(model(), path, **arguments),
    )


def test_tensors_that_no_entry_covers_are_named_before_anything_is_read(published, devices, reads):
    device_map = {name: device for name, device in MAP.items() if name not in ("", "layers.10")}
    for load in both(published, lambda: meta(Model()), device_map=device_map):
        with pytest.raises(amc.ConversionError) as raised:
            load()
        text = str(raised.value)
        assert "has no device for 2 of 4 tensors" in text
        assert "layers.10.weight" in text
        assert "head.weight" in text
        assert "embed" not in text
        assert '""' in text
    assert reads == []


def test_entry_that_names_nothing_is_refused_unless_the_load_is_lenient(published, devices, reads):
    device_map = MAP | {"layer.1": 0}
    for load in both(published, lambda: meta(Model()), device_map=device_map):
        with pytest.raises(amc.ConversionError, match=r"no module and no parameter[\s\S]*layer\.1"):
            load()
    assert reads == []
    for arguments in ({"model": meta(Model())}, {"rules": []}):
        assert_loaded(amc.load_state_dict(published, device_map=device_map, strict=False, **arguments), WHERE)


def test_rules_without_a_model_do_not_list_modules(published, devices):
    device_map = MAP | {"rotary_emb": 0, "layers.0.act_fn": "cpu"}
    assert_loaded(amc.load_state_dict(published, rules=[], device_map=device_map), WHERE)


def test_names_of_one_tensor_must_share_a_device(tmp_path, devices, reads):
    save_file(
        {name: tensor for name, tensor in TENSORS.items() if name != "head.weight"}, tmp_path / "model.safetensors"
    )
    for load in both(tmp_path, tied, device_map=MAP):
        with pytest.raises(amc.ConversionError, match=r"embed.weight and head.weight are one[\s\S]*xpu:0, xpu:1"):
            load()
    assert reads == []
    for device_map in (MAP | {"head": 0}, MAP | {"embed": 1}):
        home = DeviceMap(device_map).device_of("head.weight")
        model = tied()
        amc.load_model(model, tmp_path, device_map=device_map)
        assert model.head.weight is model.embed.weight
        assert model.head.weight.device == home
        loaded = amc.load_state_dict(tmp_path, tied(), device_map=device_map)
        assert loaded["head.weight"] is loaded["embed.weight"]
        assert loaded["head.weight"].device == home


@pytest.mark.parametrize(
    ("device_map", "kind", "text"),
    [
        ({"": "cpu", "head": "disk"}, amc.UnsupportedError, r"to disk[\s\S]*'head'[\s\S]*offload_folder"),
        ({"": 0}, amc.UnsupportedError, "cannot load to cuda:0"),
        ({"": "cuda:99"}, amc.UnsupportedError, "cannot load to cuda:99"),
        ({"": "mps"}, amc.UnsupportedError, "cannot load to mps"),
        ({"": "meta"}, amc.UnsupportedError, r"meta device holds no data[\s\S]*compile_plan"),
        ({"": -1}, amc.UnsupportedError, r"not a device: -1[\s\S]*cpu"),
        ({"": 300}, amc.UnsupportedError, r"not a device[\s\S]*300"),
        ({"": "cuda:256"}, amc.UnsupportedError, r"not a device[\s\S]*cuda:256"),
        ({"": 2**70}, amc.UnsupportedError, "not a device"),
        ({"": True}, amc.ConversionError, r"not a device[\s\S]*True"),
        ({"": None}, amc.ConversionError, r"not a device[\s\S]*None"),
        ({"embed": "gpu"}, amc.ConversionError, r"where: +device_map\['embed'\]"),
        ({1: "cpu"}, amc.ConversionError, r"must be names[\s\S]*device_map\[1\]"),
        ("auto", amc.ConversionError, r"not a mapping[\s\S]*'auto'[\s\S]*infer_auto_device_map"),
        ("cuda:0", amc.ConversionError, r"not a mapping[\s\S]*device= is for one device"),
        (0, amc.ConversionError, "not a mapping"),
    ],
)
def test_invalid_map_is_refused_before_anything_is_opened(tmp_path, device_map, kind, text):
    if torch.cuda.is_available() and device_map == {"": 0}:
        pytest.skip("this device exists")
    for load in both(tmp_path / "nowhere", lambda: meta(Model()), device_map=device_map):
        with pytest.raises(kind, match=text):
            load()


@pytest.mark.parametrize("kind", [str, torch.device])
def test_device_and_a_map_exclude_each_other(published, kind):
    for load in both(published, lambda: meta(Model()), device_map={"": "cpu"}, device=kind("cuda:0")):
        with pytest.raises(amc.ConversionError, match="cannot be combined"):
            load()
    # The default of one load is the CPU; the other has none.
    to_a_dict, to_a_model = both(published, lambda: meta(Model()), device_map={"": "cpu"}, device=kind("cpu"))
    assert_loaded(to_a_dict(), dict.fromkeys(TENSORS, HOST))
    with pytest.raises(amc.ConversionError, match="cannot be combined"):
        to_a_model()


def test_parameters_that_a_mesh_places_are_refused(published, devices, monkeypatch):
    monkeypatch.setattr(device_map_module, "is_distributed", lambda tensor: True)
    for load in both(published, lambda: meta(Model()), device_map=MAP):
        with pytest.raises(amc.UnsupportedError, match=r"these are DTensors[\s\S]*embed\.weight"):
            load()


LEAST = 2 * 2 * streaming.LEAST_SCRATCH_BYTES + cpu.LEAST_SCRATCH_BYTES
"""The smallest budget: a ring and windows for each of two devices, and scratch for the host."""


@pytest.mark.parametrize("budget", [60_000, 100_000, 1 << 20, 1 << 40])
@pytest.mark.parametrize("threads", [None, 1, 3, 8])
def test_all_devices_together_stay_within_the_budget(published, devices, budget, threads):
    # Cast, so that all bytes pass through windows and scratch.
    loaded = amc.load_state_dict(
        published, rules=[], device_map=MAP, dtype=torch.bfloat16, memory_budget=budget, threads=threads
    )
    assert 0 < loaded.report.peak_extra_bytes <= budget
    assert 0 < sum(device.pinned_bytes + device.scratch_bytes for device in devices.values()) <= budget
    assert_loaded(loaded, WHERE, {name: tensor.to(torch.bfloat16) for name, tensor in TENSORS.items()})


def test_too_small_budget_for_all_devices_is_refused_with_a_sufficient_one(published, devices, reads):
    with pytest.raises(amc.ConversionError, match="memory_budget is too small") as raised:
        amc.load_state_dict(published, rules=[], device_map=MAP, memory_budget=LEAST - 1)
    assert reads == []
    needed = int(str(raised.value).split("at least ")[1].split()[0])
    loaded = amc.load_state_dict(published, rules=[], device_map=MAP, memory_budget=needed)
    assert loaded.report.peak_extra_bytes <= needed
    assert_loaded(loaded, WHERE)


def test_failing_device_leaves_the_model_unchanged_and_filled_targets_are_named(published, devices):
    devices[FIRST].fail_at = 1
    model = meta(Model())
    with pytest.raises(RuntimeError, match="an illegal access") as raised:
        amc.load_model(model, published, device_map=MAP)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert "embed.weight" not in "".join(getattr(raised.value, "__notes__", ()))
