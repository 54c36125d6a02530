"""Tests of plans: their reports, and what they prove, by execution one element at a time."""

import re
from dataclasses import replace

import pytest

from automodel_conv.errors import UnknownTarget
from automodel_conv.planning.plan import CopyPlan
from tests.planning.oracles import addressed, execute
from tests.planning.plans import CHUNK, experts_plan, padded_plan, plan_of, table, targets_of, transposing_plan

SUMMARY = """\
 targets  sources      size  execution      rule
       1        4  96 bytes  read           e.*.gate + e.*.up -> gate_up: merge, join
       1        1   8 bytes  read           (name only)
       2        5 104 bytes  reads 104 bytes, 0 targets by transformers' own code"""

EXPLANATION = """\
gate_up  BF16 [2, 6, 4]  96 bytes  (read)
  rule: e.*.gate + e.*.up -> gate_up: merge, join
  e.0.gate BF16 [3, 4][0 + 12x1] -> [0 + 12x1]
  e.0.up BF16 [3, 4][0 + 12x1] -> [12 + 12x1]
  e.1.gate BF16 [3, 4][0 + 12x1] -> [24 + 12x1]
  e.1.up BF16 [3, 4][0 + 12x1] -> [36 + 12x1]"""

EXPLAINED_SWAP = """\
w13  BF16 [2, 4, 6]  96 bytes  (strided)
  rule: gate_up -> w13: alternate, swap
  gate_up BF16 [2, 6, 4][0 + 2x24 4x1 3x4 2x12] -> [0 + 2x24 4x6 3x2 2x1]"""


def test_summary_matches_the_expected_text():
    assert experts_plan().summary() == SUMMARY


def test_long_rules_of_summary_and_explain_have_several_lines():
    sources = " + ".join(f"layers.*.mlp.experts.*.{part}_proj.weight" for part in ("gate", "up"))
    rule = f"{sources} -> layers.*.mlp.experts.gate_up_proj: MergeModulelist(dim=0), Concatenate(dim=1)"
    plan = replace(experts_plan(), rules=(rule, *experts_plan().rules[1:]))
    assert plan.summary().splitlines()[1:5] == [
        "       1        4  96 bytes  read           layers.*.mlp.experts.*.gate_proj.weight",
        "                                              + layers.*.mlp.experts.*.up_proj.weight",
        "                                              -> layers.*.mlp.experts.gate_up_proj:",
        "                                                 MergeModulelist(dim=0), Concatenate(dim=1)",
    ]
    assert plan.explain("gate_up").splitlines()[1:3] == [
        "  rule: layers.*.mlp.experts.*.gate_proj.weight",
        "          + layers.*.mlp.experts.*.up_proj.weight",
    ]


def test_explain_names_every_source_and_its_region():
    assert experts_plan().explain("gate_up") == EXPLANATION
    assert transposing_plan().explain("w13") == EXPLAINED_SWAP


def test_explain_of_an_unknown_target_suggests_names():
    plan = plan_of(table(a=(2,)), targets_of(table(a=(2,)), [["a"]], [], ["layers.0.w"]))
    with pytest.raises(KeyError, match=r"layers\.0\.w"):
        plan.explain("layers.9.w")


def test_names_suggested_for_an_unknown_target_begin_or_end_alike():
    names = [f"layers.{layer}.{part}.weight" for layer in range(9) for part in ("mlp.experts", "attn", "norm")]
    plan = experts_plan()
    plan = replace(plan, targets=tuple(plan.target("norm")._replace(name=name) for name in names))
    with pytest.raises(UnknownTarget) as caught:
        plan.target("layers.7.mlp.experts.0.weight")
    suggested = str(caught.value).partition("similar names\n")[2].splitlines()
    assert suggested[0].strip() == "layers.7.mlp.experts.weight"
    assert len([line for line in suggested if line.startswith("    ")]) == 5


def test_ways_of_execution_are_distinguished():
    assert experts_plan().execution_of(experts_plan().target("gate_up")) == "read"
    cast = experts_plan("F32")
    assert cast.execution_of(cast.target("gate_up")) == "cast"
    swap = transposing_plan()
    assert swap.execution_of(swap.target("w13")) == "strided"
    both = swap.target("w13")._replace(dtype="F32")
    assert swap.execution_of(both) == "strided, cast"


def test_bytes_are_counted_once_and_in_their_own_dtype():
    plan = experts_plan("F32")
    assert plan.bytes_read == 4 * 3 * 4 * 2 + 4 * 2
    assert plan.bytes_written == 2 * 6 * 4 * 4 + 4 * 2
    sources = table(qkv=(6, 2), unused=(100,))
    split = plan_of(sources, targets_of(sources, [["qkv"]], [CHUNK], ["q", "k", "v"]))
    assert split.bytes_read == split.bytes_written == 24
    assert split.used_sources == {0}


def test_replaced_targets_leave_the_first_plan_unchanged():
    plan = experts_plan()
    fewer = replace(plan, targets=plan.targets[1:])
    assert plan.target("gate_up").name == "gate_up"
    assert plan.target("norm").name == fewer.target("norm").name == "norm"
    with pytest.raises(KeyError):
        fewer.target("gate_up")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (3, 0)])
def test_small_tensors_pass_through_everything(shape):
    sources = table(a=shape)
    plan = plan_of(sources, targets_of(sources, [["a"]], [], ["b"]))
    expected = {"b": addressed(sources)["a"]}
    assert execute(plan, addressed(sources)) == expected
    back = plan.inverse()
    assert [(t.name, t.shape) for t in back.targets] == [("a", shape)]
    assert execute(plan.then(back), addressed(sources)) == addressed(sources)
    assert CopyPlan.from_json(plan.to_json()) == plan


def test_a_plan_is_short_in_a_terminal():
    plan = experts_plan()
    assert repr(plan) == str(plan)
    assert re.fullmatch(r"<CopyPlan: \d+ targets from \d+ sources, \d+ bytes; .*>", repr(plan))
    assert str(plan.bytes_written) in repr(plan)


def test_rows_of_zeros_are_shown():
    plan = padded_plan(2, 5)
    assert plan.execution_of(plan.targets[0]) == "zeros"
    assert plan.bytes_read == 16
    assert plan.explain("padded").splitlines()[2:] == [
        "  head BF16 [2, 4][0 + 8x1] -> [0 + 8x1]",
        "  constant 0 -> [8 + 12x1]",
    ]
