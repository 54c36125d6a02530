"""Tests of state dicts of experts in every layout: round trips, kernels, and layouts that are ambiguous."""

import importlib.util
import itertools

import pytest
import torch

import automodel_conv as amc
from automodel_conv.errors import UnsupportedError
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import assert_same
from tests.doors.in_memory.support import LAYOUTS, PATH, E, H, I, distinct, grouped, merging, projections

try:
    from transformers import core_model_loading as core
    from transformers.core_model_loading import MergeModulelist, WeightConverter
except ModuleNotFoundError:
    core = None

needs_transformers = pytest.mark.skipif(core is None, reason="transformers is not installed")


def ungated_rules():
    return [WeightConverter("experts.*.up_proj.weight", "experts.up_proj", operations=[MergeModulelist(dim=0)])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts_round_trip(source, target, dtype):
    start = amc.convert_state_dict(grouped(dtype=dtype), layout=source)
    converted = amc.convert_state_dict(start, layout=target, source_layout=source)
    assert_same(converted, amc.convert_state_dict(grouped(dtype=dtype), layout=target))
    assert_same(amc.convert_state_dict(converted, layout=source, source_layout=target), start)
    assert_same(amc.revert_state_dict(converted, layout=target), grouped(dtype=dtype))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_kernels_write_layouts_as_torch_does(source, target, dtype):
    start = amc.convert_state_dict(grouped(dtype=dtype), layout=source)
    converted = {
        backend: amc.convert_state_dict(start, layout=target, source_layout=source, backend=backend)
        for backend in ("torch", "triton")
    }
    assert_same(converted["triton"], converted["torch"])
    back = {name: torch.full_like(tensor, 3) for name, tensor in start.items()}
    amc.convert_state_dict(converted["triton"], layout=source, source_layout=target, out=back, backend="triton")
    assert_same(back, start)
    assert_same(amc.revert_state_dict(converted["triton"], layout=target, backend="triton"), grouped(dtype=dtype))


@needs_transformers
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_kernels_merge_and_split_projections_as_torch_does(layout):
    tensors = projections(dtype=torch.bfloat16)
    converted = {
        backend: amc.convert_state_dict(tensors, rules=merging(), layout=layout, backend=backend)
        for backend in ("torch", "triton")
    }
    assert_same(converted["triton"], converted["torch"])
    assert_same(amc.revert_state_dict(converted["triton"], rules=merging(), layout=layout, backend="triton"), tensors)


@needs_transformers
@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts_of_experts_without_a_gate_round_trip(source, target):
    of_transformers = {"rules": ungated_rules(), "source_layout": "transformers"}
    start = amc.convert_state_dict(grouped(gated=False), layout=source, **of_transformers)
    assert sum(name.endswith(("up_proj", "up_projs", "w13_weight")) for name in start) == 1
    converted = amc.convert_state_dict(start, layout=target, source_layout=source, rules=ungated_rules())
    back = amc.convert_state_dict(converted, layout=source, source_layout=target, rules=ungated_rules())
    assert_same(back, start)
    first = converted[next(name for name in converted if name.endswith(("up_proj", "up_projs", "w13_weight")))]
    swapped = grouped(gated=False)[f"{PATH}.up_proj"]
    assert_bytes_equal(first, swapped.mT.contiguous() if target in ("nemo", "gpt_oss") else swapped)


def test_layouts_match_their_names():
    start = grouped()
    gate_up, down = start[f"{PATH}.gate_up_proj"], start[f"{PATH}.down_proj"]
    alternating = torch.stack([gate_up[:, :I], gate_up[:, I:]], 2).reshape(E, 2 * I, H)
    bias = start[f"{PATH}.gate_up_proj_bias"]
    nemo = amc.convert_state_dict(start, layout="nemo")
    assert_bytes_equal(nemo[f"{PATH}.gate_and_up_projs"], gate_up.mT.contiguous())
    assert_bytes_equal(nemo[f"{PATH}.down_projs"], down.mT.contiguous())
    vllm = amc.convert_state_dict(start, layout="vllm")
    assert vllm[f"{PATH}.w13_weight"] is gate_up
    assert vllm[f"{PATH}.w2_weight"] is down
    gpt_oss = amc.convert_state_dict(start, layout="gpt_oss")
    assert_bytes_equal(gpt_oss[f"{PATH}.gate_up_proj"], alternating.mT.contiguous())
    expected = torch.stack([bias[:, :I], bias[:, I:]], 2).reshape(E, 2 * I)
    assert_bytes_equal(gpt_oss[f"{PATH}.gate_up_proj_bias"], expected)


@pytest.mark.parametrize("argument", ["layout", "source_layout"])
def test_layout_without_grouped_tensors_is_refused(argument):
    per_expert = {"experts.0.gate_proj.weight": torch.ones(2, 3)}
    with pytest.raises(UnsupportedError, match="no tensor is in the layout"):
        amc.convert_state_dict(per_expert, **{argument: "nemo"})


def sized(intermediate, hidden, layout="transformers"):
    """Return grouped experts of other sizes, in a layout."""
    shapes = {f"{PATH}.gate_up_proj": (E, 2 * intermediate, hidden), f"{PATH}.down_proj": (E, hidden, intermediate)}
    return amc.convert_state_dict(distinct(shapes), source_layout="transformers", layout=layout)


@pytest.mark.parametrize(("intermediate", "hidden"), [(5, 7), (4, 8), (6, 6), (1, 1), (1, 2)])
def test_unmarked_grouped_experts_are_identified_by_shapes_or_refused(intermediate, hidden):
    plain = sized(intermediate, hidden)
    assert_same(amc.convert_state_dict(plain, layout="nemo"), sized(intermediate, hidden, "nemo"))
    with pytest.raises(UnsupportedError, match="source_layout="):
        amc.convert_state_dict(sized(intermediate, hidden, "gpt_oss"), layout="nemo")
    for name, tensor in plain.items():
        if "gate_up" in name and hidden % 2:  # an odd dimension cannot hold gate and up
            converted = amc.convert_state_dict({name: tensor}, layout="nemo")
            assert_bytes_equal(converted[f"{PATH}.gate_and_up_projs"], tensor.mT.contiguous())
            continue
        with pytest.raises(UnsupportedError, match=f"(?s){name}.*source_layout="):
            amc.convert_state_dict({name: tensor}, layout="nemo")


@needs_transformers
def test_unmarked_ungated_experts_are_an_error():
    tensors = grouped(gated=False)
    with pytest.raises(UnsupportedError, match=r"(?s)up_proj.*source_layout="):
        amc.convert_state_dict(tensors, layout="nemo", rules=ungated_rules())


@needs_transformers
@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm", "vllm_w31"])
@pytest.mark.parametrize(("intermediate", "hidden"), [(5, 7), (4, 8), (6, 6)])
def test_unmarked_experts_in_another_layout_are_not_split(intermediate, hidden, layout):
    converted = sized(intermediate, hidden, layout)
    with pytest.raises(UnsupportedError, match=r"(?s)experts.* layout="):
        amc.revert_state_dict(converted, rules=merging())
    apart = amc.revert_state_dict(converted, rules=merging(), layout=layout)
    assert_same(apart, amc.revert_state_dict(sized(intermediate, hidden), rules=merging()))


@needs_transformers
def test_part_of_a_model_is_split_by_itself():
    tensors = sized(4, 8)
    for name, tensor in tensors.items():
        whole = amc.revert_state_dict(tensors, rules=merging())
        part = amc.revert_state_dict({name: tensor}, rules=merging())
        assert_same(part, {each: whole[each] for each in part})
        assert len(part) == (2 * E if "gate_up" in name else E)


@pytest.mark.parametrize("argument", ["layout", "source_layout"])
def test_an_unknown_layout_is_named(argument):
    with pytest.raises(UnsupportedError, match="unknown layout 'grouped'"):
        amc.convert_state_dict(grouped(), **{argument: "grouped"})
