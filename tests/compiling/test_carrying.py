"""Tests of tensors that a conversion carries over unchanged, and of tensors that it drops."""

import pytest
from torch import nn

from automodel_conv.compiling.carrying import carried_targets, dropped_rows, refuse_halves, unclaimed_rows
from automodel_conv.errors import NameProblems, UnsupportedError
from automodel_conv.files.shards import LAYOUT_KEY
from automodel_conv.planning.copies import Decode, SourceTable, Target
from automodel_conv.planning.wanted import TargetSpec
from tests.compiling.support import table, tensors_of, write
from tests.planning import oracles

NAMES = ["norm", "mtp.0.w", "mtp.10.w", "layers.61.w"]


@pytest.mark.parametrize(
    ("patterns", "rows"),
    [
        ("mtp.*", {1, 2}),
        ("mtp.?.w", {1}),
        ("*.w", {1, 2, 3}),
        ("*.[0-9].w", {1}),
        (["norm", "layers.61.*"], {0, 3}),
        ((), set()),
    ],
    ids=str,
)
def test_patterns_drop_the_names_that_they_match(patterns, rows):
    assert dropped_rows(NAMES, patterns) == rows


@pytest.mark.parametrize("patterns", ["mtp", ["norm", "MTP.*"]])
def test_pattern_that_matches_no_name_is_quoted(patterns):
    with pytest.raises(UnsupportedError, match=r"found: +'(mtp|MTP\.\*)'; names of the checkpoint:\n +norm\n"):
        dropped_rows(NAMES, patterns)


def test_codes_and_scales_are_dropped_together_or_not_at_all():
    names = ["w", "w_scale", "v", "v_scale"]
    decodes = {0: Decode("e4m3", (4, 4), (4, 4), 1), 2: Decode("e4m3", (4, 4), (4, 4), 3)}
    refuse_halves(names, decodes, [])
    refuse_halves(names, decodes, [2, 3])
    with pytest.raises(UnsupportedError, match=r"2 tensors cannot be used without(.|\n)*v_scale(.|\n)*\bw\n"):
        refuse_halves(names, decodes, [1, 2])


@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (0, 3), ()])
def test_carried_tensors_are_whole_and_keep_their_names_and_dtypes(shape):
    sources = SourceTable(["a", "b", "c"], ["F32", "BF16", "I64"], [(5,), shape, shape])
    carried = carried_targets(sources, [2, 1], None, [])
    assert [(t.name, t.dtype, t.shape, t.sources) for t in carried] == [
        ("b", "BF16", shape, (1,)),
        ("c", "I64", shape, (2,)),
    ]
    for target in carried:
        written = oracles.written(piece for copy in target.copies for piece in copy.pieces())
        assert all(source == (0, element) for element, source in written.items())


def test_only_decoded_tensors_are_cast():
    decode = Decode("e4m3", (4, 4), (4, 4), 2)
    sources = SourceTable(["a", "w", "s"], ["F32", "BF16", "F32"], [(2,), (4, 4), (1, 1)], {1: decode}, frozenset({2}))
    carried = carried_targets(sources, [0, 1], "F16", [])
    assert [(target.name, target.dtype) for target in carried] == [("a", "F32"), ("w", "F16")]


def test_name_given_to_two_tensors_is_refused():
    other = Target("b", "F32", (2,), -1, (0,), ())
    with pytest.raises(NameProblems, match=r"1 tensors(.|\n)*\bb\b(.|\n)*drop=") as caught:
        carried_targets(table({"a": (2,), "b": (2,)}), [1], None, [other])
    assert caught.value.duplicated == (("b", ("b",)),)


def test_tensors_without_a_place_in_the_model_are_unclaimed(tmp_path):
    checkpoint = write(tmp_path, tensors_of({"weight": (2, 3), "mtp.w": (4,), "bias": (2,)}))
    rows = unclaimed_rows(checkpoint, SourceTable.from_checkpoint(checkpoint), nn.Linear(3, 2), None, None, {})[1]
    assert [checkpoint.names[row] for row in rows] == ["mtp.w"]


def test_experts_in_another_form_are_not_unclaimed(tmp_path):
    old = {f"layers.0.mlp.experts.{e}.w2.weight": (4, 3) for e in range(2)}
    checkpoint = write(tmp_path, tensors_of(old))
    has = {"layers.0.mlp.experts.down_proj": TargetSpec("F32", (2, 4, 3))}
    with pytest.raises(UnsupportedError, match=r"other experts(.|\n)*down_proj(.|\n)*experts\.0\.w2\.weight"):
        unclaimed_rows(checkpoint, SourceTable.from_checkpoint(checkpoint), None, [], None, has)


def test_grouped_experts_are_compared_in_the_layout_of_the_state_dict(tmp_path):
    nemo = {"m.experts.gate_and_up_projs": (2, 4, 6), "m.experts.down_projs": (2, 3, 4), "mtp.w": (3,)}
    checkpoint = write(tmp_path, tensors_of(nemo), metadata={LAYOUT_KEY: "nemo"})
    own = SourceTable.from_checkpoint(checkpoint)
    kept = {name: TargetSpec("F32", shape) for name, shape in nemo.items() if name != "mtp.w"}
    shapes = {"m.experts.gate_up_proj": (2, 6, 4), "m.experts.down_proj": (2, 4, 3)}
    other = {name: TargetSpec("F32", shape) for name, shape in shapes.items()}
    for layout, has in ((None, kept), ("transformers", other)):
        rows = unclaimed_rows(checkpoint, own, None, [], layout, has)[1]
        assert [checkpoint.names[row] for row in rows] == ["mtp.w"]
