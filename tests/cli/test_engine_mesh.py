"""Tests of the division of an engine's tensors: each element is on the ranks on which vLLM has it."""

import itertools

import pytest
import torch

from automodel_conv.cli.engine_mesh import Division, EngineMesh, division_of, parse_engine_mesh, region_on
from automodel_conv.errors import UnsupportedError

EXPERTS = "model.layers.0.mlp.experts.w13_weight"
SHARED = "model.layers.0.mlp.shared_experts.down_proj.weight"


def test_ep_is_tp_times_dp():
    assert parse_engine_mesh("tp=8,ep=32") == EngineMesh(tp=8, dp=4, has_ep=True, replicate=1)
    assert parse_engine_mesh("tp=8,ep=32").ranks == 32
    assert parse_engine_mesh(" ep = 16 ") == EngineMesh(1, 16, True, 1)
    assert parse_engine_mesh("tp=2,dp=3,replicate=4") == EngineMesh(2, 3, False, 4)
    assert parse_engine_mesh("tp=2,dp=3,replicate=4").ranks == 24
    assert parse_engine_mesh("tp=2,dp=3,ep=6,replicate=2").ranks == 12
    assert parse_engine_mesh("tp=1") == EngineMesh(1, 1, False, 1)


@pytest.mark.parametrize("text", ["tp=8,ep=12", "tp=8,ep=4", "tp=2,dp=2,ep=2"])
def test_ep_that_is_not_tp_times_dp_is_refused(text):
    with pytest.raises(UnsupportedError, match="ep is not tp x dp"):
        parse_engine_mesh(text)


@pytest.mark.parametrize("text", ["", "tp", "tp=0", "fsdp=2", "tp=2,tp=2", "tp=two"])
def test_malformed_mesh_error_shows_an_example(text):
    with pytest.raises(UnsupportedError, match="not a mesh") as error:
        parse_engine_mesh(text)
    assert '"tp=8,ep=32"' in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "division"),
    [
        ("model.embed_tokens.weight", (8, 4), Division.VOCABULARY),
        ("lm_head.weight", (8, 4), Division.VOCABULARY),
        ("model.norm.weight", (4,), Division.WHOLE),
        ("model.layers.0.self_attn.q_proj.weight", (8, 4), Division.ROWS),
        ("model.layers.0.self_attn.q_proj.bias", (8,), Division.ROWS),
        ("model.layers.0.self_attn.k_proj.weight", (8, 4), Division.HEADS),
        ("model.layers.0.self_attn.v_proj.bias", (8,), Division.HEADS),
        ("model.layers.0.self_attn.o_proj.weight", (4, 8), Division.COLUMNS),
        ("model.layers.0.self_attn.o_proj.bias", (4,), Division.WHOLE),
        ("model.layers.0.self_attn.kv_b_proj.weight", (8, 4), Division.ROWS),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (8, 4), Division.WHOLE),
        ("model.layers.0.mlp.gate.weight", (8, 4), Division.WHOLE),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (8,), Division.WHOLE),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (8, 4), Division.UNKNOWN),
        ("model.layers.0.linear_attn.conv1d.weight", (8, 1, 4), Division.UNKNOWN),
        ("model.layers.0.scale", (), Division.WHOLE),
    ],
)
def test_division_follows_the_class_of_the_module(name, shape, division):
    assert division_of(name, shape, EngineMesh(2, 2, True, 1), "Qwen3MoeForCausalLM") is division


def test_experts_are_divided_whole_only_with_ep():
    assert division_of(EXPERTS, (4, 8, 2), EngineMesh(2, 1, True, 1), "") is Division.EXPERTS
    assert division_of(EXPERTS, (4, 8, 2), EngineMesh(2, 1, False, 1), "") is Division.INTERMEDIATE


def test_shared_experts_are_whole_where_the_class_divides_tokens():
    tokens = EngineMesh(tp=2, dp=2, has_ep=True, replicate=1)
    assert division_of(SHARED, (4, 8), tokens, "DeepseekV3ForCausalLM") is Division.WHOLE
    assert division_of(SHARED, (4, 8), tokens, "Glm4MoeForCausalLM") is Division.COLUMNS
    for other in (EngineMesh(4, 1, True, 1), EngineMesh(1, 4, True, 1), EngineMesh(2, 2, False, 1)):
        assert division_of(SHARED, (4, 8), other, "DeepseekV3ForCausalLM") is Division.COLUMNS


def held(name, shapes, division, mesh, kv_heads=None):
    """Return the elements that each rank holds, as numbers of the whole tensor."""
    shape = shapes[name]
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = []
    for rank in range(mesh.ranks):
        part = whole
        region = region_on(name, shapes, division, mesh, rank, kv_heads)
        assert region.shape == shape
        for dim, runs in enumerate(region.runs):
            indices = [index for start, length in runs for index in range(start, start + length)]
            part = part.index_select(dim, torch.tensor(indices, dtype=torch.long))
        parts.append(part.tolist())
    return parts


def test_rows_and_columns_are_divided_over_tp_and_repeated_over_dp():
    mesh = EngineMesh(2, 2, False, 1)
    assert held("a", {"a": (4, 1)}, Division.ROWS, mesh) == [[[0], [1]], [[2], [3]]] * 2
    assert held("a", {"a": (4,)}, Division.ROWS, mesh) == [[0, 1], [2, 3]] * 2
    assert held("a", {"a": (2, 2)}, Division.COLUMNS, mesh) == [[[0], [2]], [[1], [3]]] * 2
    assert held("a", {"a": (2, 2)}, Division.WHOLE, mesh) == [[[0, 1], [2, 3]]] * 4
    assert held("a", {"a": (2, 2)}, Division.UNKNOWN, mesh) == [[[0, 1], [2, 3]]] * 4
    assert held("a", {"a": ()}, Division.WHOLE, mesh) == [0] * 4
    assert held("a", {"a": (0, 2)}, Division.ROWS, mesh) == [[]] * 4


@pytest.mark.parametrize(
    ("tp", "heads", "rows"),
    [
        (1, 2, [[0, 1, 2, 3]]),
        (2, 2, [[0, 1], [2, 3]]),
        (2, 4, [[0, 1], [2, 3]]),
        (4, 2, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (4, 1, [[0, 1, 2, 3]] * 4),
        (2, None, [[0, 1], [2, 3]]),
    ],
)
def test_a_head_of_keys_is_on_several_ranks_if_there_are_fewer_heads(tp, heads, rows):
    assert held("a", {"a": (4,)}, Division.HEADS, EngineMesh(tp, 1, False, 1), heads) == rows


def test_rows_of_a_vocabulary_are_divided_after_padding():
    # 130 rows are padded to 192; two ranks have 96 places each, four have 48, and the last has no row.
    for tp, expected in ((1, [130]), (2, [96, 34]), (4, [48, 48, 34, 0])):
        parts = held("a", {"a": (130,)}, Division.VOCABULARY, EngineMesh(tp, 1, False, 1))
        assert [len(part) for part in parts] == expected
        assert list(itertools.chain(*parts)) == list(range(130))


def test_whole_experts_are_divided_in_blocks_and_the_first_ranks_have_more():
    mesh = EngineMesh(tp=2, dp=2, has_ep=True, replicate=2)
    assert held("a", {"a": (6, 1)}, Division.EXPERTS, mesh) == [[[0], [1]], [[2], [3]], [[4]], [[5]]] * 2
    assert held("a", {"a": (2,)}, Division.EXPERTS, mesh) == [[0], [1], [], []] * 2


def test_intermediate_size_is_divided_in_gate_and_in_up():
    path = "layers.0.experts"
    shapes = {f"{path}.w13_weight": (1, 8, 1), f"{path}.w13_bias": (1, 8), f"{path}.w2_weight": (1, 1, 4)}
    shapes[f"{path}.w2_bias"] = (1, 2)
    mesh = EngineMesh(tp=1, dp=2, has_ep=False, replicate=1)
    parts = {name: held(name, shapes, Division.INTERMEDIATE, mesh) for name in shapes}
    assert parts[f"{path}.w13_weight"] == [[[[0], [1], [4], [5]]], [[[2], [3], [6], [7]]]]
    assert parts[f"{path}.w13_bias"] == [[[0, 1, 4, 5]], [[2, 3, 6, 7]]]
    assert parts[f"{path}.w2_weight"] == [[[[0, 1]]], [[[2, 3]]]]
    assert parts[f"{path}.w2_bias"] == [[[0, 1]]] * 2


def test_experts_without_a_gate_have_one_part():
    shapes = {"experts.w13_weight": (1, 4, 1), "experts.w2_weight": (1, 1, 4)}
    parts = held("experts.w13_weight", shapes, Division.INTERMEDIATE, EngineMesh(2, 1, False, 1))
    assert parts == [[[[0], [1]]], [[[2], [3]]]]


def test_experts_in_an_unknown_layout_are_divided_whole_only():
    shapes = {"experts.gate_up_proj": (2, 4, 2)}
    assert region_on(*shapes, shapes, Division.EXPERTS, EngineMesh(2, 1, True, 1), 1, None).local_shape == (1, 4, 2)
    with pytest.raises(UnsupportedError, match=r"the layout of the experts in experts\.gate_up_proj is not known"):
        region_on(*shapes, shapes, Division.INTERMEDIATE, EngineMesh(2, 1, False, 1), 0, None)


@pytest.mark.parametrize(
    ("division", "shape", "tp", "heads"),
    [
        (Division.ROWS, (6, 4), 4, None),
        (Division.COLUMNS, (4, 6), 4, None),
        (Division.VOCABULARY, (64, 4), 3, None),
        (Division.HEADS, (12, 4), 4, 3),
        (Division.HEADS, (12, 4), 2, 3),
    ],
)
def test_a_division_that_vllm_refuses_is_refused(division, shape, tp, heads):
    with pytest.raises(UnsupportedError, match=r"the ranks of the engine do not divide a\.weight"):
        region_on("a.weight", {"a.weight": shape}, division, EngineMesh(tp, 1, False, 1), 0, heads)
