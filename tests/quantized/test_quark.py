"""Tests of checkpoints of AMD Quark at every door: exact values, whole, in shards, on disk and back."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs transformers")

from torch.distributed.tensor import Shard
from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.planning.methods.method import part_name
from automodel_conv.planning.sharding import placed
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import assert_same, tensors_of
from tests.kernels.test_code_tables import rounded
from tests.quantized.quark import MXFP4, NVFP4, PER_BLOCK, PER_CHANNEL, PER_TENSOR, QUARK, config, mxfp4, weight
from tests.quantized.test_kept_codes import qwen
from tests.quantized.test_models import quantized
from tests.quantized.test_schemes import weight as matrix
from tests.quantized.test_schemes import write

BF16 = torch.bfloat16


def model():
    return qwen(hidden=64, intermediate=32, experts=4)


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", QUARK)
def test_files_are_decoded_and_rounded_once(tmp_path, name, wanted):
    exact = write(tmp_path, QUARK[name], {"a.weight": matrix(96, 128), "b.weight": matrix(32, 32, seed=1)})
    loaded = amc.load_state_dict(tmp_path, rules=[], dtype=wanted)
    assert loaded.keys() == exact.keys()
    for key, tensor in loaded.items():
        assert_bytes_equal(tensor, rounded(exact[key].numpy(), wanted))


@pytest.mark.parametrize("name", ["mxfp4", "fp8 per tensor", "mxfp8 in blocks", "nvfp4", "int8"])
def test_experts_of_a_model_are_decoded_in_every_layout_and_shard(tmp_path, name):
    _, exact = quantized("", tmp_path, QUARK[name], model())
    stacked = {
        kind: torch.stack(
            [
                torch.cat([rounded(exact[f"{PREFIX}.{e}.{part}_proj.weight"].numpy(), BF16) for part in parts])
                for e in range(4)
            ]
        )
        for kind, parts in {"gate_up": ("gate", "up"), "down": ("down",)}.items()
    }
    whole = amc.load_state_dict(tmp_path)
    for kind, tensor in stacked.items():
        assert_bytes_equal(whole[f"{PREFIX}.{kind}_proj"], tensor)
    nemo = amc.load_state_dict(tmp_path, layout="nemo")
    assert_bytes_equal(nemo[f"{PREFIX}.down_projs"], stacked["down"].transpose(1, 2).contiguous())
    into = model()
    amc.load_model(into, tmp_path)
    assert_same(dict(into.state_dict()), dict(whole))
    checkpoint, plan = amc.open_checkpoint(tmp_path), amc.compile_plan(tmp_path)
    regions = {
        f"{PREFIX}.{kind}_proj": placed(tensor.shape, (2, 2), (1, 1), (Shard(0), Shard(1 if kind == "gate_up" else 2)))
        for kind, tensor in stacked.items()
    }
    mine = plan.shard(regions)
    buffers = allocate(mine.targets)
    load_to_host(mine, checkpoint, buffers, threads=2, scratch_bytes=None)
    assert_bytes_equal(buffers[f"{PREFIX}.gate_up_proj"], stacked["gate_up"][2:, 32:].contiguous())
    assert_bytes_equal(buffers[f"{PREFIX}.down_proj"], stacked["down"][2:, :, 16:].contiguous())


PREFIX = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4, scales named after quantizers", "fp8 per block", "nvfp4"])
def test_files_are_converted_to_values_and_codes_are_carried_unchanged(tmp_path, name):
    quantized("", tmp_path / "source", QUARK[name], model())
    decoded = {"layout": "per_expert", "dequantize": True}
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "values", **decoded)
    assert "quantization_config" not in json.loads((tmp_path / "values" / "config.json").read_text())
    assert_same(dict(amc.load_state_dict(tmp_path / "values")), dict(amc.load_state_dict(tmp_path / "source")))
    assert amc.verify_checkpoint(tmp_path / "source", tmp_path / "values", **decoded)
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "codes", rules=[])
    assert_same(tensors_of(tmp_path / "codes"), tensors_of(tmp_path / "source"))
    assert amc.verify_checkpoint(tmp_path / "source", tmp_path / "codes", rules=[])


@pytest.mark.parametrize(("name", "kept"), [("fp8 per block", True), ("fp8 per channel", True), ("mxfp4", False)])
def test_codes_of_eight_bits_are_grouped_with_their_scales(tmp_path, name, kept):
    quantized("", tmp_path / "source", QUARK[name], model())
    convert = lambda: amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout="vllm")  # noqa: E731
    if not kept:
        with pytest.raises(amc.UnsupportedError, match="codes of the format e2m1 cannot be rearranged"):
            convert()
        return
    convert()
    assert_same(dict(amc.load_state_dict(tmp_path / "made")), dict(amc.load_state_dict(tmp_path / "source")))
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "back", layout="per_expert")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))


def test_layers_have_the_weights_that_the_config_gives_them(tmp_path):
    """Check a global scheme next to others by glob, by type, and of weights that stay values."""
    layers = {
        "*.b": {"weight": PER_BLOCK},
        "*.c": {"weight": None},
        "*.d": {"weight": weight("bfloat16", "per_tensor")},
    }
    settings = config(MXFP4, layer_quant_config=layers, layer_type_quant_config={"Linear": {"weight": NVFP4}})
    parts, exact = {"c.weight": matrix(32, 32), "d.weight": matrix(32, 32)}, {}
    for name, producer in {"a": "mxfp4", "b": "fp8 per block", "e": "nvfp4"}.items():
        stored, values = QUARK[producer].make(matrix(32, 64))
        parts |= {
            f"{name}{suffix}" if suffix[:1] == "." else f"{name}.weight{suffix}": p for suffix, p in stored.items()
        }
        exact[f"{name}.weight"] = values
    save_file(parts, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    loaded = amc.load_state_dict(tmp_path, rules=[])
    assert loaded.keys() == {"a.weight", "b.weight", "c.weight", "d.weight", "e.weight"}
    for key, values in exact.items():
        assert_bytes_equal(loaded[key], rounded(values.numpy(), BF16))


def test_layers_by_name_decide_where_two_schemes_fit(tmp_path):
    """Check blocks of 12 and of 16 rows, both two of 20; and a layer that has another scheme than the config states."""
    layers = {"layers.*.b": {"weight": PER_BLOCK}, "layers.0.c": {"weight": MXFP4}}
    settings = config(PER_BLOCK | {"block_size": [12, 32]}, layer_quant_config=layers)
    codes = torch.randn(20, 32).to(torch.float8_e4m3fn)
    stored = {f"layers.0.{name}.weight": codes.clone() for name in "abc"}
    stored |= {f"layers.0.{name}.weight_scale": torch.tensor([[1.0], [2.0]]) for name in "ab"}
    stored["layers.0.c.weight_scale"] = torch.ones(20, 1)

    def load(*names):
        kept = {name: tensor for name, tensor in stored.items() if name.split(".")[2] in names}
        save_file(kept, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
        return amc.load_state_dict(tmp_path, rules=[], dtype=torch.float32)

    loaded = load("a", "b")
    for name, rows in (("a", 12), ("b", 16)):
        factors = torch.tensor([1.0] * rows + [2.0] * (20 - rows))[:, None]
        assert_bytes_equal(loaded[f"layers.0.{name}.weight"], codes.float() * factors)
    with pytest.raises(amc.QuantizationError, match=r"c\.weight has e4m3 codes; the config states e2m1 for its module"):
        load("a", "b", "c")


def test_fp8_layers_keep_the_name_of_their_scale(tmp_path):
    """Check layers that an export restores from an FP8 checkpoint, next to its own."""
    settings = config(MXFP4, layer_quant_config={"mtp.*": {"weight": PER_BLOCK}})
    codes, values = QUARK["fp8 per block"].make(matrix(32, 64))
    parts = {"a.weight" + suffix: part for suffix, part in mxfp4(matrix(32, 64))[0].items()}
    save_file(
        parts | {"mtp.a.weight": codes[""], "mtp.a.weight_scale_inv": codes["_scale"]}, tmp_path / "a.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    loaded = amc.load_state_dict(tmp_path, rules=[])
    assert_bytes_equal(loaded["mtp.a.weight"], rounded(values.numpy(), BF16))


def test_a_stack_may_have_its_scales_in_one_matrix(tmp_path):
    """Check the form of Inkling: ``[E, rows, columns]`` with scales ``[E * rows, columns / 32]``."""
    each = [mxfp4(matrix(6, 64, seed=seed)) for seed in range(3)]
    stored = {
        "experts.w13_weight": torch.stack([parts[""] for parts, _ in each]),
        "experts.w13_weight_scale": torch.cat([parts["_scale"] for parts, _ in each]),
    }
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config(MXFP4)}))
    loaded = amc.load_state_dict(tmp_path, rules=[])
    expected = torch.stack([rounded(exact.numpy(), BF16) for _, exact in each])
    assert_bytes_equal(loaded["experts.w13_weight"], expected)


def test_experts_of_gpt_oss_by_rules_of_ones_own(tmp_path):
    """Check the names of amd/gpt-oss-120b-w-mxfp4-a-fp8, for which transformers has no rules."""
    each = [mxfp4(matrix(64, 32, seed=seed)) for seed in range(3)]
    stored = {}
    for expert, (parts, _) in enumerate(each):
        stem = f"experts.{expert}.gate_up_proj"
        stored |= {f"{stem}.weight": parts[""], f"{stem}.weight_scale": parts["_scale"]}
        stored |= {f"{stem}.input_scale": torch.tensor(0.5), f"{stem}.bias": torch.full((64,), float(expert))}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config(MXFP4)}))
    merge = MergeModulelist(dim=0)
    rules = [
        WeightConverter(["experts.*.gate_up_proj.weight"], ["experts.gate_up_proj"], [merge, Transpose(1, 2)]),
        WeightConverter(["experts.*.gate_up_proj.bias"], ["experts.gate_up_proj_bias"], [merge]),
    ]

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.empty(3, 32, 64, dtype=BF16))
            self.gate_up_proj_bias = torch.nn.Parameter(torch.empty(3, 64))

    into = torch.nn.ModuleDict({"experts": Experts()})
    report = amc.load_model(into, tmp_path, rules=rules)
    assert report.unexpected_keys == ()
    expected = torch.stack([rounded(exact.numpy(), BF16) for _, exact in each]).transpose(1, 2)
    assert_bytes_equal(into["experts"].gate_up_proj.data, expected.contiguous())
    assert into["experts"].gate_up_proj_bias.tolist() == [[float(expert)] * 64 for expert in range(3)]


ATTENTION = "model.layers.0.self_attn"


def test_scales_of_a_cache_are_left_out_also_of_layers_that_are_not_quantized(tmp_path):
    quantized("", tmp_path, QUARK["mxfp4"], model())
    before = dict(amc.load_state_dict(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("k_proj", "v_proj", "q_proj"):
        tensors[f"{ATTENTION}.{name}.weight"] = before[f"{ATTENTION}.{name}.weight"]
        del tensors[f"{ATTENTION}.{name}.weight_scale"]
        tensors[f"{ATTENTION}.{name}.output_scale"] = torch.tensor(0.5)
    tensors[f"{ATTENTION}.prob_output_scale"] = torch.tensor(0.5)
    tensors[f"{ATTENTION}.k_proj.output_quantizer.scale"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = amc.load_state_dict(tmp_path)
    assert_same(dict(loaded), before)
    assert loaded.report.unexpected_keys == ()


def changed(suffix, tensor):
    """Return a change of one part of an expert's weight; None removes it."""

    def change(tensors):
        name = part_name(f"{PREFIX}.1.up_proj.weight", suffix)
        old = tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor(old) if callable(tensor) else tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("mxfp4", changed("_scale", None), "up_proj.weight has no scale: no tensor is named"),
        (
            "mxfp4",
            changed("_scale", lambda scale: scale.float()),
            "is F32; these e2m1 codes have scales of F8_E8M0, U8",
        ),
        ("mxfp4", changed("_scale", lambda scale: scale[:-1]), "expected [32, 2], found [31, 2]"),
        ("mxfp4", changed("", lambda codes: codes.view(torch.int8)), "has int8 codes, which the config does not"),
        ("mxfp4", changed("_scale_inv", torch.zeros(32, 2, dtype=torch.uint8)), "has 2 scales"),
        ("mxfp4", changed(".input_rotation", torch.ones(64, 64)), "needs its input rotated"),
        ("mxfp4", changed(".bias_scale", torch.ones(())), "has a quantized bias"),
        ("fp8 per tensor", changed("_scale", lambda scale: scale.expand(2).clone()), "found [2]"),
        ("fp8 per block", changed("_scale", lambda scale: scale[:, :1].clone()), "expected [2, 2], found [2, 1]"),
        ("nvfp4", changed("_scale_2", None), "no global scale: no tensor is named"),
        ("nvfp4", changed("_scale", lambda scale: scale.view(torch.uint8)), "have scales of F8_E4M3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_that_do_not_fit_are_one_error(tmp_path, name, change, text):
    quantized("", tmp_path, QUARK[name], model())
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for door in (
        lambda: amc.load_state_dict(tmp_path),
        lambda: amc.load_model(model(), tmp_path),
        lambda: amc.compile_plan(tmp_path),
        lambda: amc.convert_checkpoint(tmp_path, tmp_path / "made", layout="nemo", dequantize=True),
    ):
        with pytest.raises(amc.QuantizationError, match="method quark, 1 problem") as caught:
            door()
        assert text in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_under_the_hook_codes_without_a_config_are_not_loaded_as_values(tmp_path):
    quantized("", tmp_path, QUARK["mxfp4"], model())
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with amc.accelerate_transformers(), pytest.raises(amc.QuantizationError, match="its scale is") as caught:
        type(model()).from_pretrained(tmp_path)
    assert "k_proj.weight_scale (U8): transformers would cast it" in str(caught.value)


def test_config_of_another_scheme_is_one_error(tmp_path):
    quantized("", tmp_path, QUARK["mxfp4"], model())
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = copy.deepcopy(QUARK["fp8 per tensor"].config)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(amc.QuantizationError, match="e2m1 codes, which the config does not describe"):
        amc.load_state_dict(tmp_path)


@pytest.mark.parametrize("first", [PER_TENSOR, PER_CHANNEL], ids=lambda spec: spec["qscheme"])
def test_keeping_codes_is_the_advice_for_schemes_that_are_not_decoded(tmp_path, first):
    quantized("", tmp_path, QUARK["mxfp4"], model())
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = config([first, weight("int4", "per_channel", ch_axis=0)])
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(amc.UnsupportedError, match="quark's fp8_e4m3 and int4 in sequence") as caught:
        amc.load_state_dict(tmp_path)
    assert "dequantize=False keeps codes and scales" in str(caught.value)
    assert_same(dict(amc.load_state_dict(tmp_path, rules=[], dequantize=False)), tensors_of(tmp_path))
