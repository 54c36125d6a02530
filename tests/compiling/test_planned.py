"""Tests of plans of loads, compiled from headers only."""

import pytest
import torch
from torch import nn

from automodel_conv.compiling.options import PlanSettings
from automodel_conv.compiling.planned import compile_plan, load_plan
from automodel_conv.errors import NameProblems, QuantizationError, UnsupportedError
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.shards import LAYOUT_KEY
from tests.compiling.support import Model, StatedExperts, tensors_of, write
from tests.planning.oracles import addressed, execute

LINEAR = {"weight": (2, 3), "bias": (2,)}
NEMO = {"norm.weight": (1, 2), "experts.gate_and_up_projs": (2, 4, 6), "experts.down_projs": (2, 3, 4)}


def fp8(directory):
    tensors = {"weight": torch.ones(2, 3).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 3]}}
    return write(directory, tensors, config=config)


def test_plan_needs_no_data(tmp_path):
    checkpoint = write(tmp_path, tensors_of(LINEAR))
    data = sum(checkpoint.nbytes)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-data, 2)
        file.write(b"\xff" * data)
    plan = compile_plan(tmp_path / "model.safetensors", nn.Linear(3, 2, device="meta"))
    assert [target.name for target in plan.targets] == ["weight", "bias"]
    assert (plan.bytes_read, plan.bytes_written) == (data, data)


def test_opened_checkpoint_and_its_path_have_one_plan(tmp_path):
    checkpoint = write(tmp_path, tensors_of(LINEAR))
    assert compile_plan(checkpoint, nn.Linear(3, 2)) == compile_plan(checkpoint.path, nn.Linear(3, 2))


def test_all_names_that_do_not_fit_are_listed(tmp_path):
    checkpoint = write(tmp_path, tensors_of({"weight": (3, 2), "gain": (2,)}))
    with pytest.raises(NameProblems) as caught:
        compile_plan(checkpoint, nn.Linear(3, 2))
    assert caught.value.missing == ("bias",)
    assert caught.value.unexpected == ("gain",)
    assert caught.value.mismatched == (("weight", (3, 2), (2, 3)),)


def test_layout_in_the_metadata_is_followed_and_recorded(tmp_path):
    write(tmp_path, tensors_of(NEMO), metadata={LAYOUT_KEY: "nemo"})
    plan = compile_plan(tmp_path, Model(StatedExperts(2, 3, 4)))
    assert (plan.source_layout, plan.layout) == ("nemo", None)
    results = execute(plan, addressed(plan.sources))
    assert results["experts.down_proj"] == [
        ("experts.down_projs", (e * 3 + i) * 4 + h) for e in range(2) for h in range(4) for i in range(3)
    ]


def test_without_rules_and_model_experts_keep_the_layout_of_the_files(tmp_path):
    plan = compile_plan(write(tmp_path, tensors_of(NEMO), metadata={LAYOUT_KEY: "nemo"}), rules=[])
    assert (plan.source_layout, plan.layout) == ("nemo", "nemo")
    assert all(target.is_whole for target in plan.targets)


def test_codes_are_decoded_unless_the_caller_keeps_them(tmp_path):
    checkpoint = fp8(tmp_path)
    plan, problems, model = load_plan(checkpoint, None, PlanSettings(rules=[]))
    assert [(target.name, target.dtype) for target in plan.targets] == [("weight", "BF16")]
    assert model is None
    assert problems.reasons() == []
    plan, _, _ = load_plan(checkpoint, None, PlanSettings(rules=[], dequantize=False))
    assert {target.name: target.dtype for target in plan.targets} == {"weight": "F8_E4M3", "weight_scale_inv": "F32"}


def test_codes_without_a_config_do_not_fill_a_model(tmp_path):
    fp8(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(QuantizationError, match="weight has the form of quantized codes"):
        compile_plan(open_checkpoint(tmp_path), nn.Linear(3, 2, bias=False))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layout": "numo"}, "unknown layout 'numo'"),
        ({"source_layout": "numo"}, "unknown layout 'numo'"),
        ({"layout": "per_expert"}, "unknown layout 'per_expert'"),
        ({"dtype": torch.int8}, "not a floating dtype"),
    ],
    ids=str,
)
def test_options_are_checked_before_names_are(tmp_path, options, text):
    with pytest.raises(UnsupportedError, match=text):
        compile_plan(write(tmp_path, tensors_of({"a": (1,)})), nn.Linear(3, 2), **options)
