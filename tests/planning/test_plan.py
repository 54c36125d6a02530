"""Tests of plans: their reports, and what they prove, by execution one element at a time."""

import re
from dataclasses import replace
from html import escape

import pytest

from automodel_conv.errors import CoverageError, UnknownTarget
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.plan_picture import plan_page
from automodel_conv.planning.regions import box
from tests.planning.oracles import addressed, execute
from tests.planning.plans import CHUNK, experts_plan, padded_plan, plan_of, table, targets_of, transposing_plan


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


def test_the_page_of_a_plan_has_a_title_and_replaces_a_file(tmp_path):
    file = tmp_path / "plan.html"
    file.write_text("something longer than the page" * 10_000)
    experts_plan().to_html(file, title="experts & norm")
    assert "<title>experts &amp; norm</title>" in file.read_text(encoding="utf-8")
    experts_plan().to_html(str(file))
    assert file.read_text(encoding="utf-8") == plan_page(experts_plan(), (), "2 tensors", {})


def test_the_page_of_a_plan_shows_ranks(tmp_path):
    file = tmp_path / "plan.html"
    ranks = {"rank 0": {"norm": box((4,), (0,), (2,))}, "rank 1": {"norm": box((4,), (2,), (2,))}}
    experts_plan().to_html(file, ranks=ranks)
    assert file.read_text(encoding="utf-8") == plan_page(experts_plan(), (), "2 tensors", ranks)


def test_no_page_is_written_if_it_cannot_show_the_ranks(tmp_path):
    file = tmp_path / "plan.html"
    with pytest.raises(CoverageError, match="rank 0"):
        experts_plan().to_html(file, ranks={"rank 0": {"norm": box((5,), (0,), (2,))}})
    assert not file.exists()
    with pytest.raises(OSError, match="missing"):
        experts_plan().to_html(tmp_path / "missing" / "plan.html")


def test_a_notebook_shows_the_summary_and_the_page():
    plan = experts_plan()
    html = plan._repr_html_()
    assert html.startswith(f'<pre style="font-family: monospace">{escape(plan.summary())}</pre><iframe ')
    assert escape(plan_page(plan, (), "2 tensors, 104 bytes", {})) in html


def test_a_notebook_shows_only_the_summary_of_a_large_plan():
    target = experts_plan().target("norm")._replace(sources=(0,))
    targets = tuple(target._replace(name=f"norm {number}") for number in range(50_000))
    html = CopyPlan(table(norm=(4,)), targets)._repr_html_()
    assert "<iframe" not in html
    assert "plan.to_html(file)" in html
    assert len(html) < 2000
