"""Tests of conversions between all layouts: equal to a hand-written oracle, and back to the original bytes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import automodel_conv as amc
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.testing import address_valued
from tests.comparing import assert_same, tensors_of

try:
    from transformers import CONFIG_MAPPING
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    from tests.model_zoo import build_model, is_kept_in_float32, write_checkpoint
except ModuleNotFoundError:
    build_model = None

needs_transformers = pytest.mark.skipif(build_model is None, reason="transformers is not installed")
STAGES = ("transformers", "nemo", "gpt_oss", "vllm", "vllm_w31", "per_expert")

RENAMED = {
    "mixtral": [(".block_sparse_moe.", ".mlp.")],
    "nemotron_h": [("backbone.", "model."), ("embedding.", "embeddings.")],  # some releases write the second
}

ROLES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
GROUPED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias|)")


def taken_apart(name, published):
    """Return ``{module: {role: stacked tensor}}`` of the experts, and all other tensors, under the model's names."""
    experts, others = {}, {}
    for key, tensor in published.items():
        for before, after in RENAMED.get(name, ()):
            key = key.replace(before, after)
        if match := EXPERT.fullmatch(key):
            path, number, projection = match.groups()
            experts.setdefault(path, {}).setdefault(ROLES[projection], {})[int(number)] = tensor
        elif match := GROUPED.fullmatch(key):  # gpt_oss publishes [in, out] with gate and up alternating
            path, projection, bias = match.groups()
            tensor = tensor if bias else tensor.transpose(1, 2)
            if projection == "gate_up_proj":
                parts = {"gate" + bias: tensor[:, 0::2], "up" + bias: tensor[:, 1::2]}
            else:
                parts = {"down" + bias: tensor}
            experts.setdefault(path, {}).update({role: dict(enumerate(part)) for role, part in parts.items()})
        else:
            others[key] = tensor
    stacked = {
        path: {role: torch.stack([parts[e] for e in range(len(parts))]) for role, parts in roles.items()}
        for path, roles in experts.items()
    }
    return stacked, others


def alternating(gate, up):
    """Return rows of gate and up alternating, ``[E, 2I, ...]``."""
    return torch.stack([gate, up], 2).flatten(1, 2)


def laid_out(name, published, layout):
    """Return the tensors that a conversion of a published checkpoint to a layout should write."""
    experts, tensors = taken_apart(name, published)
    for path, roles in experts.items():
        for bias in ("", "_bias"):
            if "up" + bias not in roles:
                continue
            first, gated = roles["up" + bias], "gate" + bias in roles
            if gated:
                join = alternating if layout == "gpt_oss" else lambda *parts: torch.cat(parts, 1)
                parts = roles["gate" + bias], first
                first = join(*parts[::-1] if layout == "vllm_w31" else parts)
            down = roles["down" + bias]
            if layout in ("nemo", "gpt_oss") and not bias:
                first, down = first.transpose(1, 2), down.transpose(1, 2)
            names = ("gate_up_proj" if gated else "up_proj") + bias, "down_proj" + bias
            if layout in ("vllm", "vllm_w31"):
                names = ("w13_bias", "w2_bias") if bias else ("w13_weight", "w2_weight")
            if layout == "nemo":
                names = ("gate_up_proj_bias", "down_proj_bias") if bias else ("gate_and_up_projs", "down_projs")
            tensors[f"{path}.{names[0]}"], tensors[f"{path}.{names[1]}"] = first.contiguous(), down.contiguous()
    return tensors


@needs_transformers
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "nemotron_h", "gpt_oss"])
def test_chained_layouts_equal_the_oracle_and_restore_the_original(name, tmp_path):
    model = build_model(name)
    write_checkpoint(model, tmp_path / "published")
    published = tensors_of(tmp_path / "published")
    before, layout = "published", None
    for after in STAGES:
        options = {"layout": after, "source_layout": layout}
        report = amc.convert_checkpoint(tmp_path / before, tmp_path / after, max_shard_size="50KB", **options)
        assert (report.left_out, report.files_resumed) == ((), 0)
        assert sorted(report.files) == sorted(path.name for path in (tmp_path / after).glob("*.safetensors"))
        assert report.bytes_written == sum(path.stat().st_size for path in (tmp_path / after).glob("*.safetensors"))
        expected = published if after == "per_expert" else laid_out(name, published, after)
        assert_same(tensors_of(tmp_path / after), expected)
        compared = amc.verify_checkpoint(tmp_path / before, tmp_path / after, **options)
        assert compared == sum(tensor.nbytes for tensor in expected.values())
        assert (tmp_path / after / "config.json").read_bytes() == (tmp_path / "published/config.json").read_bytes()
        assert not (tmp_path / after / STAGING_NAME).exists()
        before, layout = after, after
    again = type(model).from_pretrained(tmp_path / "per_expert")
    assert_same(again.state_dict(), type(model).from_pretrained(tmp_path / "published").state_dict())


@needs_transformers
@pytest.mark.parametrize("name", ["mixtral", "nemotron_h"])
def test_transformers_loads_the_layout_of_the_model(name, tmp_path):
    model = build_model(name)
    write_checkpoint(model, tmp_path / "published")
    amc.convert_checkpoint(tmp_path / "published", tmp_path / "grouped")
    again = type(model).from_pretrained(tmp_path / "grouped")
    assert_same(again.state_dict(), type(model).from_pretrained(tmp_path / "published").state_dict())
    assert_same(amc.load_state_dict(tmp_path / "grouped"), again.state_dict())


@needs_transformers
@pytest.mark.parametrize("source", STAGES[:-1])
@pytest.mark.parametrize("layout", STAGES)
def test_any_layout_becomes_any_other_in_one_step(published, tmp_path, source, layout):
    amc.convert_checkpoint(published, tmp_path / "a", layout=source)
    amc.convert_checkpoint(tmp_path / "a", tmp_path / "b", layout=layout, source_layout=source)
    tensors = tensors_of(published)
    expected = tensors if layout == "per_expert" else laid_out("mixtral", tensors, layout)
    assert_same(tensors_of(tmp_path / "b"), expected)


@needs_transformers
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("layout", [None, "nemo", "per_expert"])
def test_dtype_casts_all_except_tensors_kept_in_float32(tmp_path, dtype, layout):
    model = build_model("deepseek_v3")
    write_checkpoint(model, tmp_path / "published")
    amc.convert_checkpoint(tmp_path / "published", tmp_path / "grouped", layout=None)
    source = "grouped" if layout == "per_expert" else "published"
    amc.convert_checkpoint(tmp_path / source, tmp_path / "out", layout=layout, dtype=dtype)
    tensors = tensors_of(tmp_path / "published")
    expected = tensors if layout == "per_expert" else laid_out("deepseek_v3", tensors, layout or "transformers")
    kept = [name for name in expected if is_kept_in_float32(model, name)]
    assert any(name.endswith("e_score_correction_bias") for name in kept)
    if dtype is not None:
        expected = {name: t.to(torch.float32 if name in kept else dtype) for name, t in expected.items()}
    assert_same(tensors_of(tmp_path / "out"), expected)


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", ["published", "grouped"])
def test_dtype_uses_model_names_of_published_tensors(tmp_path, source, dtype):
    """Check DeepSeek-V4, which keeps norms and much else in float32 and publishes most of it under other names."""
    write_checkpoint(build_model("deepseek_v4"), tmp_path / "published", 1 << 30)
    file = tmp_path / "published" / "model.safetensors"
    wide = {n: t.float() if t.is_floating_point() else t for n, t in load_file(file).items()}
    save_file(wide, file, metadata={"format": "pt"})
    if source == "grouped":
        amc.convert_checkpoint(tmp_path / "published", tmp_path / "grouped", dtype=torch.float32)
    amc.convert_checkpoint(tmp_path / source, tmp_path / "out", layout="per_expert", dtype=dtype)
    converted = tensors_of(tmp_path / "out")
    assert converted.keys() == wide.keys()
    model = type(build_model("deepseek_v4")).from_pretrained(tmp_path / "published", dtype=dtype)
    model.save_pretrained(tmp_path / "upstream")
    assert_same(converted, tensors_of(tmp_path / "upstream"))
    assert {converted[n].dtype for n in converted if n.endswith(("attn_norm.weight", "hc_base"))} == {torch.float32}
    amc.save_checkpoint(model, tmp_path / "saved", dtype=dtype)
    assert_same(tensors_of(tmp_path / "saved"), converted)


def test_dtypes_other_than_that_of_the_config_stay(tmp_path):
    """Check a checkpoint with other dtypes than its config states: nothing is cast unless asked for."""
    if build_model is None:
        pytest.skip("transformers is not installed")
    write_checkpoint(build_model("mixtral"), tmp_path / "bf16")
    amc.convert_checkpoint(tmp_path / "bf16", tmp_path / "f16", rules=[], dtype=torch.float16)
    assert json.loads((tmp_path / "f16" / "config.json").read_text())["dtype"] == "bfloat16"
    amc.convert_checkpoint(tmp_path / "f16", tmp_path / "out")
    expected = laid_out("mixtral", tensors_of(tmp_path / "f16"), "transformers")
    assert {tensor.dtype for tensor in expected.values()} == {torch.float16}
    assert_same(tensors_of(tmp_path / "out"), expected)


def merging():
    return [
        WeightConverter(
            ["experts.*.w1.weight", "experts.*.w3.weight"],
            "experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("experts.*.w2.weight", "experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


@needs_transformers
@pytest.mark.parametrize("layout", ["transformers", "nemo", "gpt_oss"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("threads", [1, 3])
def test_experts_larger_than_the_scratch_are_the_same_bytes(tmp_path, layout, dtype, threads):
    tensors = {}  # no NaN, because casts change its bits
    for n, (e, w) in enumerate((e, w) for e in range(3) for w in ("w1", "w2", "w3")):
        shape = (150, 200) if w != "w2" else (200, 150)
        tensors[f"experts.{e}.{w}.weight"] = address_valued(shape, torch.bfloat16, 250 * n)
    amc.save_checkpoint(tensors, tmp_path / "saved", rules=[])
    options = {"rules": merging(), "layout": layout, "dtype": dtype}
    report = amc.convert_checkpoint(
        tmp_path / "saved", tmp_path / "out", scratch_bytes=1 << 16, threads=threads, **options
    )
    assert report.peak_extra_bytes <= 1 << 16
    expected = laid_out("", {f"m.{name}": tensor for name, tensor in tensors.items()}, layout)
    expected = {name.removeprefix("m."): t if dtype is None else t.to(dtype) for name, t in expected.items()}
    assert_same(tensors_of(tmp_path / "out"), expected)
    back = {"rules": merging(), "layout": "per_expert", "source_layout": layout, "dtype": torch.bfloat16}
    amc.convert_checkpoint(tmp_path / "out", tmp_path / "back", scratch_bytes=1 << 16, threads=threads, **back)
    assert_same(tensors_of(tmp_path / "back"), tensors)


@needs_transformers
@pytest.mark.parametrize("name", ["mixtral", "nemotron_h", "ernie4_5_vl_moe", "inkling2_text", "inkling2_loop"])
def test_published_form_stays_as_it_is(name, tmp_path):
    """Check it also for Inkling2, with names that its reversed rules would change again."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    write_checkpoint(build_model(name), tmp_path / "published")
    amc.convert_checkpoint(tmp_path / "published", tmp_path / "out", layout="per_expert")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "published"))
