"""Tests of ``convert_state_dict`` and ``revert_state_dict``: rules, a model, a reference, and the caller's buffers."""

from unittest import mock

import pytest
import torch
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import ConversionError, NameProblems, UnsupportedError
from automodel_conv.testing import assert_bytes_equal, assert_written, guarded
from tests.comparing import assert_same
from tests.doors.in_memory.support import LAYOUTS, PATH, E, Experts, H, I, grouped, merging, projections

try:
    from transformers import core_model_loading as core
    from transformers.core_model_loading import WeightRenaming
except ModuleNotFoundError:
    core = None

needs_transformers = pytest.mark.skipif(core is None, reason="transformers is not installed")


def merged(tensors, layers=2):
    def stack(n, w):
        return torch.stack([tensors[f"layers.{n}.experts.{e}.{w}.weight"] for e in range(E)])

    converted = {"norm": tensors["norm"]}
    for n in range(layers):
        converted[f"layers.{n}.experts.gate_up_proj"] = torch.cat([stack(n, "w1"), stack(n, "w3")], 1)
        converted[f"layers.{n}.experts.down_proj"] = stack(n, "w2")
    return converted


@needs_transformers
def test_explicit_rules_merge_experts_in_any_order():
    tensors = projections()
    expected = merged(tensors)
    assert_same(amc.convert_state_dict(tensors, rules=merging()), expected)
    backwards = dict(reversed(tensors.items()))
    assert_same(amc.convert_state_dict(backwards, rules=merging()), expected)
    assert_same(amc.revert_state_dict(expected, rules=merging()), tensors)


@needs_transformers
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rules_and_a_layout_apply_in_one_call(layout):
    tensors = projections()
    converted = amc.convert_state_dict(tensors, rules=merging(), layout=layout)
    assert_same(converted, amc.convert_state_dict(merged(tensors), layout=layout))
    assert_same(amc.revert_state_dict(converted, rules=merging(), layout=layout), tensors)


@needs_transformers
def test_model_determines_dtypes_and_order():
    tensors = projections()
    model = Experts(torch.bfloat16)
    converted = amc.convert_state_dict(tensors, model, rules=merging())
    assert list(converted) == list(model.state_dict())
    expected = merged(tensors)
    for name, tensor in converted.items():
        assert_bytes_equal(tensor, expected[name].to(torch.float32 if name == "norm" else torch.bfloat16))


@needs_transformers
def test_strided_sources_and_parameters_are_read():
    tensors = projections()
    strided = {name: nn.Parameter(t.t().contiguous().t()) if t.dim() == 2 else t for name, t in tensors.items()}
    converted = amc.convert_state_dict(strided, rules=merging())
    assert_same(converted, merged(tensors))
    assert not any(t.requires_grad for t in converted.values())


@needs_transformers
def test_missing_expert_is_named():
    tensors = projections()
    del tensors["layers.1.experts.1.w3.weight"]
    with pytest.raises(NameProblems, match=r"layers\.1\.experts\.1\.w3\.weight"):
        amc.convert_state_dict(tensors, Experts(torch.float32), rules=merging())
    with pytest.raises(NameProblems, match=r"layers\.1\.experts\.1\.w3\.weight"):
        amc.convert_state_dict(tensors, rules=merging())


@needs_transformers
def test_parts_of_different_dtypes_are_not_mixed_without_a_model():
    tensors = projections()
    name = "layers.0.experts.2.w2.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.experts\.down_proj have different dtypes"):
        amc.convert_state_dict(tensors, rules=merging())


@needs_transformers
def test_a_reference_restores_its_names_and_boundaries(tmp_path):
    from safetensors.torch import save_file

    tensors = projections()
    save_file(tensors, tmp_path / "model.safetensors")
    converted = amc.convert_state_dict(tensors, rules=merging(), layout="nemo")
    back = amc.revert_state_dict(converted, rules=merging(), layout="nemo", reference=tmp_path)
    assert_same(back, tensors)


@needs_transformers
def test_unconverted_tensors_are_returned_by_reference():
    tensors = projections()
    converted = amc.convert_state_dict(tensors, rules=[*merging(), WeightRenaming("norm", "renamed")])
    assert converted["renamed"] is tensors["norm"]
    memory = {t.untyped_storage().data_ptr() for t in tensors.values()}
    assert converted["layers.0.experts.down_proj"].untyped_storage().data_ptr() not in memory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["contiguous", "backwards"])
def test_only_the_callers_buffers_are_written_completely(layout, order):
    start = grouped()
    expected = amc.convert_state_dict(start, layout=layout)
    buffers = {}
    for name, tensor in expected.items():
        strides = None
        if order == "backwards":  # the first dimension is contiguous
            strides = [1]
            for size in tensor.shape[:-1]:
                strides.append(strides[-1] * size)
        buffers[name] = guarded(tensor.shape, tensor.dtype, strides=strides)
    out = {name: buffer.tensor for name, buffer in buffers.items()}
    converted = amc.convert_state_dict(start, layout=layout, out=out)
    assert all(converted[name] is out[name] for name in out)
    for buffer in buffers.values():
        buffer.check()
        assert_written(buffer.tensor)
    assert_same(converted, expected)
    assert_same(start, grouped())


def test_every_target_needs_a_buffer_that_fits():
    start = grouped()
    out = {name: torch.empty_like(t) for name, t in amc.convert_state_dict(start, layout="nemo").items()}
    less = {name: t for name, t in out.items() if not name.endswith("down_projs")}
    with pytest.raises(ConversionError, match=r"no buffer for .*down_projs"):
        amc.convert_state_dict(start, layout="nemo", out=less)
    wrong = out | {f"{PATH}.down_projs": torch.empty(E, H, I, dtype=torch.bfloat16)}
    with pytest.raises(ConversionError, match=r"down_projs does not fit"):
        amc.convert_state_dict(start, layout="nemo", out=wrong)
    wrong = out | {f"{PATH}.down_projs": torch.empty(E, I, H)}
    with pytest.raises(ConversionError, match=r"down_projs does not fit"):
        amc.convert_state_dict(start, layout="nemo", out=wrong)


def test_result_of_an_earlier_call_is_filled_by_the_next():
    trainer = grouped() | {"norm": torch.ones(4)}
    engine = amc.convert_state_dict(trainer, layout="nemo", source_layout="transformers")
    assert engine["norm"] is trainer["norm"]
    addresses = [tensor.data_ptr() for tensor in engine.values()]
    for tensor in trainer.values():
        tensor.mul_(0.5)
    again = amc.convert_state_dict(trainer, layout="nemo", source_layout="transformers", out=engine)
    assert [tensor.data_ptr() for tensor in again.values()] == addresses
    assert_same(again, amc.convert_state_dict(trainer, layout="nemo", source_layout="transformers"))


def test_a_buffer_in_the_memory_of_a_source_is_refused_before_anything_is_written():
    start = grouped()
    out = {name: torch.empty_like(t) for name, t in amc.convert_state_dict(start, layout="nemo").items()}
    out[f"{PATH}.down_projs"] = start[f"{PATH}.down_proj"].view(E, I, H)
    with pytest.raises(ConversionError, match="overlaps the memory of the source"):
        amc.convert_state_dict(start, layout="nemo", out=out)
    assert_same(start, grouped())


@pytest.mark.parametrize("front_door", [amc.convert_state_dict, amc.revert_state_dict])
def test_state_dict_without_rules_or_model_is_refused(front_door):
    with pytest.raises(UnsupportedError, match="pass model=, rules= or a layout"):
        front_door(grouped())


def test_value_that_is_not_a_tensor_is_named():
    with pytest.raises(UnsupportedError, match=r"a\._extra_state is not a tensor"):
        amc.convert_state_dict({"a._extra_state": None}, rules=[])


@pytest.mark.parametrize("front_door", [amc.convert_state_dict, amc.revert_state_dict])
def test_backends_are_never_replaced_silently(front_door):
    with (
        mock.patch("automodel_conv.execution.copy_batch.why_not", return_value="the interpreter is off"),
        pytest.raises(UnsupportedError, match="the interpreter is off"),
    ):
        front_door(grouped(), layout="nemo", backend="triton")
    with pytest.raises(UnsupportedError, match="unknown backend 'cuda'"):
        front_door(grouped(), layout="transformers", backend="cuda")
    assert_same(front_door(grouped(), layout="transformers", backend="torch"), grouped())


def test_empty_state_dict_converts_to_an_empty_one():
    assert amc.convert_state_dict({}, layout="nemo") == {}
    assert amc.revert_state_dict({}, layout="nemo") == {}


def test_printed_report_counts_and_names_what_is_left_out():
    tensors = {f"layers.0.mlp.experts.{name}": torch.ones(2, 4, 4) for name in ("gate_up_proj", "down_proj")}
    converted = amc.convert_state_dict(tensors, rules=[], source_layout="transformers", layout="nemo")
    assert str(converted.report) == "left out  0"
    assert "a\n    b" in str(type(converted.report)(("a", "b")))
