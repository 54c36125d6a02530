"""Tests of the headers of full-size checkpoints: their models have a place for every tensor, and files are sparse."""

import pytest

from automodel_conv import compile_plan, open_checkpoint
from automodel_conv.upstream.registry import transformers_available
from benchmarks.full_size import DEEPSEEK_V3_FP8, KIMI_K2_NVFP4, MINIMAX_M2_FP8, write_header, write_headers

PUBLISHED = {spec.name: spec for spec in (DEEPSEEK_V3_FP8, MINIMAX_M2_FP8, KIMI_K2_NVFP4)}


@pytest.mark.skipif(not transformers_available(), reason="builds transformers models")
@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_a_place_for_every_tensor_of_their_layers(name, tmp_path):
    spec = PUBLISHED[name]
    spec.write(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert (len(checkpoint.names), len(checkpoint.files)) == (spec.keys, spec.files)
    assert sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512 < spec.keys * 600
    plan = compile_plan(checkpoint)
    further = f"model.layers.{spec.config['num_hidden_layers']}."
    left_out = [name for name in plan.left_out if not name.endswith((".input_scale", ".k_scale", ".v_scale"))]
    assert all(name.startswith(further) for name in left_out)
    assert bool(left_out) == bool(spec.config.get("num_nextn_predict_layers"))
    assert not plan.missing


def test_headers_are_those_of_the_tensors(tmp_path):
    tensors = {"b": ("BF16", (2, 3)), "a": ("BF16", ()), "d": ("I16", (2,)), "c": ("F32", (5,)), "e": ("U8", (30,))}
    write_headers(tmp_path, tensors, 2)
    opened = open_checkpoint(tmp_path)
    assert list(zip(opened.names, opened.nbytes, opened.file_ids, strict=True)) == [
        ("c", 20, 0),
        ("a", 2, 0),
        ("b", 12, 0),
        ("d", 4, 0),
        ("e", 30, 1),
    ]


def test_one_file_keeps_the_order_of_its_tensors(tmp_path):
    write_header(tmp_path / "model.safetensors", {"z": ("U8", (3,)), "a": ("F16", (0, 4)), "m": ("I64", (1,))})
    opened = open_checkpoint(tmp_path)
    assert opened.names == ["z", "a", "m"]
    assert opened.shapes == [(3,), (0, 4), (1,)]
