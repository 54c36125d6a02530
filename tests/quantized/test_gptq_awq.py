"""Tests of GPTQ and AWQ: every code under every zero point and kind of scale, models, layouts, shards, and errors."""

import importlib.util
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from shutil import copytree
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs models of transformers")

from torch.distributed.tensor import Replicate, Shard
from transformers import MixtralForCausalLM

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import load_to_device
from automodel_conv.execution.host import load_to_host
from automodel_conv.planning.sharding import placed
from automodel_conv.testing import assert_bytes_equal
from tests.execution.simulated import SimulatedDevice
from tests.kernels.test_code_tables import HARD, rounded
from tests.loopback_hub import serve, use
from tests.quantized.producers import awq, gptq, in_words
from tests.quantized.test_broken import assert_refused, edit, poisoned
from tests.quantized.test_models import quantized, small_mixtral

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PRODUCERS = {"gptq": gptq(32), "gptq_v2": gptq(16, "gptq_v2", symmetric=False), "awq": awq(32)}
every_method = pytest.mark.parametrize("method", PRODUCERS)
W2 = "model.layers.1.block_sparse_moe.experts.2.w2"


def every_combination(method, scale_dtype):
    """Return stored tensors with each code under each zero point and hard scale, and their exact values.

    Input feature ``i`` has code ``i``. An output feature has a zero point and a scale.
    """
    scales = torch.tensor([*HARD, 6e-8, 1e-7, 3e-5, 0.333, 1234.5, -0.75, 60000.0]).to(scale_dtype)
    scales = torch.cat([scales, torch.full((-len(scales) % 8,), 0.5, dtype=scale_dtype)])
    zeros, scales = torch.arange(16).repeat(len(scales)), scales.repeat_interleave(16)
    codes = torch.arange(16)[:, None].expand(16, len(zeros))
    with np.errstate(invalid="ignore"):
        exact = ((codes - zeros).double().numpy() * scales.double().numpy()).T
    if method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        stored = {"qweight": in_words(codes, order), "qzeros": in_words(zeros[None], order)}
    else:
        less = 0x11111111 if method == "gptq" else 0
        stored = {"qweight": in_words(codes.t()).t().contiguous(), "qzeros": in_words(zeros[None]) - less}
    return {f"a.{name}": tensor for name, tensor in (stored | {"scales": scales[None]}).items()}, exact


def write(directory, tensors, config):
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    return directory


@pytest.mark.parametrize("backend", ["host", "torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", PRODUCERS)
def test_every_code_under_every_zero_point_and_hard_scale_is_rounded_once(tmp_path, method, scale_dtype, backend):
    tensors, exact = every_combination(method, scale_dtype)
    config = dict(PRODUCERS[method].config) | {"group_size": 16}
    checkpoint = amc.open_checkpoint(write(tmp_path, tensors, config))
    for dtype in DTYPES if backend != "triton" else DTYPES[:1]:
        plan = amc.compile_plan(checkpoint, rules=[], dtype=dtype)
        buffers = poisoned_buffers(plan)
        if backend == "host":
            load_to_host(plan, checkpoint, buffers, threads=1)
        else:
            limits = {"threads": 1, "scratch_bytes": 1 << 17, "device_scratch_bytes": 1 << 19}
            load_to_device(plan, checkpoint, buffers, SimulatedDevice(0), backend=backend, **limits)
        assert_bytes_equal(buffers["a.weight"], rounded(np.ascontiguousarray(exact), dtype))


def poisoned_buffers(plan):
    buffers = allocate(plan.targets)
    for buffer in buffers.values():
        buffer.view(torch.uint8).fill_(0xA5)
    return buffers


@pytest.mark.parametrize("method", ["gptq", "gptq_v2"])
def test_zero_points_of_any_word_are_those_of_gptqmodel(tmp_path, method):
    """Check words whose addition carries from nibble to nibble, as it does in GPTQModel's conversion of version 1."""
    words = torch.randint(-(2**31), 2**31, (1, 64), generator=torch.Generator().manual_seed(0))
    words[0, :4] = torch.tensor([-1, 0, 0x0F0F0F0F, 0x7FFFFFFF])
    tensors = {
        "a.qweight": torch.zeros(1, 512, dtype=torch.int32),
        "a.qzeros": words.to(torch.int32),
        "a.scales": torch.ones(1, 512).half(),
    }
    config = dict(PRODUCERS[method].config) | {"group_size": 8}
    loaded = amc.load_state_dict(write(tmp_path, tensors, config), rules=[])["a.weight"]
    added = 0x11111111 if method == "gptq" else 0
    expected = [-((word + added) % 2**32 >> 4 * nibble & 15) for word in words[0].tolist() for nibble in range(8)]
    assert loaded[:, 0].tolist() == expected


@pytest.mark.parametrize(("rows", "columns", "group"), [(8, 8, 8), (8, 8, 128), (64, 64, 16), (8, 24, 16), (24, 8, 8)])
@pytest.mark.parametrize("make", [gptq, awq])
def test_square_single_and_cut_off_groups(tmp_path, make, rows, columns, group):
    stored, exact = make(group).make(torch.randn(rows, columns))
    tensors = {"a" + suffix: part.contiguous() for suffix, part in stored.items()}
    for scratch_bytes in (None, 20_000):
        loaded = amc.load_state_dict(
            write(tmp_path, tensors, make(group).config), rules=[], threads=1, scratch_bytes=scratch_bytes
        )
        assert_bytes_equal(loaded["a.weight"], rounded(exact.contiguous().numpy(), torch.float16))


class Published(NamedTuple):
    """A checkpoint that tests do not change."""

    path: Path
    exact: Mapping[str, torch.Tensor]
    loaded: Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory, written = tmp_path_factory.mktemp("published"), {}
    for method, producer in PRODUCERS.items():
        _, exact = quantized("mixtral", directory / method, producer, small_mixtral())
        written[method] = Published(directory / method, exact, amc.load_state_dict(directory / method))
    return written


@every_method
def test_models_are_exact_values_rounded_once(published, method):
    path, exact, loaded = published[method]
    model = small_mixtral()
    report = amc.load_model(model, path)
    assert report.missing_keys == report.unexpected_keys == ()
    for state in (loaded, model.state_dict()):
        for expert in range(4):
            source = f"model.layers.1.block_sparse_moe.experts.{expert}"
            parts = [exact[f"{source}.{name}.weight"].numpy() for name in ("w1", "w3", "w2")]
            experts = "model.layers.1.mlp.experts"
            gate_up, down = state[f"{experts}.gate_up_proj"], state[f"{experts}.down_proj"]
            assert_bytes_equal(gate_up[expert].clone(), rounded(np.concatenate(parts[:2]), gate_up.dtype))
            assert_bytes_equal(down[expert].clone(), rounded(np.ascontiguousarray(parts[2]), down.dtype))


@every_method
@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm"])
def test_experts_load_in_every_layout(published, method, layout):
    path, _, plain = published[method]
    wanted = amc.load_state_dict(path, layout=layout)
    expected = amc.convert_state_dict(dict(plain), rules=[], source_layout="transformers", layout=layout)
    assert wanted.keys() == expected.keys()
    for key, tensor in wanted.items():
        assert_bytes_equal(tensor, expected[key])


@pytest.mark.parametrize(("method", "layout"), [("gptq", "nemo"), ("awq", None)])
def test_files_of_values_have_no_quantization(tmp_path, published, method, layout):
    path = published[method].path
    wanted = amc.load_state_dict(path, layout=layout)
    options = {"layout": layout, "dequantize": True, "dtype": torch.bfloat16}
    amc.convert_checkpoint(path, tmp_path / "values", **options)
    assert "quantization_config" not in json.loads((tmp_path / "values" / "config.json").read_text())
    for file in (tmp_path / "values").glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            assert_bytes_equal(tensor, wanted[key])
    amc.verify_checkpoint(path, tmp_path / "values", **options)


@every_method
@pytest.mark.parametrize("placements", [(Shard(0), Shard(1)), (Shard(1), Shard(2)), (Shard(2), Replicate())], ids=str)
def test_rank_decodes_its_part(published, method, placements):
    path, _, whole = published[method]
    checkpoint = amc.open_checkpoint(path)
    plan = amc.compile_plan(checkpoint)
    experts = [t for t in plan.targets if t.name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    for coordinate in itertools.product(range(3), range(2)):
        regions = {t.name: placed(t.shape, (3, 2), coordinate, placements) for t in experts}
        mine = plan.shard(regions)
        buffers = poisoned_buffers(mine)
        load_to_host(mine, checkpoint, buffers, threads=2)
        for target in experts:
            part = whole[target.name]
            for dim, runs in enumerate(regions[target.name].runs):
                index = [at for start, length in runs for at in range(start, start + length)]
                part = part.index_select(dim, torch.tensor(index, dtype=torch.int64))
            assert_bytes_equal(buffers[target.name], part)


@every_method
def test_codes_are_kept_as_they_are_or_refused_in_other_layouts(tmp_path, published, method):
    path, _, loaded = published[method]
    stored = load_file(path / "model.safetensors")
    for kept in (
        amc.load_state_dict(path, rules=[], dequantize=False),
        _converted(path, tmp_path / "kept", rules=[]),
    ):
        assert kept.keys() == stored.keys()
        for key, tensor in kept.items():
            assert_bytes_equal(tensor, stored[key])
    assert "quantization_config" in json.loads((tmp_path / "kept" / "config.json").read_text())
    again = amc.load_state_dict(tmp_path / "kept")
    for key, tensor in loaded.items():
        assert_bytes_equal(again[key], tensor)
    with pytest.raises(amc.UnsupportedError, match=r"codes of the format int4 cannot be rearranged"):
        amc.convert_checkpoint(path, tmp_path / "nemo", layout="nemo")


def _converted(source, destination, **options):
    amc.convert_checkpoint(source, destination, **options)
    return {k: tensor for file in destination.glob("*.safetensors") for k, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def model():
    """Return a model that no test fills."""
    return poisoned(small_mixtral())


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{W2}.scales"), f"{W2}.qweight has no scale: no tensor is named {W2}.scales"),
        (lambda t: t.pop(f"{W2}.qzeros"), f"{W2}.weight has no zero points: no tensor is named {W2}.qzeros"),
        (lambda t: t.pop(f"{W2}.qweight"), f"{W2}.scales is a scale without codes: no tensor is named {W2}.qweight"),
        (
            lambda t: t.update({f"{W2}.scales": t[f"{W2}.scales"][:-1]}),
            f"{W2}.scales of {W2}.weight [64, 96]: expected",
        ),
        (lambda t: t.update({f"{W2}.scales": t[f"{W2}.scales"].t()}), f"{W2}.scales of {W2}.weight [64, 96]: "),
        (lambda t: t.update({f"{W2}.scales": t[f"{W2}.scales"].int()}), f"{W2}.scales is I32; these int4 codes have"),
        (lambda t: t.update({f"{W2}.qzeros": t[f"{W2}.qzeros"][:, :-1]}), f"{W2}.qzeros: expected I32 ["),
        (lambda t: t.update({f"{W2}.qweight": t[f"{W2}.qweight"][:1]}), f"{W2}.scales of {W2}.weight "),
        (lambda t: t.update({f"{W2}.weight": torch.zeros(64, 96)}), f"{W2}.weight is stored in addition to its codes"),
    ],
    ids=["scales", "zeros", "codes", "short", "transposed", "integers", "zeros cut off", "codes cut off", "twice"],
)
def test_broken_parts_are_one_error(tmp_path, published, model, method, change, text):
    copytree(published[method].path, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, change)
    assert_refused(tmp_path, model, amc.QuantizationError, "1 problems", text)


def test_groups_by_activation_order_are_refused(tmp_path, published, model):
    copytree(published["gptq"].path, tmp_path, dirs_exist_ok=True)
    index = f"{W2}.g_idx"

    def swap(tensors):
        tensors[index][[3, 40]] = tensors[index][[40, 3]]

    edit(tmp_path, swap)
    texts = ("groups by activation order", index, "element i is i // 32", "element 3 is 1")
    assert_refused(tmp_path, model, amc.UnsupportedError, *texts)
    with serve({"org/name": tmp_path}) as hub, pytest.MonkeyPatch.context() as patch:
        use(hub, tmp_path.with_name("cache of groups"), patch)
        amc.compile_plan("org/name", rules=[])  # headers do not record it
        with pytest.raises(amc.UnsupportedError, match="activation order"):
            amc.load_state_dict("org/name", rules=[])
    edit(tmp_path, lambda tensors: tensors.update({index: tensors[index][:-1]}))
    assert_refused(tmp_path, model, amc.UnsupportedError, index, "I32 [95]")
    edit(tmp_path, lambda tensors: tensors.pop(index))
    amc.load_model(small_mixtral(), tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_hook_leaves_codes_to_the_quantizer_of_transformers(published, method):
    """Check a load without GPTQModel, which transformers' quantizers need: its own error, with the hook or without."""
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.skip("GPTQModel is installed")
    path = published[method].path
    with pytest.raises(ImportError) as without:
        MixtralForCausalLM.from_pretrained(path)
    with amc.accelerate_transformers() as record, pytest.raises(ImportError, match=re.escape(str(without.value))):
        MixtralForCausalLM.from_pretrained(path)
    assert record.loads == []


def test_codes_without_their_config_are_refused(tmp_path, published):
    copytree(published["awq"].path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(amc.QuantizationError, match=r"\.qweight has the form of quantized codes"):
        amc.load_state_dict(tmp_path)


def test_tensors_of_other_checkpoints_with_these_names_stay_values(tmp_path):
    """Check floating ``.scales`` and integers of other names next to FP8 codes and without any codes."""
    others = {"norm.scales": torch.rand(8), "a.qzeros": torch.zeros(4), "a.qweight_ids": torch.arange(8).int()}
    save_file(others, tmp_path / "model.safetensors")
    loaded = amc.load_state_dict(tmp_path, rules=[])
    assert loaded.keys() == others.keys()
    codes = {"b.weight": torch.randn(4, 4).to(torch.float8_e4m3fn), "b.weight_scale_inv": torch.rand(1, 1)}
    write(tmp_path, others | codes, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    loaded = amc.load_state_dict(tmp_path, rules=[])
    assert loaded.keys() == others.keys() | {"b.weight"}
    for key, tensor in others.items():
        assert_bytes_equal(loaded[key], tensor)
