"""Tests of grouped experts: refused if no name and no shape determines their layout, accepted otherwise."""

import pytest

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.layouts import LAYOUTS
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.problems import Problems
from automodel_conv.planning.rule_outputs import RuleOutputs
from automodel_conv.planning.unmarked import (
    layout_advice,
    refuse_contradictions,
    refuse_grouped,
    refuse_other_layouts,
    refuse_unknown_layout,
)
from automodel_conv.upstream.rules import RuleSet

GATE_UP, DOWN = "m.experts.gate_up_proj", "m.experts.down_proj"
GROUPING = [
    WeightConverter(
        ["experts.*.w1.weight", "experts.*.w3.weight"],
        "experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter("experts.*.w2.weight", "experts.down_proj", operations=[MergeModulelist(dim=0)]),
]
NO_RULES = RuleSet([])


def table(shapes):
    return SourceTable(list(shapes), ["BF16"] * len(shapes), list(shapes.values()))


def unchanged(**shapes):
    """Return a plan that keeps grouped experts of these shapes unchanged."""
    sources = table({f"m.experts.{name}": shape for name, shape in shapes.items()})
    outputs = RuleOutputs(sources, NO_RULES, {}, {})
    numel = [shape[0] * shape[1] * shape[2] for shape in sources.shapes]
    columns = zip(sources.names, sources.shapes, numel, strict=True)
    targets = [Target(n, "BF16", s, -1, (row,), outputs.whole(size)) for row, (n, s, size) in enumerate(columns)]
    return CopyPlan(sources, tuple(targets))


def refuse_unknown(plan, gated=True, layout="transformers"):
    refuse_unknown_layout(plan, lambda path: LAYOUTS[layout], lambda path: gated)


def test_experts_that_have_the_transposed_shape_of_the_model_are_refused():
    problems = Problems(mismatched=[(GATE_UP, (2, 4, 6), (2, 6, 4))])
    with_the_name = r'(?s)m\.experts\.gate_up_proj.*pass source_layout=: one of "transformers", "gpt_oss"\n'
    with pytest.raises(UnsupportedError, match=with_the_name) as caught:
        refuse_other_layouts(problems, unchanged(gate_up_proj=(2, 4, 6)), NO_RULES, model_states_layout=True)
    assert "if the model has its experts" not in str(caught.value)
    with pytest.raises(UnsupportedError, match='layout="gpt_oss" if the model has its experts'):
        refuse_other_layouts(problems, unchanged(gate_up_proj=(2, 4, 6)), NO_RULES, model_states_layout=False)


def test_advice_names_only_layouts_that_have_the_names():
    assert layout_advice("layout", ["m.experts.down_projs"]).endswith('pass {layout="nemo"}')
    assert '{layout=}: one of "vllm", "vllm_w31", ' in layout_advice("layout", ["m.experts.w2_weight"])
    assert '"nemo"' not in layout_advice("layout", ["m.experts.w2_weight"])
    assert layout_advice("layout", [GATE_UP, DOWN]).endswith('pass {layout=}: one of "transformers", "gpt_oss"')
    assert all(f'"{name}"' in layout_advice("layout", ["m.experts.w2_weight", DOWN]) for name in LAYOUTS)


@pytest.mark.parametrize("found", [(2, 6, 5), (3, 6, 4), (6, 4)])
def test_another_shape_than_the_transposed_one_is_left_to_the_list_of_problems(found):
    problems = Problems(mismatched=[(GATE_UP, found, (2, 6, 4))])
    refuse_other_layouts(problems, unchanged(gate_up_proj=(2, 6, 4)), NO_RULES, model_states_layout=True)


def test_names_of_another_layout_are_refused_if_the_model_lacks_experts():
    problems = Problems(unexpected=["m.experts.gate_and_up_projs"], missing=[GATE_UP])
    only_one = r'(?s)gate_and_up_projs.*the names are those of the layout "nemo": pass source_layout="nemo"\n'
    with pytest.raises(UnsupportedError, match=only_one):
        refuse_other_layouts(problems, unchanged(), NO_RULES, model_states_layout=True)
    problems.missing = ["m.norm"]
    refuse_other_layouts(problems, unchanged(), NO_RULES, model_states_layout=True)


def test_names_of_several_layouts_are_refused_with_all_of_them():
    problems = Problems(unexpected=["m.experts.w2_weight"], missing=[GATE_UP])
    several = r'(?s)w2_weight.*pass source_layout=: one of "vllm", "vllm_w31", "vllm_trtllm"'
    with pytest.raises(UnsupportedError, match=several):
        refuse_other_layouts(problems, unchanged(), NO_RULES, model_states_layout=True)


def test_undecided_square_matrix_is_refused_only_if_rules_group_such_experts():
    square = unchanged(down_proj=(2, 4, 4))
    with pytest.raises(UnsupportedError, match=r"(?s)m\.experts\.down_proj.*not square.*\[2, 4, 4\]"):
        refuse_other_layouts(Problems(), square, RuleSet(GROUPING), model_states_layout=True)
    refuse_other_layouts(Problems(), square, NO_RULES, model_states_layout=True)
    both = unchanged(gate_up_proj=(2, 6, 4), down_proj=(2, 4, 3))
    refuse_other_layouts(Problems(), both, RuleSet(GROUPING), model_states_layout=True)


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [((2, 6, 4), (2, 4, 3)), ((2, 4, 4), (2, 4, 2)), ((2, 8, 4), (2, 4, 4)), ((1, 2, 1), (1, 1, 1))],
)
def test_two_weights_determine_the_layout_together(gate_up, down):
    refuse_unknown(unchanged(gate_up_proj=gate_up, down_proj=down))


@pytest.mark.parametrize(
    "shapes",
    [
        {"gate_up_proj": (2, 4, 6), "down_proj": (2, 3, 4)},  # gpt_oss
        {"gate_up_proj": (2, 4, 4), "down_proj": (2, 4, 4)},
        {"gate_up_proj": (2, 4, 6)},
        {"gate_up_proj": (2, 4, 4)},
        {"down_proj": (2, 4, 3)},
    ],
    ids=str,
)
def test_weights_that_do_not_determine_the_layout_are_refused(shapes):
    with pytest.raises(UnsupportedError, match=r"(?s)m\.experts\..*source_layout="):
        refuse_unknown(unchanged(**shapes))


def test_weight_of_a_rule_determines_the_layout_of_the_other():
    """As the rules of Step-3.7, which concatenate gate and up, and only rename down."""

    def produced(gate_up, down):
        plan = unchanged(gate_up_proj=gate_up, down_proj=down)
        return CopyPlan(plan.sources, (plan.targets[0]._replace(rule=0), plan.targets[1]))

    refuse_unknown(produced((2, 6, 4), (2, 4, 3)))
    with pytest.raises(UnsupportedError, match=r"(?s)m\.experts\.down_proj.*\[2, 3, 4\]"):
        refuse_unknown(produced((2, 6, 4), (2, 3, 4)))


def test_odd_size_cannot_hold_gate_and_up():
    refuse_unknown(unchanged(gate_up_proj=(2, 6, 5)))
    with pytest.raises(UnsupportedError, match=r"\[2, 5, 6\]"):
        refuse_unknown(unchanged(gate_up_proj=(2, 5, 6)))


def test_experts_without_a_gate_are_refused():
    with pytest.raises(UnsupportedError, match="up_proj"):
        refuse_unknown(unchanged(up_proj=(2, 3, 4), down_proj=(2, 4, 3)), gated=False)


def test_experts_that_contradict_their_model_are_refused():
    given = table({GATE_UP: (2, 4, 6), DOWN: (2, 3, 4)})
    with pytest.raises(UnsupportedError, match=r"(?s)gate_up_proj.*\[2, 6, 4\], as the model has it.*\blayout="):
        refuse_contradictions(given, {GATE_UP: (2, 6, 4), DOWN: (2, 4, 3)}, NO_RULES)
    refuse_contradictions(given, dict(zip(given.names, given.shapes, strict=True)), NO_RULES)


def test_experts_that_reversed_rules_would_split_wrongly_are_refused():
    reverse = RuleSet(GROUPING, reverse=True)
    with pytest.raises(UnsupportedError, match=r"(?s)gate_up_proj.*\[2, 4, 6\]"):
        refuse_contradictions(table({GATE_UP: (2, 4, 6), DOWN: (2, 3, 4)}), {}, reverse)
    with pytest.raises(UnsupportedError, match=r"(?s)w13_weight.*names .*that the rules"):
        refuse_contradictions(table({"m.experts.w13_weight": (2, 6, 4)}), {}, reverse)
    refuse_contradictions(table({GATE_UP: (2, 6, 4), DOWN: (2, 4, 3)}), {}, reverse)


def test_grouped_experts_without_a_reversed_rule_are_refused():
    rule = WeightConverter("^m.experts.*.w2.weight", "^m.experts.down_proj", operations=[MergeModulelist(dim=0)])
    reverse = RuleSet([rule], reverse=True)
    with pytest.raises(UnsupportedError, match=r"no rule (.|\n)*m\.experts\.down_proj"):
        refuse_grouped(unchanged(down_proj=(2, 4, 3)), reverse)
    refuse_grouped(unchanged(gate_up_proj=(2, 6, 4)), reverse)
