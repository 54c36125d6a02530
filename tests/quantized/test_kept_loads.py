"""Tests of loads that keep codes: scales follow their codes as in a conversion of files, or one error is raised."""

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("transformers", reason="recipes return transformers' rule objects")

from safetensors.torch import save_file
from torch.distributed.tensor import Shard
from transformers.core_model_loading import WeightRenaming

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.planning.layouts import LAYOUTS
from automodel_conv.planning.sharding import placed
from automodel_conv.recipes import kimi_k2
from automodel_conv.testing import assert_bytes_equal
from automodel_conv.upstream.rules import RuleSet
from tests.comparing import assert_same, tensors_of
from tests.quantized.producers import PRODUCERS
from tests.quantized.test_kept_codes import qwen
from tests.quantized.test_models import fine_grained, keeping, quantized
from tests.recipes.support import write
from tests.recipes.test_kimi import k2

KEPT_LAYOUTS = [None, "transformers", "nemo", "vllm"]
SCALE = "mlp.experts.0.down_proj.weight_scale_inv"
scales_stay = pytest.mark.skipif(
    RuleSet(kimi_k2()).rename(SCALE)[0] != SCALE, reason="rules of this transformers move scales like their weights"
)
CANNOT = r"experts\.\S+: codes and scales cannot be kept in this layout"


class Kimi(NamedTuple):
    """A checkpoint in the format of Kimi-K2."""

    path: Path

    def load(self, **options):
        return dict(amc.load_state_dict(self.path, **{"rules": kimi_k2(), "dequantize": False} | options))

    def converted(self, **options):
        """Return the tensors of the files that a conversion writes."""
        there = self.path.parent / "-".join(map(str, ["to", *options.values()]))
        amc.convert_checkpoint(self.path, there, **{"rules": kimi_k2()} | options)
        return tensors_of(there)


@pytest.fixture
def fp8(tmp_path):
    return Kimi(write(tmp_path / "fp8", k2("fp8 128x128", dense=True)).path)


@pytest.fixture
def int4(tmp_path):
    return Kimi(write(tmp_path / "int4", k2("int4 g32")).path)


def advice(call):
    with pytest.raises(amc.UnsupportedError, match=CANNOT) as caught:
        call()
    return str(caught.value).partition("do:")[2]


@pytest.mark.parametrize("layout", KEPT_LAYOUTS)
@pytest.mark.parametrize("sizes", [(128, 256), (256, 256), (128, 384)], ids=str)
def test_load_equals_the_files_of_a_conversion(tmp_path, sizes, layout):
    kimi = Kimi(write(tmp_path / "fp8", k2("fp8 128x128", dense=True, sizes=sizes)).path)
    loaded = kimi.load(layout=layout)
    assert_same(loaded, kimi.converted(layout=layout))
    codes = [name for name, tensor in loaded.items() if tensor.dtype == torch.float8_e4m3fn and ".experts." in name]
    assert len(codes) == 4
    for name in codes:
        grid = [number // 128 for number in loaded[name].shape[1:]]
        assert list(loaded[f"{name}_scale_inv"].shape) == [loaded[name].shape[0], *grid]


@pytest.mark.parametrize("layout", KEPT_LAYOUTS)
def test_dtype_casts_neither_codes_nor_scales(fp8, layout):
    options = {"layout": layout, "dtype": torch.float16}
    assert_same(fp8.load(**options), fp8.converted(**options))


def test_plan_in_json_loads_codes_with_their_scales(fp8):
    plan = amc.compile_plan(fp8.path, rules=kimi_k2(), layout="nemo", dequantize=False)
    loaded = amc.load_state_dict(fp8.path, plan=plan.to_json())
    assert_same(dict(loaded), fp8.converted(layout="nemo"))


@pytest.mark.parametrize("stated", [True, False], ids=["files", "argument"])
@pytest.mark.parametrize(("source_layout", "layout"), [*itertools.permutations(["transformers", "nemo", "vllm"], 2)])
def test_kept_codes_load_from_layout_to_layout(fp8, source_layout, layout, stated):
    grouped = Kimi(fp8.path.parent / f"to-{source_layout}")
    fp8.converted(layout=source_layout)
    options = {} if stated else {"source_layout": source_layout, "rules": []}
    assert_same(grouped.load(layout=layout, **options), fp8.converted(layout=layout))


def test_source_layout_of_the_files_moves_the_scales_too(fp8):
    fp8.converted(layout="nemo")
    grouped = Kimi(fp8.path.parent / "to-nemo")
    assert_same(grouped.load(rules=[], source_layout="nemo"), fp8.converted(layout="transformers"))


def test_gate_and_up_that_share_scales_do_not_alternate(fp8):
    assert "dequantize=True decodes them to values" in advice(lambda: fp8.load(layout="gpt_oss"))


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_packed_codes_are_refused_with_advice(int4, layout):
    text = advice(lambda: int4.load(layout=layout))
    assert "dequantize=True decodes them to values; rules=[] keeps everything as stored" in text
    assert_same(int4.load(rules=[]), tensors_of(int4.path))


@pytest.mark.parametrize("scheme", ["gptq", "awq", "nvfp4"])
def test_model_of_the_config_has_no_place_for_packed_codes(tmp_path, scheme):
    quantized("", tmp_path, PRODUCERS[scheme], qwen(hidden=64, intermediate=32))
    with pytest.raises(amc.NameProblems) as caught:
        amc.load_state_dict(tmp_path, dequantize=False)
    assert "dequantize=True decodes codes to values; rules=[] keeps codes and scales as stored" in str(caught.value)
    assert "strict=" not in str(caught.value)


@pytest.mark.parametrize("layout", KEPT_LAYOUTS)
@pytest.mark.parametrize("scheme", ["int4 g32", "gptq", "awq", "nvfp4", "fp8 128x128"])
def test_codes_that_no_rule_or_layout_moves_stay_as_stored(tmp_path, scheme, layout):
    quantized("", tmp_path, PRODUCERS[scheme], qwen(hidden=64, intermediate=32))
    decoded = amc.load_state_dict(tmp_path, rules=[])
    values = {name: tensor for name, tensor in decoded.items() if ".experts." in name}
    codes = {name: tensor for name, tensor in tensors_of(tmp_path).items() if ".experts." not in name}
    save_file(codes | values, tmp_path / "model.safetensors")
    rules = amc.get_checkpoint_conversion_mapping("qwen3_moe")
    loaded = dict(amc.load_state_dict(tmp_path, rules=rules, layout=layout, dequantize=False))
    experts = amc.convert_state_dict(values, rules=rules, layout=layout)
    assert len(experts) == 2
    assert_same(loaded, codes | dict(experts))


def test_blocks_that_are_not_square_are_not_transposed(tmp_path):
    kimi = Kimi(write(tmp_path / "fp8", k2("fp8 32x16", dense=True)).path)
    advice(lambda: kimi.load(layout="nemo"))
    assert_same(kimi.load(layout="vllm"), kimi.converted(layout="vllm"))


def test_incomplete_codes_of_experts_are_named(fp8):
    rows = [name for name in tensors_of(fp8.path) if ".experts.1.up_proj." in name]
    amc.convert_checkpoint(fp8.path, fp8.path.parent / "less", rules=[], drop=[f"{name}" for name in rows])
    with pytest.raises(amc.NameProblems, match=r"incomplete.*\n.*gate_up_proj"):
        Kimi(fp8.path.parent / "less").load(layout="nemo")


def test_codes_without_a_config_are_not_grouped(fp8):
    (fp8.path / "config.json").write_text("{}")
    with pytest.raises(amc.QuantizationError, match="no config describes how to decode them"):
        fp8.load()
    assert_same(fp8.load(rules=[]), tensors_of(fp8.path))


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize(
    "options", [{"rules": [WeightRenaming("^model", "text")]}, {"key_mapping": {"^model": "text"}}]
)
def test_renames_of_codes_and_scales_keep_both(request, kind, options):
    kimi = request.getfixturevalue(kind)
    expected = {name.replace("model.", "text.", 1): tensor for name, tensor in tensors_of(kimi.path).items()}
    assert_same(kimi.load(**{"rules": []} | options), expected)


@pytest.mark.parametrize("stated", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_files_of_renamed_codes_equal_a_load(request, kind, dtype, stated):
    kimi = request.getfixturevalue(kind)
    if not stated:
        (kimi.path / "config.json").write_text("{}")
    options = {"rules": [WeightRenaming("^model", "text")], "dtype": dtype}
    names = {name.replace("model.", "text.", 1) for name in tensors_of(kimi.path)}
    converted = kimi.converted(**options)
    assert converted.keys() == names
    assert_same(converted, kimi.load(**options))


def test_renamed_codes_are_not_dropped_without_their_scales(int4):
    rules = [WeightRenaming("^model", "text")]
    for part in ("packed", "scale"):
        with pytest.raises(amc.UnsupportedError):
            int4.converted(rules=rules, drop=[f"*.1.mlp.experts.1.up_proj.weight_{part}"])


@pytest.mark.parametrize(
    "options",
    [
        {"rules": [WeightRenaming(r"down_proj\.weight$", "down.weight")]},
        {"key_mapping": {r"down_proj\.weight$": "down.weight"}},
    ],
)
def test_scales_follow_codes_that_are_renamed_without_them(fp8, options):
    expected = {name.replace("down_proj.", "down."): tensor for name, tensor in tensors_of(fp8.path).items()}
    assert_same(fp8.load(**{"rules": []} | options), expected)


@pytest.mark.parametrize("layout", ["nemo", "vllm"])
def test_rank_loads_its_part_of_codes_and_scales(fp8, layout):
    checkpoint = amc.open_checkpoint(fp8.path)
    plan = amc.compile_plan(checkpoint, rules=kimi_k2(), layout=layout, dequantize=False)
    whole = fp8.converted(layout=layout)
    for coordinate in itertools.product(range(2), range(2)):
        regions = {
            target.name: placed(target.shape, (2, 2), coordinate, [Shard(0), Shard(1)])
            for target in plan.targets
            if ".experts." in target.name
        }
        assert len(regions) == 8
        mine = plan.shard(regions)
        buffers = allocate(mine.targets)
        for buffer in buffers.values():
            buffer.view(torch.uint8).fill_(0xA5)
        load_to_host(mine, checkpoint, buffers, threads=2)
        for name, region in regions.items():
            part = whole[name]
            for dim, runs in enumerate(region.runs):
                index = [at for start, length in runs for at in range(start, start + length)]
                part = part.index_select(dim, torch.tensor(index, dtype=torch.int64))
            assert_bytes_equal(buffers[name], part)


def fp8_model(model_class, path):
    """Return the model on the meta device, with FP8 parameters for codes and no place for scales."""
    codes = {name for name, tensor in tensors_of(path).items() if tensor.dtype == torch.float8_e4m3fn}
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_pretrained(path)).bfloat16()
        for name, parameter in list(model.named_parameters()):
            if name in codes or ".experts." in name:
                own = torch.nn.Parameter(torch.empty_like(parameter, dtype=torch.float8_e4m3fn), requires_grad=False)
                module, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(module), leaf, own)
    return model


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("with_rules", [True, False])
def test_codes_do_not_fill_a_model_without_their_scales(tmp_path, strict, with_rules):
    model_class, _ = quantized("", tmp_path, fine_grained((16, 16)), qwen())
    rules = amc.get_checkpoint_conversion_mapping("qwen3_moe") if with_rules else None
    options = {"rules": rules, "strict": strict, "dequantize": False}
    for call in (amc.load_state_dict, lambda path, model, **options: amc.load_model(model, path, **options)):
        with pytest.raises(amc.UnsupportedError, match="codes and scales cannot be kept in this layout") as caught:
            call(tmp_path, fp8_model(model_class, tmp_path), **options)
        assert "dequantize=True" in str(caught.value)


@scales_stay
def test_rules_that_group_only_codes_are_refused_for_a_model_that_keeps_both(tmp_path):
    model_class, _ = quantized("qwen3_moe", tmp_path)
    rules = amc.get_checkpoint_conversion_mapping("qwen3_moe")
    with pytest.raises(amc.UnsupportedError, match=CANNOT):
        amc.load_state_dict(tmp_path, keeping(tmp_path, model_class), rules=rules, dequantize=False, strict=False)


@scales_stay
@pytest.mark.parametrize("layout", KEPT_LAYOUTS)
def test_codes_in_memory_are_not_grouped_without_their_scales(fp8, layout):
    state = tensors_of(fp8.path)
    text = advice(lambda: amc.convert_state_dict(state, rules=kimi_k2(), layout=layout))
    assert "load_state_dict() and load_model() decode them" in text
    assert "dequantize" not in text
    assert_same(dict(amc.convert_state_dict(state, rules=[])), state)


def test_codes_in_memory_go_from_layout_to_layout_with_their_scales(fp8):
    grouped = fp8.converted(layout="nemo")
    laid_out = amc.convert_state_dict(grouped, rules=[], source_layout="nemo", layout="vllm")
    assert_same(dict(laid_out), fp8.converted(layout="vllm"))


@scales_stay
@pytest.mark.parametrize("layout", KEPT_LAYOUTS)
def test_grouped_codes_are_not_saved_without_their_scales(fp8, tmp_path, layout):
    loaded = fp8.load(layout=layout)
    options = {"rules": kimi_k2(), "layout": layout}
    advice(lambda: amc.revert_state_dict(loaded, **options))
    advice(lambda: amc.save_checkpoint(loaded, tmp_path / "saved", **options))
    assert not (tmp_path / "saved").exists()
    amc.save_checkpoint(loaded, tmp_path / "saved", rules=[])
    assert_same(tensors_of(tmp_path / "saved"), loaded)
