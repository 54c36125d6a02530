"""Tests of state dicts in layouts that engines make for their kernels, against vLLM's own arithmetic in loops."""

import importlib.util
import itertools

import pytest
import torch
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import UnsupportedError
from automodel_conv.testing import guarded
from tests.comparing import assert_same
from tests.doors.in_memory.support import distinct
from tests.planning.kernel_orders import kernel_tensors

try:
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
except ModuleNotFoundError:
    WeightConverter = None

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_transformers = pytest.mark.skipif(WeightConverter is None, reason="transformers is not installed")

PATH = "model.layers.0.mlp.experts"
KERNEL_LAYOUTS = ("vllm_w31", "vllm_trtllm", "vllm_trtllm_padded", "vllm_deepep")
SIZES = [(2, 128, 192), (1, 128, 128), (0, 128, 64), (2, 256, 64)]  # experts, intermediate, hidden
ODD_SIZES = [(2, 96, 64), (1, 100, 128), (2, 1, 64), (1, 129, 64)]  # intermediate sizes that are no multiple of 128


def experts(sizes, gated=True, layout="transformers"):
    """Return experts in bfloat16 and another tensor, in transformers' layout or in one of vLLM."""
    number, intermediate, hidden = sizes
    shapes = {"gate": (number, intermediate, hidden), "up": (number, intermediate, hidden)}
    parts = distinct({**shapes, "down": (number, hidden, intermediate), "norm": (hidden,)})
    gate, up, down = parts["gate"] if gated else None, parts["up"], parts["down"]
    if layout == "transformers":
        first = {"gate_up_proj": torch.cat([gate, up], 1)} if gate is not None else {"up_proj": up}
        tensors = {**first, "down_proj": down}
    else:
        w13, w2 = kernel_tensors(layout, gate, up, down)
        tensors = {"w13_weight": w13, "w2_weight": w2}
    return {f"{PATH}.{name}": tensor for name, tensor in tensors.items()} | {"model.norm.weight": parts["norm"]}


class Module(nn.Module):
    """A module with the tensors of a state dict as parameters."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = self
            for part in path.split("."):
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, nn.Parameter(torch.full_like(tensor, 3), requires_grad=False))


def ungated_rules():
    return [WeightConverter("experts.*.up_proj.weight", "experts.up_proj", operations=[MergeModulelist(dim=0)])]


@pytest.mark.parametrize(
    ("sizes", "backend"),
    [*((sizes, "torch") for sizes in SIZES), pytest.param((1, 128, 64), "triton", marks=needs_triton)],
)
@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
def test_experts_are_arranged_as_the_kernel_reads_them(layout, sizes, backend):
    start, wanted = experts(sizes), experts(sizes, layout=layout)
    converted = amc.convert_state_dict(start, layout=layout, source_layout="transformers", backend=backend)
    assert_same(converted, wanted)
    back = amc.convert_state_dict(
        converted, Module(start), rules=[], layout="transformers", source_layout=layout, backend=backend
    )
    assert_same(back, start)
    assert_same(amc.revert_state_dict(wanted, Module(start), rules=[], layout=layout, backend=backend), start)


@pytest.mark.parametrize(
    ("sizes", "backend"),
    [*((sizes, "torch") for sizes in ODD_SIZES), pytest.param((1, 96, 64), "triton", marks=needs_triton)],
)
def test_padding_is_written_as_zeros_and_dropped_again(sizes, backend):
    layout = "vllm_trtllm_padded"
    start, wanted = experts(sizes), experts(sizes, layout=layout)
    out = {name: torch.full_like(tensor, float("nan")) for name, tensor in wanted.items()}
    amc.convert_state_dict(start, layout=layout, source_layout="transformers", out=out, backend=backend)
    assert_same(out, wanted)
    assert_same(amc.revert_state_dict(wanted, Module(start), rules=[], layout=layout, backend=backend), start)


@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
def test_only_the_callers_buffers_are_written(layout):
    start, wanted = experts((2, 128, 64)), experts((2, 128, 64), layout=layout)
    buffers = {name: guarded(tensor.shape, tensor.dtype) for name, tensor in wanted.items()}
    out = {name: buffer.tensor for name, buffer in buffers.items()}
    amc.convert_state_dict(start, layout=layout, source_layout="transformers", out=out)
    for buffer in buffers.values():
        buffer.check()
    assert_same(out, wanted)


@needs_transformers
@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
@pytest.mark.parametrize("sizes", [(2, 128, 64), (1, 128, 128)], ids=str)
def test_experts_without_a_gate_are_arranged(layout, sizes):
    start, wanted = experts(sizes, gated=False), experts(sizes, gated=False, layout=layout)
    options = {"rules": ungated_rules(), "source_layout": "transformers"}
    assert_same(amc.convert_state_dict(start, layout=layout, **options), wanted)
    if layout in ("vllm_w31", "vllm_trtllm"):
        back = amc.convert_state_dict(wanted, rules=ungated_rules(), layout="transformers", source_layout=layout)
        assert_same(back, start)


@needs_transformers
@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
def test_rules_and_a_kernel_layout_apply_in_one_copy(layout):
    parts = distinct(
        {f"experts.{e}.{w}.weight": (64, 128) if w == "w2" else (128, 64) for e in range(3) for w in ("w1", "w2", "w3")}
    )
    rules = [
        WeightConverter(
            ["experts.*.w1.weight", "experts.*.w3.weight"],
            "experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("experts.*.w2.weight", "experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]
    stacked = [torch.stack([parts[f"experts.{e}.{w}.weight"] for e in range(3)]) for w in ("w1", "w3", "w2")]
    wanted = dict(zip(("experts.w13_weight", "experts.w2_weight"), kernel_tensors(layout, *stacked), strict=True))
    converted = amc.convert_state_dict(parts, rules=rules, layout=layout)
    assert_same(converted, wanted)
    if layout in ("vllm_w31", "vllm_trtllm"):
        assert_same(amc.revert_state_dict(converted, rules=rules, layout=layout), parts)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(["vllm", *KERNEL_LAYOUTS], 2)))
def test_one_kernel_layout_becomes_another(source, target):
    sizes = (2, 128, 64)
    start, wanted = experts(sizes, layout=source), experts(sizes, layout=target)
    if source in ("vllm_trtllm_padded", "vllm_deepep"):
        with pytest.raises(UnsupportedError, match="without padding is not known"):
            amc.convert_state_dict(start, rules=[], layout=target, source_layout=source)
        return
    assert_same(amc.convert_state_dict(start, rules=[], layout=target, source_layout=source), wanted)


@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
def test_same_layout_keeps_even_padding(layout):
    start = experts((2, 128, 64), layout=layout)
    assert_same(amc.convert_state_dict(start, rules=[], layout=layout, source_layout=layout), start)


@pytest.mark.parametrize("layout", ["vllm", *KERNEL_LAYOUTS])
def test_module_of_an_engine_is_converted_to_in_the_layout_that_is_named(layout):
    start, wanted = experts((2, 128, 64)), experts((2, 128, 64), layout=layout)
    options = {"rules": [], "source_layout": "transformers"}
    assert_same(amc.convert_state_dict(start, Module(wanted), layout=layout, **options), wanted)


@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
def test_module_of_an_engine_is_in_no_layout_that_is_not_named(layout):
    start = experts((2, 128, 64), layout=layout)
    with pytest.raises(UnsupportedError, match=r'(?s)w13_weight.*layout=: one of "vllm", "vllm_w31"'):
        amc.convert_state_dict(start, Module(start), rules=[], source_layout=layout)
    plain = experts((2, 128, 64), layout="vllm")
    assert_same(amc.convert_state_dict(plain, Module(plain), rules=[], source_layout="vllm"), plain)


def test_module_without_padding_does_not_fit_a_layout_that_pads():
    start = experts((2, 96, 64))
    module = Module(experts((2, 96, 64), layout="vllm"))
    with pytest.raises(UnsupportedError, match=r"(?s)w13_weight.*\[2, 192, 64\]: i has size 96, not 128"):
        amc.convert_state_dict(start, module, rules=[], source_layout="transformers", layout="vllm_trtllm_padded")


def test_experts_under_shared_names_are_not_converted_without_their_layout():
    start = experts((2, 128, 64), layout="vllm_trtllm")
    with pytest.raises(UnsupportedError, match=r"(?s)source_layout"):
        amc.convert_state_dict(start, layout="nemo")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_bfloat16_has_the_order_of_the_kernel(dtype):
    start = {name: tensor.to(dtype) for name, tensor in experts((2, 128, 64)).items()}
    with pytest.raises(UnsupportedError, match=r"(?s)gate_up_proj: the kernel.*BF16"):
        amc.convert_state_dict(start, layout="vllm_trtllm", source_layout="transformers")
