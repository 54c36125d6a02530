"""Models and state dicts straight to files: what ``save_pretrained`` writes, for every type; and what is refused."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import (
    ConversionError,
    CoverageError,
    DestinationError,
    NameProblems,
    UnsupportedError,
    WriteError,
)
from automodel_conv.execution import tensor_slabs
from automodel_conv.files import system
from automodel_conv.testing import POISON, address_valued, assert_bytes_equal
from tests.comparing import assert_same, contents, tensors_of, unpadded
from tests.execution.simulated import SimulatedDevice

try:
    from tests.model_zoo import EXCLUDED, OTHER_ORDER, build_model, save_upstream, zoo_names

    NAMES = [name for name in zoo_names() if name not in EXCLUDED]
except ModuleNotFoundError:
    NAMES = []

needs_transformers = pytest.mark.skipif(not NAMES, reason="transformers is not installed")


def loaded_by_upstream(name, directory):
    model = build_model(name)
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory)


def quarter(model):
    return sum(tensor.nbytes for tensor in model.state_dict().values()) // 4


# --- every model type -------------------------------------------------------------------------------------------------


class Case:
    """A model that upstream loaded, and what upstream writes of it, in several files."""

    def __init__(self, name, directory):
        self.name, self.directory = name, directory
        self.model = loaded_by_upstream(name, directory / "published")
        self.most_bytes = quarter(self.model)
        self.expected = directory / "upstream"
        save_upstream(self.model, self.expected, self.most_bytes)

    def assert_is_upstreams(self, directory):
        if self.name not in OTHER_ORDER:
            assert contents(directory) == contents(self.expected)
        assert_same(tensors_of(directory), tensors_of(self.expected))


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param.replace("+", "-")))


@pytest.mark.sweep
def test_what_upstream_loaded_is_saved_as_upstream_saves_it(case, tmp_path):
    report = amc.save_checkpoint(case.model, tmp_path, max_shard_size=case.most_bytes)
    case.assert_is_upstreams(tmp_path)
    assert sorted(report.files) == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert report.bytes_written == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


@pytest.mark.sweep
def test_what_we_load_and_save_is_what_it_was_and_upstream_loads_it(case, tmp_path):
    model = copy.deepcopy(case.model)
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    amc.load_model(model, case.expected, strict=False)
    amc.save_checkpoint(model, tmp_path, max_shard_size=case.most_bytes)
    case.assert_is_upstreams(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same(again.state_dict(), case.model.state_dict())


@pytest.mark.sweep
def test_a_reference_gives_its_names_and_files_back(case, tmp_path):
    amc.save_checkpoint(case.model, tmp_path, reference=case.expected)
    assert contents(tmp_path) == contents(case.expected)


@pytest.mark.sweep
@needs_transformers
def test_exceptions_of_the_sweep_are_exceptions(tmp_path):
    for name in OTHER_ORDER & set(NAMES):
        case = Case(name, tmp_path / name)
        amc.save_checkpoint(case.model, tmp_path / "made", max_shard_size=case.most_bytes)
        assert contents(tmp_path / "made") != contents(case.expected)


# --- a model, and each argument ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    if not NAMES:
        pytest.skip("transformers is not installed")
    return loaded_by_upstream("mixtral", tmp_path_factory.mktemp("mixtral"))


@needs_transformers
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "nemotron_h", "gpt_oss", "llama", "qwen2_moe-tied"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "30KB"}], ids=str)
def test_a_model_made_from_its_config_is_saved_as_upstream_saves_it(name, options, tmp_path):
    model = build_model(name)
    amc.save_checkpoint(model, tmp_path / "ours", **options)  # first: upstream writes into the model's own config
    save_upstream(model, tmp_path / "upstream", options.get("max_shard_size", "5GB"))
    assert contents(tmp_path / "ours") == contents(tmp_path / "upstream")


@needs_transformers
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scratch_bytes", [1 << 16, None])
def test_threads_and_scratch_change_nothing(mixtral, tmp_path, threads, scratch_bytes):
    mixtral.save_pretrained(tmp_path / "upstream")
    report = amc.save_checkpoint(mixtral, tmp_path / "ours", threads=threads, scratch_bytes=scratch_bytes)
    assert contents(tmp_path / "ours") == contents(tmp_path / "upstream")
    assert report.peak_extra_bytes <= (scratch_bytes or 64 << 20)
    assert report.files == ("model.safetensors",)


@needs_transformers
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe-tied"])
def test_tensors_on_a_device_give_the_same_files(name, tmp_path, monkeypatch):
    model = build_model(name)
    amc.save_checkpoint(model, tmp_path / "host", max_shard_size="40KB")
    devices = []

    def device_of(device):
        devices.append(SimulatedDevice(seed=len(devices)))
        return devices[-1]

    monkeypatch.setattr(tensor_slabs, "transfer_device", device_of)
    report = amc.save_checkpoint(model, tmp_path / "device", max_shard_size="40KB", threads=2, scratch_bytes=1 << 18)
    assert contents(tmp_path / "device") == contents(tmp_path / "host")
    [device] = devices
    assert device.operations > 10
    assert len(report.files) > 2


@needs_transformers
def test_tied_weights_are_written_once(tmp_path):
    model = build_model("qwen2_moe-tied")
    names = model.state_dict().keys()
    amc.save_checkpoint(model, tmp_path)
    saved = tensors_of(tmp_path)
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" in saved
    assert "lm_head.weight" not in saved
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert_same(again.state_dict(), model.state_dict())


@needs_transformers
def test_weights_that_are_tied_no_longer_are_both_written(tmp_path):
    model = build_model("qwen2_moe-tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() + 1)
    amc.save_checkpoint(model, tmp_path)
    saved = tensors_of(tmp_path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert_bytes_equal(saved[name], model.state_dict()[name])


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_dtype_casts_all_but_what_the_model_keeps_in_float32(tmp_path, dtype):
    model = build_model("deepseek_v3")
    amc.save_checkpoint(model, tmp_path / "own")
    amc.save_checkpoint(model, tmp_path / "cast", dtype=dtype)
    own, cast = tensors_of(tmp_path / "own"), tensors_of(tmp_path / "cast")
    kept = {name for name in own if name.endswith("e_score_correction_bias")}
    assert kept
    assert_same(cast, {n: t if n in kept else t.to(dtype) for n, t in own.items()})
    config = json.loads((tmp_path / "cast" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert model.config.dtype == torch.bfloat16
    again = type(model).from_pretrained(tmp_path / "cast")
    assert {t.dtype for n, t in again.state_dict().items() if not n.endswith("bias")} == {dtype}


@needs_transformers
def test_the_model_is_left_as_it_was(mixtral, tmp_path):
    config, tensors = mixtral.config.to_dict(), {n: t.clone() for n, t in mixtral.state_dict().items()}
    amc.save_checkpoint(mixtral, tmp_path, dtype=torch.float32)
    assert mixtral.config.to_dict() == config
    assert_same(mixtral.state_dict(), tensors)


@needs_transformers
def test_a_reference_in_the_layout_of_the_model_keeps_it(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path / "grouped", save_original_format=False, max_shard_size="60KB")
    amc.save_checkpoint(mixtral, tmp_path / "ours", reference=tmp_path / "grouped")
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "grouped"))
    for file in (tmp_path / "grouped").glob("*.safetensors"):
        assert unpadded(tmp_path / "ours" / file.name) == unpadded(file)


@needs_transformers
def test_files_go_to_a_directory_that_has_other_things(mixtral, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text("an old one")
    amc.save_checkpoint(mixtral, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mixtral"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@needs_transformers
@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm"])
def test_a_state_dict_in_a_layout_goes_back_by_the_models_rules(mixtral, tmp_path, layout):
    amc.save_checkpoint(mixtral, tmp_path / "published")
    tensors = amc.convert_state_dict(mixtral.state_dict(), rules=[], layout=layout)
    rules = amc.get_checkpoint_conversion_mapping("mixtral")
    amc.save_checkpoint(tensors, tmp_path / "ours", layout=layout, rules=rules)
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "published"))
    amc.save_checkpoint(tensors, tmp_path / "referred", layout=layout, rules=rules, reference=tmp_path / "published")
    assert_same(tensors_of(tmp_path / "referred"), tensors_of(tmp_path / "published"))
    assert not (tmp_path / "ours" / "config.json").exists()


# --- state dicts and modules of any kind ------------------------------------------------------------------------------


def plain():
    return {
        "b.weight": address_valued((5, 6), torch.bfloat16),
        "a.scale": address_valued((), torch.float32, 7),
        "é": address_valued((3, 0), torch.float32),
        "codes": address_valued((17,), torch.uint8, 9),
        "steps": torch.tensor(3),
    }


def test_a_state_dict_with_empty_rules_keeps_its_names(tmp_path):
    amc.save_checkpoint(plain(), tmp_path, rules=[])
    assert_same(tensors_of(tmp_path), plain())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_dtype_casts_only_floats(tmp_path):
    amc.save_checkpoint(plain(), tmp_path, rules=[], dtype=torch.float64)
    floating = {"b.weight", "a.scale", "é"}
    assert_same(tensors_of(tmp_path), {n: t.double() if n in floating else t for n, t in plain().items()})


def test_tensors_of_any_strides_and_with_gradients_are_saved(tmp_path):
    wide = address_valued((6, 8), torch.float32)
    tensors = {
        "turned": wide.t(),
        "part": wide[1:4, 2:7],
        "every other": wide[:, ::2],
        "expanded": address_valued((1, 4), torch.float32, 99).expand(3, 4),
        "trained": nn.Parameter(wide.clone()),
    }
    amc.save_checkpoint(tensors, tmp_path, rules=[])
    assert_same(tensors_of(tmp_path), {name: tensor.detach().clone() for name, tensor in tensors.items()})


def test_tensors_that_share_memory_are_each_written(tmp_path):
    shared = address_valued((4, 4), torch.float32)
    amc.save_checkpoint({"a": shared, "b": shared, "c": shared[1:]}, tmp_path, rules=[])
    assert_same(tensors_of(tmp_path), {"a": shared, "b": shared.clone(), "c": shared[1:].clone()})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Parameter(torch.ones(3))
        self.embed = self.head
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("cache", torch.ones(2), persistent=False)


def test_a_plain_module_is_saved_with_its_ties_once_and_without_a_config(tmp_path):
    amc.save_checkpoint(Tied(), tmp_path)
    assert set(tensors_of(tmp_path)) == {
        "head",
        *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    assert not (tmp_path / "config.json").exists()


def test_sharded_files_have_an_index_that_names_each_tensor_once(tmp_path):
    tensors = {f"layers.{n}.weight": address_valued((10,), torch.float32, n * 10) for n in range(12)}
    report = amc.save_checkpoint(tensors, tmp_path, rules=[], max_shard_size=100)
    assert report.files == tuple(f"model-0000{n}-of-00006.safetensors" for n in range(1, 7))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for file in report.files:
        assert {n for n, f in index["weight_map"].items() if f == file} == load_file(tmp_path / file).keys()
    assert list(index["weight_map"]) == sorted(tensors)
    assert index["metadata"] == {"total_parameters": 120, "total_size": 480}
    assert_same(amc.load_state_dict(tmp_path, rules=[]), tensors)
    assert load_file(tmp_path / report.files[0]).keys() == {"layers.0.weight", "layers.1.weight"}


def test_progress_counts_all_bytes(tmp_path, capsys):
    amc.save_checkpoint(plain(), tmp_path, rules=[], progress=True)
    assert "saving: 100%" in capsys.readouterr().err


# --- what is refused, and leaves nothing behind -----------------------------------------------------------------------


def refused(model, directory, error, text, **options):
    with pytest.raises(error, match=text):
        amc.save_checkpoint(model, directory, **options)
    assert not directory.exists() or not list(directory.iterdir())


def test_a_state_dict_alone_is_refused(tmp_path):
    refused(plain(), tmp_path / "made", UnsupportedError, r"does not say how(.|\n)*rules=\[\] keeps")


@pytest.mark.parametrize("size", [0, "much", -1, 1.5, None])
def test_a_wrong_size_is_refused(tmp_path, size):
    refused(plain(), tmp_path / "made", UnsupportedError, "not a size", rules=[], max_shard_size=size)


@pytest.mark.parametrize("options", [{"threads": 0}, {"scratch_bytes": 1000}])
def test_impossible_options_are_refused(tmp_path, options):
    refused(plain(), tmp_path / "made", ConversionError, "scratch_bytes >=", rules=[], **options)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16"], ids=str)
def test_a_dtype_that_is_no_number_is_refused(tmp_path, dtype):
    refused(plain(), tmp_path / "made", UnsupportedError, "floating torch dtype", rules=[], dtype=dtype)


def test_what_is_no_tensor_is_refused(tmp_path):
    refused({"a": torch.ones(2), "b": 3}, tmp_path / "made", UnsupportedError, "b is not a tensor", rules=[])


class Counted(nn.Linear):
    """Keeps something beside its tensors."""

    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


def tensors_in(model):
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def test_a_module_with_extra_state_that_is_no_tensor_is_refused_and_its_tensors_are_not(tmp_path):
    model, again = (nn.Sequential(Counted(2, 3), nn.Linear(3, 2)) for _ in range(2))
    text = r"extra state(.|\n)* 0._extra_state: dict(.|\n)*without it"
    refused(model, tmp_path / "made", UnsupportedError, text)
    amc.save_checkpoint(tensors_in(model), tmp_path / "made", rules=[])
    amc.load_model(again, tmp_path / "made", rules=[])
    assert_same(tensors_in(again), tensors_in(model))


def test_a_dtype_that_files_cannot_hold_is_refused(tmp_path):
    tensors = {"a": torch.ones(2, dtype=torch.complex128)}
    refused(tensors, tmp_path / "made", UnsupportedError, "a has a dtype", rules=[])


@pytest.mark.parametrize("lazy", [torch.conj, torch._neg_view], ids=["conjugated", "negated"])
def test_views_that_are_computed_when_read_are_refused(tmp_path, lazy):
    tensors = {"a": lazy(torch.ones(2, dtype=torch.complex64))}
    refused(tensors, tmp_path / "made", UnsupportedError, "a cannot be saved as it is stored", rules=[])


@pytest.mark.parametrize("as_module", [True, False])
def test_tensors_without_data_are_refused(tmp_path, as_module):
    module = nn.Linear(2, 3, device="meta")
    model = module if as_module else module.state_dict()
    refused(model, tmp_path / "made", UnsupportedError, "weight has no data", **({} if as_module else {"rules": []}))


@needs_transformers
@pytest.mark.parametrize(
    ("attribute", "value", "text"),
    [("hf_quantizer", SimpleNamespace(), "quantized"), ("_hf_peft_config_loaded", True, "adapters")],
)
def test_models_that_transformers_must_save_are_refused(tmp_path, attribute, value, text):
    model = build_model("llama")
    setattr(model, attribute, value)
    refused(model, tmp_path / "made", UnsupportedError, text)


@needs_transformers
def test_tensors_that_do_not_fit_the_reference_are_refused(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path / "published")
    tensors = dict(mixtral.state_dict())
    del tensors["model.norm.weight"]
    amc.save_checkpoint(
        tensors,
        tmp_path / "less",
        reference=tmp_path / "published",
        rules=amc.get_checkpoint_conversion_mapping("mixtral"),
    )
    assert "model.norm.weight" not in tensors_of(tmp_path / "less")
    tensors["model.extra.weight"] = torch.ones(2)
    refused(
        tensors,
        tmp_path / "made",
        NameProblems,
        r"model\.extra\.weight",
        reference=tmp_path / "published",
        rules=amc.get_checkpoint_conversion_mapping("mixtral"),
    )


@pytest.mark.parametrize(
    "present", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "other.gguf"]
)
def test_a_directory_with_a_checkpoint_is_refused_and_left_alone(tmp_path, present):
    (tmp_path / present).write_bytes(b"precious")
    with pytest.raises(DestinationError, match=rf"holds a checkpoint already(.|\n)*{re.escape(present)}"):
        amc.save_checkpoint(plain(), tmp_path, rules=[])
    assert contents(tmp_path) == {present: b"precious"}


def test_a_file_in_place_of_the_directory_is_told(tmp_path):
    (tmp_path / "made").write_bytes(b"a file")
    with pytest.raises(WriteError, match="cannot write to a directory"):
        amc.save_checkpoint(plain(), tmp_path / "made", rules=[])
    assert (tmp_path / "made").read_bytes() == b"a file"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def pwritev(fd, views, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(system, "pwritev", pwritev)
    refused(plain(), tmp_path / "made", WriteError, "No space left", rules=[])


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
import torch
import automodel_conv as amc
from automodel_conv.cli.measuring import PeakMemory

path, dtype = sys.argv[1], sys.argv[2]
E, I, H = 16, 512, 1024
name = "layers.{}.experts.gate_and_up_projs"
tensors = {name.format(n): torch.ones(E, H, 2 * I, dtype=torch.bfloat16) for n in range(4)}
options = dict(rules=[], layout="nemo", dtype=getattr(torch, dtype), threads=2, scratch_bytes=16 << 20)
amc.save_checkpoint({"experts.gate_and_up_projs": torch.ones(2, 128, 256)}, path + "/warm", **options)
with PeakMemory() as peak:
    report = amc.save_checkpoint(tensors, path + "/made", **options)
print(peak.anonymous_bytes, report.peak_extra_bytes, report.bytes_written)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_stays_bounded_whatever_the_size_of_the_model(tmp_path, dtype):
    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    returning = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc otherwise keeps what is freed
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=returning)
    peak_bytes, bound_bytes, bytes_written = map(int, done.stdout.split())
    assert bytes_written > 96_000_000
    assert bound_bytes <= 16 << 20
    assert peak_bytes <= bound_bytes


@needs_transformers
def test_a_model_that_torch_has_wrapped_is_saved_under_its_own_names(mixtral, tmp_path):
    class Compiled(torch.nn.Module):  # as torch.compile wraps
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

    amc.save_checkpoint(Compiled(mixtral), tmp_path / "wrapped")
    amc.save_checkpoint(mixtral, tmp_path / "plain")
    read = [{file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("wrapped", "plain")]
    assert read[0] == read[1]


@needs_transformers
def test_parts_that_do_not_say_that_they_are_parts_are_refused(tmp_path):
    model = build_model("llama")
    model._tp_size = 2
    refused(model, tmp_path / "made", UnsupportedError, "shards that are not DTensors")


def test_checksums_of_an_earlier_checkpoint_do_not_stay(tmp_path):
    (tmp_path / "model.safetensors.checksums.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"kept")
    amc.save_checkpoint({"a": torch.ones(2)}, tmp_path, rules=[])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "training_args.bin"]


@needs_transformers
def test_a_model_that_holds_a_part_of_its_experts_is_refused_and_nothing_is_written(mixtral, tmp_path):
    model = copy.deepcopy(mixtral)
    experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    experts.down_proj = nn.Parameter(experts.down_proj.data[:6].clone())
    with pytest.raises(CoverageError, match=r"(?s)experts\.down_proj does not hold all experts.*12.*6 experts"):
        amc.save_checkpoint(model, tmp_path / "saved")
    rules = amc.get_model_conversion_mapping(model)
    with pytest.raises(CoverageError, match=r"gate\.weight says"):
        amc.save_checkpoint(model.state_dict(), tmp_path / "saved", rules=rules)
    assert not (tmp_path / "saved").exists()
