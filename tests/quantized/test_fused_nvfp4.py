"""Tests of grouped experts in modelopt's NVFP4: transposed ones of Llama 4 and gpt-oss, and plain stacks."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs models of transformers")

from torch.distributed.tensor import Replicate, Shard
from transformers import GptOssConfig, GptOssForCausalLM, Llama4ForCausalLM, Llama4TextConfig

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import load_to_device
from automodel_conv.execution.host import load_to_host
from automodel_conv.planning.sharding import placed
from automodel_conv.testing import assert_bytes_equal
from tests.execution.simulated import SimulatedDevice
from tests.kernels.test_code_tables import rounded
from tests.model_zoo import fill, write_checkpoint
from tests.quantized.producers import modelopt_nvfp4
from tests.quantized.test_broken import assert_refused, edit, poisoned

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"vocab_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
CONFIG = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}


def llama4():
    config = Llama4TextConfig(**SIZES, intermediate_size=48, intermediate_size_mlp=64, moe_layers=[0, 1])
    return Llama4ForCausalLM._from_config(config, dtype=torch.bfloat16)


def gpt_oss():
    return GptOssForCausalLM._from_config(GptOssConfig(**SIZES, intermediate_size=48), dtype=torch.bfloat16)


MODELS = {"llama4": llama4, "gpt_oss": gpt_oss}
every_model = pytest.mark.parametrize("name", MODELS)


def transposed_nvfp4(weight):
    """Quantize a stack [E, in, out] as modelopt does: transposed, with one global scale, and transposed back."""
    experts, inputs, outputs = weight.shape
    stored, exact = modelopt_nvfp4(weight.mT.reshape(-1, inputs))
    turned = {k: v.unflatten(0, (experts, outputs)).mT.contiguous() if v.dim() else v for k, v in stored.items()}
    names = {"": "", "_scale": "_weight_scale", "_scale_2": "_weight_scale_2", ".input_scale": "_input_scale"}
    return {names[k]: v for k, v in turned.items()}, exact.unflatten(0, (experts, outputs)).mT.contiguous()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return the directories of checkpoints, and the exact values of their experts."""
    written = {}
    for name, build in MODELS.items():
        directory, model = tmp_path_factory.mktemp(name), build()
        fill(model)
        write_checkpoint(model, directory, 1 << 30)
        tensors, exact = load_file(directory / "model.safetensors"), {}
        for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            parts, exact[key] = transposed_nvfp4(tensors.pop(key))
            tensors |= {key + suffix: part for suffix, part in parts.items()}
        assert len(exact) == 4
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
        written[name] = directory, exact
    return written


@every_model
def test_transposed_experts_are_exact_values_rounded_once(published, name):
    directory, exact = published[name]
    model = MODELS[name]()
    report = amc.load_model(model, directory)
    assert report.missing_keys == report.unexpected_keys == ()
    for state in (amc.load_state_dict(directory), model.state_dict()):
        for key, values in exact.items():
            assert_bytes_equal(state[key], rounded(values.numpy(), torch.bfloat16))


@every_model
def test_they_are_decoded_on_a_device(published, name):
    directory, exact = published[name]
    checkpoint = amc.open_checkpoint(directory)
    plan = amc.compile_plan(checkpoint)
    buffers = allocate(plan.targets)
    limits = {"threads": 2, "scratch_bytes": 16384, "device_scratch_bytes": 1 << 16}
    load_to_device(plan, checkpoint, buffers, SimulatedDevice(0), backend="torch", **limits)
    for key, values in exact.items():
        assert_bytes_equal(buffers[key], rounded(values.numpy(), torch.bfloat16))


@pytest.mark.parametrize("layout", ["transformers", "nemo", "vllm"])
def test_they_load_in_every_layout_and_are_converted_to_it(tmp_path, published, layout):
    directory, _ = published["gpt_oss"]
    wanted = amc.load_state_dict(directory, layout=layout)
    plain = amc.load_state_dict(directory)
    expected = amc.convert_state_dict(dict(plain), rules=[], source_layout="gpt_oss", layout=layout)
    assert wanted.keys() == expected.keys()
    for key, tensor in wanted.items():
        assert_bytes_equal(tensor, expected[key])
    amc.convert_checkpoint(directory, tmp_path / "values", layout=layout, dequantize=True)
    for file in (tmp_path / "values").glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            assert_bytes_equal(tensor, wanted[key])


@every_model
@pytest.mark.parametrize("placements", [(Shard(0), Shard(1)), (Shard(2), Replicate())], ids=str)
def test_rank_decodes_its_part(published, name, placements):
    directory, exact = published[name]
    checkpoint = amc.open_checkpoint(directory)
    plan = amc.compile_plan(checkpoint)
    experts = [target for target in plan.targets if target.name in exact]
    for coordinate in itertools.product(range(3), range(2)):
        regions = {t.name: placed(t.shape, (3, 2), coordinate, placements) for t in experts}
        mine = plan.shard(regions)
        buffers = allocate(mine.targets)
        load_to_host(mine, checkpoint, buffers, threads=1)
        for target in experts:
            part = rounded(exact[target.name].numpy(), torch.bfloat16)
            for dim, runs in enumerate(regions[target.name].runs):
                index = [at for start, length in runs for at in range(start, start + length)]
                part = part.index_select(dim, torch.tensor(index, dtype=torch.int64))
            assert_bytes_equal(buffers[target.name], part)


@every_model
def test_codes_are_kept_only_as_they_are(tmp_path, published, name):
    directory, _ = published[name]
    amc.convert_checkpoint(directory, tmp_path / "kept", rules=[])
    stored, kept = load_file(directory / "model.safetensors"), load_file(tmp_path / "kept" / "model.safetensors")
    assert kept.keys() == stored.keys()
    for key, tensor in kept.items():
        assert_bytes_equal(tensor, stored[key])
    with pytest.raises(amc.UnsupportedError, match="codes of the format e2m1 cannot be rearranged"):
        amc.convert_checkpoint(directory, tmp_path / "nemo", layout="nemo")


DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{DOWN}_weight_scale"), f" or {DOWN}_weight_scale"),
        (lambda t: t.pop(f"{DOWN}_weight_scale_2"), f"{DOWN} has no global scale"),
        (
            lambda t: t.update({f"{DOWN}_weight_scale": t[f"{DOWN}_weight_scale"][:, :-1]}),
            f"{DOWN}_weight_scale of {DOWN} [4, 24, 64]: expected [4, 24, 4] or [4, 3, 32], found [4, 2, 32]",
        ),
        (lambda t: t.update({DOWN: t[DOWN][:, :8]}), "expected [4, 8, 4] or [4, 1, 32], found [4, 3, 32]"),
    ],
    ids=["scales", "global scale", "short", "codes cut off"],
)
def test_broken_parts_are_one_error(tmp_path, published, change, text):
    directory, _ = published["gpt_oss"]
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, change)
    assert_refused(tmp_path, poisoned(gpt_oss()), amc.QuantizationError, "1 problems", text)


@pytest.mark.parametrize("of_each", [True, False], ids=["a global scale of each", "one global scale"])
def test_stacks_of_one_orientation_are_not_transposed(tmp_path, of_each):
    """Check the files of Motif-3: codes [E, out, in / 2], scales [E, out, in / 16], global scales [E]."""
    stored, exact = modelopt_nvfp4(torch.randn(3, 32, 64))
    if not of_each:
        common = stored["_scale_2"][0]
        exact = exact / stored["_scale_2"].double()[:, None, None] * common.double()
        stored["_scale_2"] = common
    names = {"": "", "_scale": "_weight_scale", "_scale_2": "_weight_scale_2", ".input_scale": "_input_scale"}
    save_file({f"experts.up_proj{names[k]}": v.contiguous() for k, v in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    loaded = amc.load_state_dict(tmp_path, rules=[])
    assert loaded.keys() == {"experts.up_proj"}
    if of_each:
        assert_bytes_equal(loaded["experts.up_proj"], rounded(exact.numpy(), torch.bfloat16))
    else:
        torch.testing.assert_close(loaded["experts.up_proj"].double(), exact, rtol=2**-8, atol=0)


def test_single_matrices_are_never_transposed(tmp_path):
    stored, _ = modelopt_nvfp4(torch.randn(64, 128))
    parts = {"a.weight": stored[""], "a.weight_scale": stored["_scale"].t(), "a.weight_scale_2": stored["_scale_2"]}
    save_file({k: v.contiguous() for k, v in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    with pytest.raises(amc.QuantizationError, match=r"expected \[64, 8\], found \[8, 64\]"):
        amc.load_state_dict(tmp_path, rules=[])
