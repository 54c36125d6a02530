"""Tests of plans that keep codes: scales go where their codes go."""

import copy
from functools import partial

import pytest
import torch

from automodel_conv.compiling.decoded import decoded_table, quantization_of
from automodel_conv.compiling.keeping import keeping_plan, keeps_parts, kept_plan
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.errors import QuantizationError, UnsupportedError
from automodel_conv.planning.copies import SourceTable
from tests.compiling.support import write
from tests.compiling.test_decoded import FP8, INT4, fp8_tensors, int4_tensors

ASYMMETRIC = copy.deepcopy(INT4)
ASYMMETRIC["quantization_config"]["config_groups"]["0"]["weights"]["symmetric"] = False
RENAMES = {"key_mapping": {"^a": "b"}}


@pytest.fixture
def renaming():
    pytest.importorskip("transformers", reason="key_mapping needs transformers")
    return partial(loading_plan, rules=[], **RENAMES)


def described(plan):
    return {target.name: (target.dtype, target.shape) for target in plan.targets}


def test_kept_plan_has_codes_and_scales_in_place_of_values(tmp_path, renaming):
    checkpoint = write(tmp_path, fp8_tensors(), config=FP8)
    table = SourceTable.from_checkpoint(checkpoint)
    decoded = decoded_table(checkpoint, needs_values=True)
    config = quantization_of(checkpoint)
    values, _ = renaming(decoded)
    plan = kept_plan(config, table, decoded, values, lambda scales: renaming(scales)[0])
    assert described(plan) == {"b.weight": ("F8_E4M3", (4, 6)), "b.weight_scale_inv": ("F32", (2, 3))}


def test_names_alone_change_without_a_config(tmp_path, renaming):
    checkpoint = write(tmp_path, int4_tensors(16))
    plan, _ = keeping_plan(checkpoint, "a.weight_packed", None, renaming, renames=True)
    assert set(described(plan)) == {"b.weight_packed", "b.weight_scale", "b.weight_shape"}


def test_scales_that_do_not_follow_by_name_are_planned(tmp_path):
    pytest.importorskip("transformers", reason="key_mapping needs transformers")
    plan_of = partial(loading_plan, rules=[], key_mapping={"a.weight$": "b.weight"})
    checkpoint = write(tmp_path, fp8_tensors(), config=FP8)
    plan, _ = keeping_plan(checkpoint, "a.weight", torch.bfloat16, plan_of, renames=True)
    assert described(plan) == {"b.weight": ("F8_E4M3", (4, 6)), "b.weight_scale_inv": ("F32", (2, 3))}


def test_packed_codes_that_stay_are_as_stored(tmp_path):
    checkpoint = write(tmp_path, int4_tensors(16), config=INT4)
    stored = SourceTable.from_checkpoint(checkpoint)
    plan, _ = keeping_plan(checkpoint, "a.weight_packed", None, partial(loading_plan, rules=[]), renames=False)
    kinds = zip(stored.dtypes, stored.shapes, strict=True)
    assert described(plan) == dict(zip(stored.names, kinds, strict=True))


def test_codes_that_rules_could_move_need_a_config(tmp_path):
    checkpoint = write(tmp_path, int4_tensors(16))
    with pytest.raises(QuantizationError, match=r"a\.weight_packed has the form of quantized codes, but no config"):
        keeping_plan(checkpoint, "a.weight_packed", None, partial(loading_plan, rules=[]), renames=False)


@pytest.mark.parametrize(
    ("moved", "config", "kept"),
    [
        ("packed|scale|zero_point", ASYMMETRIC, True),
        ("packed|scale", ASYMMETRIC, False),
        ("packed|zero_point", {}, False),
        ("packed|scale", {}, True),
        ("packed|scale", {"quantization_config": {"quant_method": "unknown"}}, True),
    ],
)
def test_parts_are_kept_if_the_config_still_describes_them(tmp_path, moved, config, kept):
    pytest.importorskip("transformers", reason="key_mapping needs transformers")
    tensors = int4_tensors(16) | {"a.weight_zero_point": torch.zeros(1, 1, dtype=torch.int32)}
    checkpoint = write(tmp_path, tensors, config=config)
    renames = {f"^a.weight_({moved})$": r"b.weight_\1"}
    plan, _ = loading_plan(SourceTable.from_checkpoint(checkpoint), rules=[], key_mapping=renames)
    assert keeps_parts(checkpoint, plan) == kept


def test_packed_codes_that_move_are_refused(tmp_path):
    pytest.importorskip("transformers", reason="key_mapping needs transformers")
    plan_of = partial(loading_plan, rules=[], key_mapping={"weight$": "moved", "weight_packed$": "moved"})
    checkpoint = write(tmp_path, int4_tensors(16), config=INT4)
    with pytest.raises(UnsupportedError, match=r"a\.moved: codes and scales cannot be kept in this layout"):
        keeping_plan(checkpoint, "a.weight_packed", None, plan_of, renames=True)
