"""Tests of the commands ``adapter convert``, ``adapter merge`` and ``adapter inspect``."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import automodel_conv
from automodel_conv.cli.adapter import weighted
from automodel_conv.upstream.registry import transformers_available
from tests.cli.support import run, value

needs_transformers = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")
PREFIX = "base_model.model."
RANK = 4


def tensors_in(directory):
    """Return the tensors of a checkpoint or an adapter; a dict is returned as it is."""
    if isinstance(directory, dict):
        return directory
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_adapter(base, directory, modules, *, rank=RANK, alpha=8):
    """Write a per-expert adapter for the modules of a checkpoint that contain one of these names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in tensors_in(base).items():
        module = name.removesuffix(".weight")
        if any(part in f"{module}." for part in modules):
            rows, columns = weight.shape
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                # Products of these have so few bits that a sum is rounded once in any precision.
                values = torch.randint(-4, 5, shape, generator=generator) / 4
                tensors[f"{PREFIX}{module}.lora_{part}.weight"] = values.to(torch.bfloat16)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({module.rstrip(".").rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merged(base, *adapters):
    """Return the tensors of a checkpoint with the deltas of adapters, each with a factor, computed in float64."""
    expected = {name: tensor.double() for name, tensor in tensors_in(base).items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors_in(base).items()}
    for directory, factor in adapters:
        matrices = tensors_in(directory)
        for name in [name for name in matrices if ".lora_A." in name]:
            target = name.removeprefix(PREFIX).replace(".lora_A", "")
            expected[target] += factor * (matrices[name.replace("_A.", "_B.")].double() @ matrices[name].double())
    return {name: tensor.to(dtypes[name]) for name, tensor in expected.items()}


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name].view(torch.int16), tensor.view(torch.int16)), name


def table_rows(stdout):
    """Return the cells of each row of a table by the first one."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stdout.splitlines() if line.startswith("│")]
    return {first: others for first, *others in rows}


@pytest.fixture
def adapter(moe, tmp_path):
    return write_adapter(moe, tmp_path / "adapter", [".gate_proj.", ".up_proj.", ".down_proj.", ".q_proj."])


@needs_transformers
def test_adapter_is_merged_and_the_report_counts_what_changed(moe, adapter, tmp_path):
    new = tmp_path / "new"
    result = run("adapter", "merge", moe, adapter, new, "--layout", "per_expert", "--max-shard-size", "30KB")
    assert result.exit_code == 0, result.output
    assert "read back and compared" in result.stdout
    assert value(result.stdout, "files") == str(len(list(new.glob("*.safetensors")))) != "1"
    same(tensors_in(new), merged(moe, (adapter, 2)))


@needs_transformers
def test_adapters_are_merged_with_their_weights(moe, adapter, tmp_path):
    other = write_adapter(moe, tmp_path / "a=b", [".down_proj.", ".o_proj."], rank=2, alpha=4)
    new = tmp_path / "new"
    options = ["--weight", "0.5", "--and", f"{other}=-0.25", "--layout", "per_expert"]
    result = run("adapter", "merge", moe, adapter, new, *options)
    assert result.exit_code == 0, result.output
    # Deltas that cancel leave an error of float32.
    expected = merged(moe, (adapter, 2 * 0.5), (other, 2 * -0.25))
    torch.testing.assert_close(tensors_in(new), expected, rtol=2**-8, atol=1e-6)


@needs_transformers
def test_converted_adapter_goes_back_to_the_first_bytes(moe, adapter, tmp_path):
    for source, new, layout, modules in (
        (adapter, tmp_path / "fused", "transformers", 2 * 3),
        (tmp_path / "fused", tmp_path / "served", "vllm", 2 * 3),
        (tmp_path / "served", tmp_path / "back", "per_expert", 2 * (3 * 3 + 1)),
    ):
        result = run("adapter", "convert", source, new, "--base", moe, "--layout", layout)
        assert result.exit_code == 0, result.output
        assert re.search(rf"^modules +{modules}$", result.stdout, re.MULTILINE)
        assert f"form {layout};" in run("adapter", "inspect", new, "--base", moe).stdout
    same(tensors_in(tmp_path / "back"), tensors_in(adapter))


@pytest.mark.parametrize(
    ("option", "key", "wanted"),
    [
        ([], "layout", None),
        (["--layout", "nemo"], "layout", "nemo"),
        (["--dtype", "float16"], "dtype", torch.float16),
        ([], "dequantize", False),
        (["--dequantize"], "dequantize", True),
        (["--max-shard-size", "1MB"], "max_shard_size", "1MB"),
        ([], "resume", True),
        (["--no-resume"], "resume", False),
        ([], "verify", True),
        (["--no-verify"], "verify", False),
        (["--checksums"], "checksums", True),
        (["--threads", "3"], "threads", 3),
        ([], "progress", False),
        (["--progress"], "progress", True),
        ([], "adapter", [("adapter", 1.0)]),
        (["--weight", "2"], "adapter", [("adapter", 2.0)]),
        (["--and", "b=.5", "--and", "c=1"], "adapter", [("adapter", 1.0), ("b", 0.5), ("c", 1.0)]),
    ],
)
def test_options_of_merge_are_passed_on(monkeypatch, option, key, wanted):
    seen = {}

    def merge(base, adapter, destination, **arguments):
        seen.update(arguments, adapter=adapter)
        raise automodel_conv.UnsupportedError("seen")

    monkeypatch.setattr("automodel_conv.merge_adapter", merge)
    assert run("adapter", "merge", "base", "adapter", "new", *option).stderr.startswith("error: seen\n")
    assert seen[key] == wanted


@needs_transformers
def test_inspect_prints_what_an_adapter_changes(moe, adapter, no_tensor_data):
    result = run("adapter", "inspect", adapter, "--base", moe)
    assert result.exit_code == 0, result.output
    rows = table_rows(result.stdout)
    for part in ("down_proj", "gate_proj", "up_proj"):
        assert rows[f"model.layers.*.mlp.experts.*.{part}"] == ["all 2", "all 3", "4", "2", "yes"]
    assert rows["model.layers.*.self_attn.q_proj"] == ["all 2", "-", "4", "2", "yes"]
    assert "20 modules, form per_expert" in result.stdout
    summary = json.loads(run("adapter", "inspect", adapter, "--base", moe, "--json").stdout)["result"]
    assert [row["experts"] for row in summary["rows"]] == [[0, 1, 2], [0, 1, 2], [0, 1, 2], []]
    assert summary["problems"] == []


@needs_transformers
def test_inspect_names_what_the_base_lacks_and_fails(moe, tmp_path):
    adapter = write_adapter(moe, tmp_path / "adapter", [".0.self_attn.q_proj."])
    tensors = tensors_in(adapter)
    for part, matrix in list(tensors.items()):
        tensors[part.replace("q_proj", "[/b]q_proj")] = matrix.clone()  # what rich would read as its markup
        tensors[part.replace("q_proj", "k_proj")] = matrix.clone()
    save_file(tensors, adapter / "adapter_model.safetensors")
    result = run("adapter", "inspect", adapter, "--base", moe)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    rows = table_rows(result.stdout)
    assert rows["model.layers.*.self_attn.q_proj"] == ["0 of 2", "-", "4", "2", "yes"]
    assert rows["model.layers.*.self_attn.[/b]q_proj"] == ["0", "-", "4", "2", "not in the base"]
    assert rows["model.layers.*.self_attn.k_proj"] == ["0", "-", "4", "2", "of another shape"]
    assert "2 of 3 modules would have no effect:" in result.stderr
    as_json = run("adapter", "inspect", adapter, "--base", moe, "--json")
    assert (as_json.exit_code, as_json.stderr) == (1, result.stderr)
    assert len(json.loads(as_json.stdout)["result"]["problems"]) == 2


@needs_transformers
def test_inspect_without_a_model_says_why_its_names_are_not_known(moe, adapter, tmp_path):
    fused, base = tmp_path / "fused", tmp_path / "base"
    assert run("adapter", "convert", adapter, fused, "--base", moe, "--layout", "vllm").exit_code == 0
    base.mkdir()
    for path in moe.glob("model*"):
        (base / path.name).symlink_to(path)
    result = run("adapter", "inspect", fused, "--base", base)
    assert result.exit_code == 1
    assert "4 of 6 modules would have no effect:" in result.stderr
    assert "names of the model are not known: the checkpoint has no config.json" in result.stderr


@pytest.mark.parametrize(("option", "shown"), [([], False), (["--progress"], True), (["--no-progress"], False)])
def test_options_of_convert_are_passed_on(monkeypatch, option, shown):
    seen = []
    monkeypatch.setattr("automodel_conv.convert_adapter", lambda *args, **options: seen.append((args, options)))
    result = run("adapter", "convert", "a", "new", "--base", "base", "--layout", "vllm", *option)
    assert result.exit_code == 0, result.output
    assert seen == [(("a", "new"), {"base": "base", "layout": "vllm", "progress": shown})]


@pytest.mark.parametrize("text", ["b", "b=", "=1", "b=half", "b=nan", "b=inf", ""])
def test_adapter_without_a_weight_is_refused_with_an_example(text):
    result = run("adapter", "merge", "base", "adapter", "new", "--and", text)
    assert result.exit_code == 2
    assert "--and" in result.stderr
    assert "other-adapter=0.3" in " ".join(result.stderr.replace("│", " ").split())


def test_error_of_a_merge_advises_options(tmp_path):
    base, codes = tmp_path / "base", torch.ones(4, 4).to(torch.float8_e4m3fn)
    base.mkdir()
    save_file({"a.weight": codes, "a.weight_scale_inv": torch.ones(1, 1)}, base / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (base / "config.json").write_text(json.dumps(config))
    adapter = write_adapter({"a.weight": codes}, tmp_path / "adapter", ["a."])
    result = run("adapter", "merge", base, adapter, tmp_path / "new")
    assert result.exit_code == 1
    assert "tensors that are quantized" in result.stderr
    assert "--dequantize decodes them first" in result.stderr
    assert run("adapter", "merge", base, adapter, tmp_path / "new", "--dequantize").exit_code == 0
    expected = codes.float() + merged({"a.weight": torch.zeros(4, 4)}, (adapter, 2))["a.weight"]
    assert torch.equal(tensors_in(tmp_path / "new")["a.weight"].float(), expected.bfloat16().float())


@needs_transformers
def test_adapter_that_cannot_be_fused_is_refused_with_advice(moe, tmp_path):
    adapter = write_adapter(moe, tmp_path / "adapter", [".0.mlp.experts.0.gate_proj.", ".0.mlp.experts.1.gate_proj."])
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"experts.1.gate_proj": 3}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    result = run("adapter", "convert", adapter, tmp_path / "new", "--base", moe, "--layout", "vllm")
    assert result.exit_code == 1
    assert "model.layers.0.mlp.experts.1.gate_proj" in result.stderr
    assert "merge it: automodel-conv adapter merge" in result.stderr


def test_unknown_form_is_refused_with_a_similar_one(plain, tmp_path):
    adapter = write_adapter(plain, tmp_path / "adapter", ["a."])
    result = run("adapter", "convert", adapter, tmp_path / "new", "--base", plain, "--layout", "per-expert")
    assert result.exit_code == 1
    assert "write 'per_expert'" in result.stderr


def test_weight_is_after_the_last_equals_sign():
    assert weighted("a=b/c=1e-1") == ("a=b/c", 0.1)


def test_interrupted_merge_is_reported(monkeypatch):
    def merge(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("automodel_conv.merge_adapter", merge)
    result = run("adapter", "merge", "base", "adapter", "new")
    assert result.exit_code == 130
    assert result.stderr == "interrupted: the same command continues with the unfinished files\n"


COMMANDS = {
    "convert": ["{adapter}", "{new}", "--base", "{base}", "--layout", "vllm"],
    "inspect": ["{adapter}", "--base", "{base}"],
    "merge": ["{base}", "{adapter}", "{new}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_error_of_an_adapter_is_printed_once_and_without_a_traceback(plain, tmp_path, command):
    places = {"adapter": tmp_path / "nothing", "base": plain, "new": tmp_path / "new"}
    result = run("adapter", command, *(word.format(**places) for word in COMMANDS[command]))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no such adapter\n  where:")
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "new").exists()
