"""Tests of ``Refit`` in one process: its arguments, its report and its errors.

``tests/distributed/test_refits.py`` has several processes.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv import Refit
from automodel_conv.testing import POISON, assert_bytes_equal


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.norm = nn.Parameter(torch.rand(5).to(dtype))
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.rand(3, 8, 5).to(dtype))
        self.experts.down_proj = nn.Parameter(torch.rand(3, 5, 4).to(dtype))
        self.register_buffer("steps", torch.tensor([7, 8]))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def in_layout(layout, dtype=torch.bfloat16):
    """Return a poisoned engine in a layout."""
    sizes = {
        "vllm": ("w13_weight", (3, 8, 5), "w2_weight", (3, 5, 4)),
        "nemo": ("gate_and_up_projs", (3, 5, 8), "down_projs", (3, 4, 5)),
        "transformers": ("gate_up_proj", (3, 8, 5), "down_proj", (3, 5, 4)),
    }
    up, up_shape, down, down_shape = sizes[layout]
    made = Model(dtype)
    made.experts = nn.Module()
    made.experts.register_parameter(up, nn.Parameter(torch.empty(up_shape, dtype=dtype)))
    made.experts.register_parameter(down, nn.Parameter(torch.empty(down_shape, dtype=dtype)))
    for tensor in made.state_dict().values():
        tensor.view(torch.uint8).fill_(POISON)
    return made


@pytest.mark.parametrize("layout", ["vllm", "nemo", "transformers"])
def test_engine_gets_what_a_load_of_the_saved_trainer_gives_it(layout, tmp_path):
    trainer, engine, loaded = Model(), in_layout(layout), in_layout(layout)
    refit = Refit(trainer, sends=True, engine=engine, rules=[], layout=layout)
    for step in range(3):
        with torch.no_grad():
            trainer.experts.gate_up_proj.copy_(torch.rand(3, 8, 5) + step)
            trainer.steps += 1
        report = refit()
        directory = tmp_path / str(step)
        amc.save_checkpoint(trainer, directory, rules=[])
        amc.load_model(loaded, directory, rules=[], source_layout="transformers", layout=layout)
        for name, tensor in loaded.state_dict().items():
            assert_bytes_equal(engine.state_dict()[name], tensor)
        for tensor in engine.state_dict().values():
            tensor.view(torch.uint8).fill_(POISON)
        assert (report.bytes_sent, report.bytes_received, report.messages, report.peak_extra_bytes) == (0, 0, 0, 0)
        assert (report.left_out, report.unchanged) == ((), ())


def test_loader_gets_published_names_and_what_it_leaves_is_stated():
    trainer, engine = Model(), nn.Linear(5, 1, bias=False)
    engine.register_buffer("cache", torch.ones(1))
    seen = []

    def load(pairs):
        for name, tensor in pairs:
            seen.append(name)
            if name == "norm":
                engine.weight.data[0].copy_(tensor)

    refit = Refit(trainer, sends=True, engine=engine, loader=load, rules=[])
    traced = len(seen)
    report = refit()
    assert {*seen} == {"norm", "experts.gate_up_proj", "experts.down_proj", "steps"}
    assert len(seen) == traced, "the loader runs in a call"
    assert torch.equal(engine.weight[0], trainer.norm)
    assert {*report.left_out} == {"experts.gate_up_proj", "experts.down_proj", "steps"}
    assert report.unchanged == ("cache",)
    assert report.left_out == refit.forecast().left_out


def test_trainer_is_unchanged_and_engine_keeps_its_tensors():
    trainer, engine = Model(), Model(torch.bfloat16)
    before = copy.deepcopy(trainer.state_dict())
    kept = {name: parameter for name, parameter in engine.named_parameters()}
    places = {name: parameter.data_ptr() for name, parameter in kept.items()}
    engine.norm.requires_grad_(False)
    Refit(trainer, sends=True, engine=engine, rules=[])()
    for name, tensor in trainer.state_dict().items():
        assert_bytes_equal(tensor, before[name])
    for name, parameter in engine.named_parameters():
        assert parameter is kept[name]
        assert parameter.data_ptr() == places[name]
    assert not engine.norm.requires_grad
    assert engine.experts.down_proj.requires_grad


def test_released_refit_runs_again():
    trainer, engine = Model(), Model(torch.bfloat16)
    refit = Refit(trainer, sends=True, engine=engine, rules=[])
    for _ in range(2):
        refit()
        refit.release()
        refit.release()
        trainer.norm.data += 1
    refit()
    assert torch.equal(engine.norm, trainer.norm.bfloat16())


def test_modules_may_be_used_in_any_mode_of_autograd():
    trainer, engine = Model(), Model(torch.bfloat16)
    refit = Refit(trainer, sends=True, engine=engine, rules=[])
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        trainer.norm.data += 1
        with mode():
            refit()
        assert torch.equal(engine.norm.detach(), trainer.norm.detach().bfloat16())
    (engine.norm.float().sum() * trainer.norm.sum()).backward()
    assert trainer.norm.grad is not None
    assert engine.norm.grad is not None


def test_engine_made_in_inference_mode_is_filled():
    trainer = Model()
    with torch.inference_mode():
        engine = Model(torch.bfloat16)
    Refit(trainer, sends=True, engine=engine, rules=[])()
    assert torch.equal(engine.norm, trainer.norm.bfloat16())


def test_module_without_tensors_moves_nothing():
    report = Refit(nn.Module(), sends=True, engine=nn.Module(), rules=[])()
    assert (report.bytes_sent, report.messages) == (0, 0)


def test_new_tensor_and_lost_tensor_are_named_at_the_next_call():
    trainer, engine = Model(), Model()
    refit = Refit(trainer, sends=True, engine=engine, rules=[])
    trainer.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(amc.RefitError, match="extra is new") as error:
        refit()
    assert (error.value.new, error.value.broken) == ((), ())
    assert {*error.value.old} == {*engine.state_dict()}
    del trainer.extra
    trainer.norm.data.add_(1)
    refit()
    assert torch.equal(engine.norm, trainer.norm)
    del engine.norm
    with pytest.raises(amc.RefitError, match="norm is gone"):
        refit()


@pytest.mark.parametrize("side", ["trainer", "engine"])
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (torch.zeros(1, 5), r"norm: torch.float32 \[1, 5\] on cpu instead of torch.float32 \[5\] on cpu"),
        (torch.zeros(5).double(), r"norm: torch.float64 \[5\] on cpu instead of torch.float32 \[5\] on cpu"),
    ],
    ids=["shape", "dtype"],
)
def test_other_shape_or_dtype_is_named_at_the_next_call_and_nothing_is_written(side, changed, text):
    sides = {"trainer": Model(), "engine": Model()}
    refit = Refit(sides["trainer"], sends=True, engine=sides["engine"], rules=[])
    kept = sides["engine"].experts.down_proj.detach().clone()
    sides[side].norm.data = changed
    with pytest.raises(amc.RefitError, match=text):
        refit()
    assert_bytes_equal(sides["engine"].experts.down_proj.data, kept)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sends": False, "engine": None}, "no rank of the refit has sends=True"),
        ({"sends": True, "engine": None}, "no rank of the refit has sends=False"),
        ({"sends": False, "engine": nn.Linear(1, 1)}, "engine= is for ranks that send"),
        ({"engine": None, "loader": print}, "loader= is for ranks of the engine"),
        ({"loader": print, "layout": "vllm"}, "leave layout and rules out with loader"),
        ({"bucket_bytes": 31}, "bucket_bytes= is too small"),
        ({"bucket_bytes": "1GB"}, "bucket_bytes= is not a size"),
        ({"bucket_bytes": 1e6}, "bucket_bytes= is not a size"),
        ({"experts": ["0"]}, "experts= is not a list of experts"),
        ({"experts": 3}, "experts= is not a list of experts"),
        ({"layout": "vlmm"}, "vllm"),
        ({"engine": {"a": torch.zeros(1)}}, "engine= is not a module"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(options, text):
    with pytest.raises(amc.UnsupportedError, match=text):
        Refit(Model(), **{"sends": True, "engine": Model(), "rules": [], "bucket_bytes": 4096} | options)


def test_module_is_no_module():
    with pytest.raises(amc.UnsupportedError, match="the first argument is not a module"):
        Refit({"a": torch.zeros(1)}, sends=True, engine=Model())


def test_no_process_group_is_an_error(group):
    dist.destroy_process_group()
    try:
        with pytest.raises(amc.UnsupportedError, match=r"(?s)there is no process group.*init_process_group"):
            Refit(Model(), sends=True, engine=Model())
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_names_that_do_not_fit_are_all_in_one_error():
    engine = Model()
    engine.more = nn.Parameter(torch.zeros(1))
    engine.norm = nn.Parameter(torch.zeros(6))
    del engine.experts.down_proj
    with pytest.raises(amc.NameProblems) as error:
        Refit(Model(), sends=True, engine=engine, rules=[])
    for text in ("more", "experts.down_proj", r"norm: expected \[6\], found \[5\]"):
        error.match(text)


def test_elements_that_share_memory_are_refused():
    engine = Model()
    engine.norm.data = torch.zeros(1).expand(5)
    with pytest.raises(amc.ConversionError, match="elements of the buffer of norm share memory"):
        Refit(Model(), sends=True, engine=engine, rules=[])


def test_tensors_of_an_engine_that_overlap_are_refused():
    engine = Model()
    memory = torch.zeros(8)
    engine.norm.data = memory[:5]
    engine.more = nn.Parameter(memory[3:])
    trainer = Model()
    trainer.more = nn.Parameter(torch.ones(5))
    with pytest.raises(amc.ConversionError, match=r"more|norm"):
        Refit(trainer, sends=True, engine=engine, rules=[])


def test_forecast_and_report_can_be_printed():
    refit = Refit(Model(), sends=True, engine=Model(), rules=[])
    assert "senders" in str(refit.forecast())
    assert "seconds" in str(refit())


def test_checkpoint_of_the_trainer_and_refit_cast_alike(tmp_path):
    """Round float32 to bfloat16 once, at ties too."""
    trainer, engine, loaded = nn.Module(), nn.Module(), nn.Module()
    bits = torch.arange(0x3F7F_8000, 0x3F7F_8000 + 0x30000, 0x101, dtype=torch.int32).view(torch.float32)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38])
    trainer.a = nn.Parameter(torch.cat([bits, special]))
    for made in (engine, loaded):
        made.a = nn.Parameter(torch.empty(trainer.a.shape, dtype=torch.bfloat16))
    Refit(trainer, sends=True, engine=engine, rules=[])()
    save_file({"a": trainer.a.data}, tmp_path / "model.safetensors")
    amc.load_model(loaded, tmp_path, rules=[])
    assert_bytes_equal(engine.a.data, loaded.a.data)
    assert_bytes_equal(engine.a.data, trainer.a.data.bfloat16())


def test_experts_in_another_order_reach_their_places():
    trainer, engine = Model(), in_layout("transformers", torch.float32)
    order = [2, 0, 1]
    Refit(trainer, sends=True, engine=engine, rules=[], layout="transformers", experts=order)()
    for name in ("gate_up_proj", "down_proj"):
        sent, got = getattr(trainer.experts, name), getattr(engine.experts, name)
        for place, expert in enumerate(order):
            assert_bytes_equal(got[expert], sent[place])


def test_experts_that_are_named_twice_are_refused():
    with pytest.raises(amc.CoverageError, match=r"do not hold all of experts\."):
        Refit(Model(), sends=True, engine=in_layout("transformers"), rules=[], layout="transformers", experts=[0, 0, 2])


def test_experts_without_tensors_of_several_are_refused():
    with pytest.raises(amc.UnsupportedError, match="experts= names no tensors"):
        Refit(nn.Linear(3, 2), sends=True, engine=nn.Linear(3, 2), experts=[0])


def test_release_forgets_the_memory_of_modules_until_the_next_call():
    trainer, engine = Model(), Model(torch.bfloat16)
    refit = Refit(trainer, sends=True, engine=engine, rules=[])
    refit()
    old = trainer.norm.untyped_storage()
    trainer.norm.data = trainer.norm.data.clone()
    uses = torch._C._storage_Use_Count(old._cdata)
    refit.release()
    assert torch._C._storage_Use_Count(old._cdata) < uses
    trainer.norm.data.add_(1)
    refit()
    assert_bytes_equal(engine.norm.data, trainer.norm.data.bfloat16())


def test_engine_tensors_that_overlap_are_refused():
    engine = nn.Module()
    engine.a = nn.Parameter(torch.zeros(6))
    engine.b = nn.Parameter(engine.a.data[3:])
    trainer = nn.Module()
    trainer.a, trainer.b = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(3))
    with pytest.raises(amc.ConversionError, match="share memory"):
        Refit(trainer, sends=True, engine=engine)


def test_engine_parameter_with_repeated_elements_is_refused():
    engine = nn.Module()
    engine.a = nn.Parameter(torch.zeros(1).expand(4))
    trainer = nn.Module()
    trainer.a = nn.Parameter(torch.ones(4))
    with pytest.raises(amc.ConversionError, match="elements of the buffer of a share memory"):
        Refit(trainer, sends=True, engine=engine)


@pytest.mark.parametrize("first", [True, False])
def test_tensors_and_calls_of_inference_mode_are_like_others(first):
    with torch.inference_mode():
        trainer, engine = nn.Linear(3, 2), nn.Linear(3, 2)
    refit = Refit(trainer, sends=True, engine=engine)
    for mode in (first, not first):
        with torch.inference_mode():
            engine.weight.fill_(float("nan"))
        with torch.inference_mode(mode):
            refit()
        assert_bytes_equal(engine.weight.data, trainer.weight.data)


def test_tensor_that_is_added_is_named():
    trainer, engine = nn.Linear(3, 2), nn.Linear(3, 2)
    refit = Refit(trainer, sends=True, engine=engine)
    engine.scale = nn.Parameter(torch.ones(2))
    with pytest.raises(amc.RefitError, match="scale is new") as error:
        refit()
    assert (error.value.new, error.value.old, error.value.broken) == ((), ("weight", "bias"), ())


def test_loader_that_removes_a_parameter_is_refused():
    engine = nn.Linear(3, 2)

    def load(pairs):
        engine.weight.data.copy_(dict(pairs)["weight"])
        del engine.bias

    with pytest.raises(amc.NameProblems, match="the loader removes bias"):
        Refit(nn.Linear(3, 2), sends=True, engine=engine, loader=load)
