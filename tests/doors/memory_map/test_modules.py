"""Tests of modules and transformers models with ``memory_map=True``: mapped if possible, saved and trained as usual."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import DestinationError
from automodel_conv.execution.mapping import map_targets
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import assert_same, assert_same_in_order, contents, tensors_of
from tests.doors.memory_map.support import hashes, overwrite, total, write, write_by_hand

try:
    from tests.model_zoo import build_model, write_checkpoint
except ModuleNotFoundError:
    build_model = None

needs_transformers = pytest.mark.skipif(build_model is None, reason="transformers is not installed")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux"),
    pytest.mark.filterwarnings("ignore"),
]


class Two(nn.Module):
    def __init__(self, device: str = "meta", tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3, 40, device=device))
        self.b = self.a if tied else nn.Parameter(torch.zeros(3, 40, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))


VALUES = {"a": torch.arange(120.0).reshape(3, 40), "b": torch.ones(3, 40), "count": torch.tensor(7)}


def test_new_parameters_and_buffers_are_mapped_and_materialized_ones_are_read_in_place(tmp_path):
    write(tmp_path, **VALUES)
    model = Two()
    model.a = nn.Parameter(torch.zeros(3, 40))
    place = model.a.data_ptr()
    report = amc.load_model(model, tmp_path, memory_map=True)
    assert model.a.data_ptr() == place
    assert (report.bytes_read, report.bytes_mapped) == (480, 488)
    assert_same(dict(model.state_dict()), VALUES)
    assert type(model.b) is nn.Parameter
    assert model.b.requires_grad


def test_a_parameter_of_another_dtype_is_replaced_by_a_mapped_one(tmp_path):
    write(tmp_path, **{name: v.bfloat16() if v.is_floating_point() else v for name, v in VALUES.items()})
    model = Two("cpu")
    report = amc.load_model(model, tmp_path, dtype=torch.bfloat16, memory_map=True)
    assert (report.bytes_read, report.bytes_mapped) == (8, 480)
    assert model.a.dtype == torch.bfloat16


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b")])
def test_one_parameter_under_several_names_shares_memory(tmp_path, names):
    write(tmp_path, count=VALUES["count"], **{name: VALUES["a"].clone() for name in names})
    model = Two(tied=True)
    report = amc.load_model(model, tmp_path, memory_map=True)
    assert model.a is model.b
    assert_bytes_equal(model.a.detach(), VALUES["a"])
    assert (report.bytes_read, report.peak_extra_bytes) == (0, 0)
    loaded = amc.load_state_dict(tmp_path, Two(tied=True), memory_map=True)
    assert loaded["a"] is loaded["b"]


def test_targets_on_the_same_bytes_do_not_share_memory(tmp_path):
    plan = amc.compile_plan(write(tmp_path, a=VALUES["a"]), rules=[])
    checkpoint = amc.open_checkpoint(tmp_path)
    target = plan.targets[0]
    twice = amc.CopyPlan(plan.sources, (target, target._replace(name="b")), plan.rules)
    host = dict.fromkeys("ab", torch.device("cpu"))
    mapped = map_targets(twice, checkpoint, host)
    mapped["a"].zero_()
    assert_bytes_equal(mapped["b"], VALUES["a"])
    mapped["b"].zero_()
    assert_bytes_equal(amc.load_state_dict(tmp_path, rules=[], memory_map=True)["a"], VALUES["a"])


def test_only_targets_on_the_cpu_are_mapped(tmp_path):
    checkpoint = amc.open_checkpoint(write(tmp_path, a=VALUES["a"], b=VALUES["b"]))
    devices = {"a": torch.device("cpu"), "b": torch.device("cuda", 0)}
    assert list(map_targets(amc.compile_plan(checkpoint, rules=[]), checkpoint, devices)) == ["a"]


def test_a_mapped_model_trains_and_its_files_stay(tmp_path):
    write(tmp_path, **VALUES)
    before = hashes(tmp_path)
    models = []
    for memory_map in (True, False):
        torch.manual_seed(0)
        model = Two()
        amc.load_model(model, tmp_path, memory_map=memory_map)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            ((model.a * model.b).sum() ** 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_same(dict(models[0].state_dict()), dict(models[1].state_dict()))
    assert not torch.equal(models[0].a, VALUES["a"])
    assert hashes(tmp_path) == before


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    model = build_model("mixtral")
    write_checkpoint(model, directory := tmp_path_factory.mktemp("published"))
    return directory


@pytest.fixture(scope="module")
def own(published, tmp_path_factory):
    """Write the checkpoint in the model's own layout."""
    directory = tmp_path_factory.mktemp("own") / "out"
    amc.convert_checkpoint(published, directory)
    return directory


def meta_model(directory: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))


@needs_transformers
def test_a_checkpoint_in_the_models_own_layout_is_mapped_whole_and_equals_from_pretrained(published, own):
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(published)
    before = hashes(own)
    loaded = amc.load_state_dict(own, memory_map=True)
    assert_same_in_order(loaded, expected.state_dict())
    assert loaded.report.bytes_read == 0
    assert loaded.report.bytes_mapped == total(loaded)
    model = meta_model(own)
    report = amc.load_model(model, own, memory_map=True)
    assert (report.bytes_read, report.bytes_mapped) == (0, total(loaded))
    assert_same_in_order(model.state_dict(), expected.state_dict())
    tokens = torch.arange(6).reshape(1, 6)
    for each in (model, expected):
        each.config._experts_implementation = "eager"  # other implementations need larger sizes
    assert_bytes_equal(model.eval()(tokens).logits, expected.eval()(tokens).logits)
    overwrite(model.state_dict())
    overwrite(loaded)
    assert hashes(own) == before


@needs_transformers
def test_targets_merged_from_separate_parts_are_read(published):
    checkpoint = amc.open_checkpoint(published)
    loaded = amc.load_state_dict(published, memory_map=True)
    experts = {name for name in loaded if ".experts." in name}
    assert experts
    assert loaded.report.bytes_mapped == sum(loaded[name].nbytes for name in loaded.keys() - experts)
    # A read includes small gaps, in which mapped tensors are.
    assert sum(loaded[name].nbytes for name in experts) <= loaded.report.bytes_read <= sum(checkpoint.nbytes)
    assert_same_in_order(loaded, amc.load_state_dict(published))


def in_runs(published: Path, directory: Path, order: tuple[str, ...] = ("w1", "w3")) -> Path:
    """Write the same checkpoint to one file: per layer ``order`` of each expert alternating, then w2 of all experts."""

    def place(name):
        layer, _, expert = name.partition(".experts.")
        if not expert:
            return ("", name)
        number, part, _ = expert.split(".")
        return (layer, part == "w2", int(number), part != order[0])

    parts = tensors_of(published)
    write_by_hand(directory, 0, **{name: parts[name] for name in sorted(parts, key=place)})
    (directory / "config.json").write_bytes((published / "config.json").read_bytes())
    return directory


@needs_transformers
@pytest.mark.parametrize("order", [("w1", "w3"), ("w3", "w1")])
def test_consecutive_parts_in_target_order_are_one_region(published, tmp_path, order):
    loaded = amc.load_state_dict(in_runs(published, tmp_path, order), memory_map=True)
    merged = {name for name in loaded if name.endswith("experts.gate_up_proj")}
    read = set() if order == ("w1", "w3") else merged
    assert merged
    least = sum(loaded[name].nbytes for name in read)
    # A read includes small gaps, in which mapped tensors are.
    assert least <= loaded.report.bytes_read <= (total(loaded) if read else 0)
    assert loaded.report.bytes_mapped == sum(loaded[name].nbytes for name in loaded.keys() - read)
    assert_same_in_order(loaded, amc.load_state_dict(published))


@needs_transformers
@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm", "vllm_w31", "transformers"])
def test_other_layouts_have_the_same_bytes_mapped_or_not(published, tmp_path, layout):
    amc.convert_checkpoint(published, tmp_path / layout, layout=layout)
    mapped = amc.load_state_dict(tmp_path / layout, rules=[], memory_map=True)
    assert mapped.report.bytes_read == 0
    assert_same_in_order(mapped, amc.load_state_dict(tmp_path / layout, rules=[]))
    again = amc.load_state_dict(tmp_path / layout, memory_map=True)
    permutes = layout in ("nemo", "gpt_oss", "vllm_w31")
    assert (again.report.bytes_read > 0) == permutes
    assert again.report.bytes_read < total(again)
    assert_same_in_order(again, amc.load_state_dict(published))


@needs_transformers
@pytest.mark.parametrize("saves", ["beside", "after removing", "by transformers"])
def test_a_mapped_model_is_saved_over_its_own_files(own, tmp_path, saves):
    """Check that files are written under other names and then replace the old ones. Source: safetensors 0.8.0."""
    place = tmp_path / "place"
    shutil.copytree(own, place)
    before = contents(place)
    model = meta_model(place)
    amc.load_model(model, place, memory_map=True)
    if saves == "beside":
        with pytest.raises(DestinationError, match="a checkpoint already"):
            amc.save_checkpoint(model, place, reference=own)
        amc.save_checkpoint(model, tmp_path / "out", reference=place)
        assert contents(tmp_path / "out") == before
    elif saves == "after removing":
        for file in place.glob("*.safetensors*"):
            file.unlink()
        amc.save_checkpoint(model, place, reference=own)
    else:
        model.save_pretrained(place, save_original_format=False)
    assert_same(tensors_of(place), tensors_of(own))
    assert_same(dict(model.state_dict()), amc.load_state_dict(own))


@needs_transformers
def test_the_hook_maps_contiguous_planned_targets(published, tmp_path):
    from transformers import AutoModelForCausalLM

    in_runs(published, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    experts = {name: tensor for name, tensor in expected.state_dict().items() if ".experts." in name}
    before = hashes(tmp_path)
    with amc.accelerate_transformers() as plain:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with amc.accelerate_transformers(memory_map=True) as acceleration:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        with amc.accelerate_transformers():
            AutoModelForCausalLM.from_pretrained(tmp_path)
        cast = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert [load.bytes_mapped for load in plain.loads] == [0]
    assert [load.bytes_mapped for load in acceleration.loads] == [total(experts)] * 2 + [0]
    assert_same_in_order(model.state_dict(), expected.state_dict())
    assert cast.dtype == torch.float32
    overwrite(model.state_dict())
    assert hashes(tmp_path) == before
    assert not amc.integrations.transformers._HOOK.maps


@needs_transformers
def test_last_install_determines_whether_to_map():
    from automodel_conv.integrations.transformers import _HOOK

    try:
        first = amc.install(memory_map=True)
        assert _HOOK.maps
        assert amc.install() is first
        assert not _HOOK.maps
        with amc.accelerate_transformers(memory_map=True):
            assert _HOOK.maps
            amc.uninstall()
            assert not _HOOK.maps
        assert not _HOOK.maps
    finally:
        amc.uninstall()
