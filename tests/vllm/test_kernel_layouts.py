"""Experts in layouts for kernels equal those that vLLM's own code arranges after loading."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
    UnquantizedMoeBackend,
    convert_to_unquantized_kernel_format,
)
from vllm.model_executor.layers.quantization.utils.flashinfer_utils import (
    convert_moe_weights_to_flashinfer_trtllm_block_layout,
)

import automodel_conv as amc
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.planning.kernel_orders import kernel_tensors

NAMES = "experts.w13_weight", "experts.w2_weight"


def loaded(experts, intermediate, hidden, gated):
    """Return the tensors that vLLM's loader fills."""
    w13 = address_valued((experts, (1 + gated) * intermediate, hidden), torch.bfloat16)
    return dict(zip(NAMES, (w13, address_valued((experts, hidden, intermediate), torch.bfloat16, 77)), strict=True))


def arranged_by_vllm(tensors, backend, gated):
    """Return the parameters that vLLM makes of those that its loader filled."""
    w13, w2 = (tensor.clone() for tensor in tensors.values())
    size = w2.shape[2]
    config = SimpleNamespace(
        is_act_and_mul=gated, intermediate_size_per_partition=size, intermediate_size_per_partition_unpadded=size
    )
    return dict(zip(NAMES, convert_to_unquantized_kernel_format(backend, config, w13, w2), strict=True))


def assert_arranged(tensors, layout, wanted, gated):
    options = {"rules": ungated() if not gated else []}
    arranged = amc.convert_state_dict(tensors, source_layout="vllm", layout=layout, **options)
    assert arranged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_bytes_equal(arranged[name], tensor)
    if layout != "vllm_trtllm_padded":
        back = amc.convert_state_dict(wanted, source_layout=layout, layout="vllm", **options)
        for name, tensor in tensors.items():
            assert_bytes_equal(back[name], tensor)


def ungated():
    core = pytest.importorskip("transformers.core_model_loading")
    return [core.WeightConverter("experts.*.up.weight", "experts.up_proj", operations=[core.MergeModulelist(dim=0)])]


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("sizes", [(2, 96, 40), (1, 64, 64), (3, 1, 8)], ids=str)
def test_up_is_before_gate_for_cutlass(sizes, gated):
    tensors = loaded(*sizes, gated)
    wanted = arranged_by_vllm(tensors, UnquantizedMoeBackend.FLASHINFER_CUTLASS, gated)
    assert_arranged(tensors, "vllm_w31", wanted, gated)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("sizes", [(2, 128, 192), (1, 128, 128), (2, 256, 64), (3, 384, 320)], ids=str)
def test_blocks_are_those_of_trtllm(sizes, gated):
    pytest.importorskip("flashinfer")
    tensors = loaded(*sizes, gated)
    w13, w2 = (tensor.clone() for tensor in tensors.values())
    views = convert_moe_weights_to_flashinfer_trtllm_block_layout({}, w13, w2, is_gated_act_gemm=gated)
    assert [view.untyped_storage().data_ptr() for view in views] == [t.untyped_storage().data_ptr() for t in (w13, w2)]
    wanted = dict(zip(NAMES, (w13, w2), strict=True))
    for name, tensor in arranged_by_vllm(tensors, UnquantizedMoeBackend.FLASHINFER_TRTLLM, gated).items():
        assert_bytes_equal(tensor, wanted[name])
    for layout in ("vllm_trtllm", "vllm_trtllm_padded"):
        assert_arranged(tensors, layout, wanted, gated)
    assert_reference(tensors, "vllm_trtllm", wanted, gated)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("sizes", [(2, 96, 64), (1, 192, 128), (2, 1, 64), (2, 129, 192)], ids=str)
def test_padding_is_that_of_trtllm(sizes, gated):
    pytest.importorskip("flashinfer")
    tensors = loaded(*sizes, gated)
    wanted = arranged_by_vllm(tensors, UnquantizedMoeBackend.FLASHINFER_TRTLLM, gated)
    assert_arranged(tensors, "vllm_trtllm_padded", wanted, gated)
    assert_reference(tensors, "vllm_trtllm_padded", wanted, gated)


def assert_reference(tensors, layout, wanted, gated):
    """Assert that the loops that stand in for vLLM in other tests arrange experts as vLLM does."""
    w13, w2 = tensors.values()
    gate, up = w13.chunk(2, 1) if gated else (None, w13)
    for tensor, expected in zip(kernel_tensors(layout, gate, up, w2), wanted.values(), strict=True):
        assert_bytes_equal(tensor, expected)


@pytest.mark.parametrize(
    ("sizes", "dtype", "error"),
    [
        ((2, 128, 64), torch.float32, ValueError),
        ((2, 128, 64), torch.float16, ValueError),
        ((2, 128, 96), torch.bfloat16, RuntimeError),
        ((2, 32, 64), torch.bfloat16, RuntimeError),
    ],
    ids=str,
)
def test_what_vllm_refuses_is_refused(sizes, dtype, error):
    pytest.importorskip("flashinfer")
    tensors = {name: tensor.to(dtype) for name, tensor in loaded(*sizes, gated=True).items()}
    with pytest.raises(error):
        convert_moe_weights_to_flashinfer_trtllm_block_layout({}, *(tensor.clone() for tensor in tensors.values()))
    with pytest.raises(amc.UnsupportedError):
        amc.convert_state_dict(tensors, rules=[], source_layout="vllm", layout="vllm_trtllm")


@pytest.mark.parametrize("hidden", [1, 64, 256, 257, 2880])
def test_hidden_size_is_padded_as_for_deepep(hidden, monkeypatch):
    stand_in = ModuleType("deep_ep")
    stand_in.Buffer = stand_in.Config = stand_in.EventOverlap = object  # names in annotations
    monkeypatch.setitem(sys.modules, "deep_ep", stand_in)
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ht import DeepEPHTPrepareAndFinalize

    padded = DeepEPHTPrepareAndFinalize.maybe_roundup_layer_hidden_size(hidden, torch.bfloat16)
    tensors = loaded(1, 2, hidden, gated=True)
    arranged = amc.convert_state_dict(tensors, rules=[], source_layout="vllm", layout="vllm_deepep")
    assert [tuple(tensor.shape) for tensor in arranged.values()] == [(1, 4, padded), (1, padded, 2)]
