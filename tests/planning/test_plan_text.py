"""Tests of the texts of plans: the summary, and the explanation of one target."""

from dataclasses import replace

from tests.planning.plans import experts_plan, transposing_plan

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


def test_rules_of_a_summary_are_below_their_rows_in_few_columns():
    sources = " + ".join(f"mlp.experts.*.{part}_proj.weight" for part in ("gate", "up"))
    rule = f"{sources} -> mlp.experts.gate_up_proj: MergeModulelist(dim=0), Concatenate(dim=1)"
    plan = replace(experts_plan(), rules=(rule, *experts_plan().rules[1:]))
    beside, below = plan.summary(80).splitlines(), plan.summary(40).splitlines()
    assert beside[1] == "       1        4  96 bytes  read           mlp.experts.*.gate_proj.weight"
    assert below[1:7] == [
        "       1        4  96 bytes  read",
        "    mlp.experts.*.gate_proj.weight",
        "      + mlp.experts.*.up_proj.weight",
        "      -> mlp.experts.gate_up_proj:",
        "         MergeModulelist(dim=0),",
        "         Concatenate(dim=1)",
    ]
    assert below[-3].split() == ["2", "5", "104", "bytes"]
    assert below[-2:] == ["    reads 104 bytes, 0 targets by", "    transformers' own code"]
    for width, lines in ((80, beside), (40, below)):
        assert max(map(len, lines[1:])) <= width


def test_explain_names_every_source_and_its_region():
    assert experts_plan().explain("gate_up") == EXPLANATION
    assert transposing_plan().explain("w13") == EXPLAINED_SWAP
