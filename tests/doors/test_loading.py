"""Tests of loading into any module: placement of tensors, shared parameters, and allowed casts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.execution import filling
from automodel_conv.testing import POISON, assert_bytes_equal
from tests.execution.simulated import SimulatedDevice


def write(directory: Path, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def poisoned(model: nn.Module) -> nn.Module:
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    return model


class Tied(nn.Module):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(3, device=device))
        self.head = self.embed


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_parameter_under_two_names_gets_one_value(tmp_path, device):
    value = torch.tensor([1.0, torch.nan, -0.0])
    model = Tied(device)
    report = amc.load_model(model, write(tmp_path, embed=value, head=value.clone()))
    assert model.head is model.embed
    assert_bytes_equal(model.embed.detach(), value)
    assert report.peak_extra_bytes >= value.nbytes


def test_different_values_for_one_parameter_are_refused_by_default(tmp_path):
    write(tmp_path, embed=torch.tensor([0.0, 1, 2]), head=torch.tensor([-0.0, 1, 2]))
    with pytest.raises(amc.ConversionError, match="one parameter of the model"):
        amc.load_model(Tied(), tmp_path)
    model = Tied()
    amc.load_model(model, tmp_path, strict=False)
    assert_bytes_equal(model.embed.detach(), torch.tensor([0.0, 1, 2]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_missing_name_of_a_loaded_parameter_is_not_missing(tmp_path, device):
    model = Tied(device)
    report = amc.load_model(model, write(tmp_path, head=torch.ones(3)))
    assert report.missing_keys == ()
    assert model.head is model.embed
    assert_bytes_equal(model.embed.detach(), torch.ones(3))


class Overlapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        flat = torch.zeros(10)
        self.a, self.b = nn.Parameter(flat[:6]), nn.Parameter(flat[4:])


def test_parameters_that_share_memory_are_refused_before_anything_is_written(tmp_path):
    model = poisoned(Overlapping())
    with pytest.raises(amc.ConversionError, match="a and b share memory"):
        amc.load_model(model, write(tmp_path, a=torch.ones(6), b=torch.ones(6)))
    assert (model.a.detach().view(torch.uint8) == POISON).all()


class HandsOutCopies(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"] * 1


def test_a_state_dict_of_copies_is_refused(tmp_path):
    with pytest.raises(amc.UnsupportedError, match="weight is neither a parameter nor a buffer"):
        amc.load_model(HandsOutCopies(2, 2, bias=False), write(tmp_path, weight=torch.ones(2, 2)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_module_with_renamed_state_dict_keys_is_loaded(tmp_path, device):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(3, 4, bias=False, device=device)))
    value = torch.arange(12.0).reshape(4, 3)
    amc.load_model(model, write(tmp_path, **{"0.weight": value}))
    assert_bytes_equal(model.state_dict()["0.weight"], value)


def test_float64_is_accepted(tmp_path):
    model = nn.Linear(2, 2, bias=False)
    value = torch.tensor([[1.5, 2], [3, 4]], dtype=torch.float64)
    amc.load_model(model, write(tmp_path, weight=value))
    assert_bytes_equal(model.weight.detach(), value.float())


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.float32, torch.int64),
        (torch.float32, torch.bool),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.int8, torch.bfloat16),
        (torch.complex64, torch.float32),
    ],
)
def test_cast_that_loses_more_than_precision_is_refused(tmp_path, stored, wanted):
    model = nn.Module()
    model.register_buffer("a", torch.zeros(4, dtype=wanted))
    with pytest.raises(amc.UnsupportedError, match="a cannot be cast for a"):
        amc.load_model(model, write(tmp_path, a=torch.ones(4).to(stored)))


@pytest.mark.parametrize("dtype", ["bf16", "int8", 16, torch.int8, torch.complex128, torch.float8_e4m3fn])
def test_dtype_must_be_floating(tmp_path, dtype):
    with pytest.raises(amc.UnsupportedError, match="not a floating dtype"):
        amc.load_state_dict(write(tmp_path, a=torch.ones(3)), rules=[], dtype=dtype)


def test_config_with_remote_code_is_never_run(tmp_path):
    pytest.importorskip("transformers")
    write(tmp_path, a=torch.ones(3))
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(amc.UnsupportedError, match=r"config\.json"):
        amc.load_state_dict(tmp_path)


def test_layout_of_unmarked_experts_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LongcatFlashConfig(
        num_layers=1, num_hidden_layers=2, hidden_size=16, ffn_hidden_size=20, expert_ffn_hidden_size=12,
        n_routed_experts=3, zero_expert_num=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model = transformers.LongcatFlashForCausalLM(config)
    if all(hasattr(m, "is_transposed") for n, m in model.named_modules() if n.endswith(".experts")):
        pytest.skip("this transformers records the layout")
    with pytest.raises(amc.UnsupportedError, match="does not state their layout"):
        amc.convert_state_dict(model.state_dict(), model, layout="vllm")


def test_concurrent_loads_leave_the_thread_count_of_torch_unchanged(tmp_path):
    write(tmp_path, **{f"t{i}": torch.ones(1000) for i in range(20)})
    before = torch.get_num_threads()
    loads = [
        threading.Thread(target=amc.load_state_dict, args=(tmp_path,), kwargs={"rules": [], "threads": 1})
        for _ in range(6)
    ]
    for load in loads:
        load.start()
    for load in loads:
        load.join()
    seen = []
    after = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    after.start()
    after.join()
    assert (seen, torch.get_num_threads()) == ([before], before)


@pytest.mark.parametrize("device", ["mps", "cuda:99"])
def test_unsupported_device_is_refused(tmp_path, device):
    write(tmp_path, weight=torch.ones(3))
    for load in (
        lambda: amc.load_state_dict(tmp_path, rules=[], device=device),
        lambda: amc.load_model(nn.Linear(3, 1, bias=False), tmp_path, rules=[], device=device),
    ):
        with pytest.raises(amc.UnsupportedError, match=f"cannot load to {device}"):
            load()


def test_streamed_model_reports_copy_backend_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "transfer_device", lambda device: SimulatedDevice())
    model = poisoned(nn.Linear(40, 30))
    write(tmp_path, weight=torch.arange(1200.0).reshape(30, 40).to(torch.float16), bias=torch.ones(30))
    report = amc.load_model(model, tmp_path, scratch_bytes=8192, device_scratch_bytes=8192)
    assert_bytes_equal(model.weight.detach(), torch.arange(1200.0).reshape(30, 40).to(torch.float16).float())
    assert_bytes_equal(model.bias.detach(), torch.ones(30))
    assert (report.copied_by_kernels, report.copied_by_torch) == (0, 1)
    assert report.without_kernels is None  # nothing is streamed to the CPU
    assert 2400 + 120 <= report.peak_extra_bytes <= 16384


def test_loaded_model_moved_to_meta_gets_its_computed_buffers_back(tmp_path):
    """Check modules that transformers marks as loaded; it would not compute their buffers again."""
    pytest.importorskip("transformers", reason="needs a transformers model")
    from tests.model_zoo import build_model, write_checkpoint

    write_checkpoint(build_model("mixtral"), tmp_path)
    model = type(build_model("mixtral")).from_pretrained(tmp_path)
    wanted = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert wanted.keys() - model.state_dict().keys()
    model.to("meta")
    amc.load_model(model, tmp_path)
    for name, buffer in model.named_buffers():
        assert_bytes_equal(buffer, wanted[name])
