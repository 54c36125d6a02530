"""From files to files: every layout against a hand-written oracle, and back to the bytes it began with."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import automodel_conv as amc
from automodel_conv import converting
from automodel_conv.errors import (
    CheckpointError,
    ConversionError,
    DestinationError,
    NameProblems,
    UnsupportedError,
    VerificationError,
    WriteError,
)
from automodel_conv.execution import writing
from automodel_conv.files import system
from automodel_conv.files.destination import Destination
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.testing import address_valued
from tests.comparing import assert_same, contents, tensors_of

try:
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    from tests.model_zoo import build_model, write_checkpoint
except ModuleNotFoundError:
    build_model = None

needs_transformers = pytest.mark.skipif(build_model is None, reason="transformers is not installed")
STAGES = ("transformers", "nemo", "gpt_oss", "vllm", "per_expert")


# --- the oracle: stack, cat and transpose, a layer at a time ----------------------------------------------------------

RENAMED = {
    "mixtral": [(".block_sparse_moe.", ".mlp.")],
    "nemotron_h": [("backbone.", "model."), ("embedding.", "embeddings.")],  # some releases write the latter
}
ROLES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
GROUPED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias|)")


def taken_apart(name, published):
    """``{module: {role: stacked tensor}}`` of the experts, and all other tensors; both under the model's names."""
    experts, others = {}, {}
    for key, tensor in published.items():
        for before, after in RENAMED.get(name, ()):
            key = key.replace(before, after)
        if match := EXPERT.fullmatch(key):
            path, number, projection = match.groups()
            experts.setdefault(path, {}).setdefault(ROLES[projection], {})[int(number)] = tensor
        elif match := GROUPED.fullmatch(key):  # as gpt_oss publishes them: in, out; gate and up in turn
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


def in_turn(gate, up):
    """Rows of gate and up alternating, ``[E, 2I, ...]``."""
    return torch.stack([gate, up], 2).flatten(1, 2)


def laid_out(name, published, layout):
    """What a conversion of a published checkpoint to a layout gives."""
    experts, made = taken_apart(name, published)
    for path, roles in experts.items():
        for bias in ("", "_bias"):
            if "up" + bias not in roles:
                continue
            first, gated = roles["up" + bias], "gate" + bias in roles
            if gated:
                join = in_turn if layout == "gpt_oss" else lambda gate, up: torch.cat([gate, up], 1)
                first = join(roles["gate" + bias], first)
            down = roles["down" + bias]
            if layout in ("nemo", "gpt_oss") and not bias:
                first, down = first.transpose(1, 2), down.transpose(1, 2)
            names = ("gate_up_proj" if gated else "up_proj") + bias, "down_proj" + bias
            if layout == "vllm":
                names = ("w13_bias", "w2_bias") if bias else ("w13_weight", "w2_weight")
            if layout == "nemo":
                names = ("gate_up_proj_bias", "down_proj_bias") if bias else ("gate_and_up_projs", "down_projs")
            made[f"{path}.{names[0]}"], made[f"{path}.{names[1]}"] = first.contiguous(), down.contiguous()
    return made


# --- every layout, one after the other --------------------------------------------------------------------------------


@needs_transformers
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "nemotron_h", "gpt_oss"])
def test_layouts_one_after_the_other_equal_the_oracle_and_end_where_they_began(name, tmp_path):
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
def test_the_layout_of_the_model_is_loaded_by_upstream(name, tmp_path):
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


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small mixtral as it is published, in several files."""
    if build_model is None:
        pytest.skip("transformers is not installed")
    directory = tmp_path_factory.mktemp("published")
    write_checkpoint(build_model("mixtral"), directory)
    return directory


@needs_transformers
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("layout", [None, "nemo", "per_expert"])
def test_dtypes_stay_or_become_the_wanted_one_but_for_what_the_model_keeps_in_float32(tmp_path, dtype, layout):
    model = build_model("deepseek_v3")
    write_checkpoint(model, tmp_path / "published")
    amc.convert_checkpoint(tmp_path / "published", tmp_path / "grouped", layout=None)
    source = "grouped" if layout == "per_expert" else "published"
    amc.convert_checkpoint(tmp_path / source, tmp_path / "made", layout=layout, dtype=dtype)
    tensors = tensors_of(tmp_path / "published")
    expected = tensors if layout == "per_expert" else laid_out("deepseek_v3", tensors, layout or "transformers")
    kept = [name for name in expected if name.endswith("e_score_correction_bias")]
    assert {expected[name].dtype for name in kept} == {torch.float32}
    if dtype is not None:
        expected = {name: t if name in kept else t.to(dtype) for name, t in expected.items()}
    assert_same(tensors_of(tmp_path / "made"), expected)


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", ["published", "grouped"])
def test_a_dtype_asks_the_model_for_its_own_names_of_what_is_published(tmp_path, source, dtype):
    """DeepSeek-V4 keeps norms and much else in float32, and publishes hardly any of it under the model's names."""
    write_checkpoint(build_model("deepseek_v4"), tmp_path / "published", 1 << 30)
    file = tmp_path / "published" / "model.safetensors"
    wide = {n: t.float() if t.is_floating_point() else t for n, t in load_file(file).items()}
    save_file(wide, file, metadata={"format": "pt"})
    if source == "grouped":
        amc.convert_checkpoint(tmp_path / "published", tmp_path / "grouped", dtype=torch.float32)
    amc.convert_checkpoint(tmp_path / source, tmp_path / "made", layout="per_expert", dtype=dtype)
    made = tensors_of(tmp_path / "made")
    assert made.keys() == wide.keys()
    model = type(build_model("deepseek_v4")).from_pretrained(tmp_path / "published", dtype=dtype)
    model.save_pretrained(tmp_path / "upstream")
    assert_same(made, tensors_of(tmp_path / "upstream"))
    assert {made[n].dtype for n in made if n.endswith(("attn_norm.weight", "hc_base"))} == {torch.float32}
    amc.save_checkpoint(model, tmp_path / "saved", dtype=dtype)
    assert_same(tensors_of(tmp_path / "saved"), made)


def test_dtypes_that_the_config_does_not_say_stay(tmp_path):
    """A checkpoint whose tensors have other dtypes than its config says: nothing is cast unless asked for."""
    if build_model is None:
        pytest.skip("transformers is not installed")
    write_checkpoint(build_model("mixtral"), tmp_path / "bf16")
    amc.convert_checkpoint(tmp_path / "bf16", tmp_path / "f16", rules=[], dtype=torch.float16)
    assert json.loads((tmp_path / "f16" / "config.json").read_text())["dtype"] == "bfloat16"
    amc.convert_checkpoint(tmp_path / "f16", tmp_path / "made")
    expected = laid_out("mixtral", tensors_of(tmp_path / "f16"), "transformers")
    assert {tensor.dtype for tensor in expected.values()} == {torch.float16}
    assert_same(tensors_of(tmp_path / "made"), expected)


@needs_transformers
def test_what_lies_beside_the_weights_is_copied_and_nothing_else(published, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(published, source)
    beside = {"tokenizer.json": b"{}", "modeling_own.py": b"# code", "README.md": b"\xff\x00"}
    beside |= {"original/params.json": b"{}", "additional_chat_templates/tool_use.jinja": b"{{ x }}", "a/b/c/d": b""}
    beside |= {"lock": b"1", "journal.jsonl": b"2", "beside": b"3"}  # as files of an unfinished work are called
    no = ("model.gguf", "pytorch_model.bin", ".hidden", "stray.safetensors", "original/consolidated.pth", ".git/x")
    for name, content in (beside | dict.fromkeys(no, b"no")).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    made = source / "made"
    report = amc.convert_checkpoint(source, made, layout="nemo")
    found = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    configs = {name: (published / name).read_bytes() for name in ("config.json", "generation_config.json")}
    assert {name: data for name, data in found.items() if name not in report.files} == beside | configs
    assert report.files_copied == tuple(sorted(beside | configs))


@needs_transformers
def test_nothing_lies_beside_one_file(published, tmp_path):
    file = next(published.glob("*.safetensors"))
    report = amc.convert_checkpoint(file, tmp_path / "made", rules=[])
    assert report.files_copied == ()
    assert {path.name for path in (tmp_path / "made").iterdir()} == set(report.files)


def plain():
    """Tensors that no model has, in dtypes that nothing casts among others."""
    return {
        "z.weight": address_valued((40, 30), torch.bfloat16),
        "a.scale": address_valued((), torch.float32, 7),
        "codes": address_valued((17, 3), torch.uint8, 9),
        "fp8": address_valued((9, 5), torch.float8_e4m3fn, 1),
        "empty": torch.empty(0, 4),
    }


@pytest.fixture
def saved(tmp_path):
    amc.save_checkpoint(plain(), tmp_path / "saved", rules=[], max_shard_size=1500)
    return tmp_path / "saved"


def test_without_rules_all_names_stay_and_only_files_change(saved, tmp_path):
    report = amc.convert_checkpoint(saved, tmp_path / "made", rules=[])
    assert report.files == ("model.safetensors",)
    assert_same(tensors_of(tmp_path / "made"), plain())
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "back", rules=[], max_shard_size=50)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 3
    assert_same(tensors_of(tmp_path / "back"), plain())


def test_without_rules_a_dtype_casts_only_floats(saved, tmp_path):
    amc.convert_checkpoint(saved, tmp_path / "made", rules=[], dtype=torch.float64)
    floating = {"z.weight", "a.scale", "empty"}
    expected = {n: t.double() if n in floating else t for n, t in plain().items()}
    assert_same(tensors_of(tmp_path / "made"), expected)
    amc.verify_checkpoint(saved, tmp_path / "made", rules=[], dtype=torch.float64)


@pytest.mark.parametrize("source", ["directory", "index", "file"])
def test_a_source_is_whatever_can_be_opened(tmp_path, source):
    amc.save_checkpoint(plain(), tmp_path / "saved", rules=[], max_shard_size=1500 if source == "index" else "5GB")
    path = tmp_path / "saved"
    path = {
        "directory": path,
        "index": path / "model.safetensors.index.json",
        "file": path / "model.safetensors",
    }[source]
    amc.convert_checkpoint(str(path) if source == "directory" else path, tmp_path / "made", rules=[])
    assert_same(tensors_of(tmp_path / "made"), plain())


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
    tensors = {}  # none of them NaN, which casts change
    for n, (e, w) in enumerate((e, w) for e in range(3) for w in ("w1", "w2", "w3")):
        shape = (150, 200) if w != "w2" else (200, 150)
        tensors[f"experts.{e}.{w}.weight"] = address_valued(shape, torch.bfloat16, 250 * n)
    amc.save_checkpoint(tensors, tmp_path / "saved", rules=[])
    options = {"rules": merging(), "layout": layout, "dtype": dtype}
    report = amc.convert_checkpoint(
        tmp_path / "saved", tmp_path / "made", scratch_bytes=1 << 16, threads=threads, **options
    )
    assert report.peak_extra_bytes <= 1 << 16
    expected = laid_out("", {f"m.{name}": tensor for name, tensor in tensors.items()}, layout)
    expected = {name.removeprefix("m."): t if dtype is None else t.to(dtype) for name, t in expected.items()}
    assert_same(tensors_of(tmp_path / "made"), expected)
    back = {"rules": merging(), "layout": "per_expert", "source_layout": layout, "dtype": torch.bfloat16}
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "back", scratch_bytes=1 << 16, threads=threads, **back)
    assert_same(tensors_of(tmp_path / "back"), tensors)


def test_where_the_kernel_cannot_copy_the_bytes_are_the_same(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "copy_range", lambda *arguments: 0)
    amc.convert_checkpoint(saved, tmp_path / "made", rules=[])
    assert_same(tensors_of(tmp_path / "made"), plain())


@pytest.mark.parametrize("verify", [True, False])
def test_progress_counts_all_bytes(saved, tmp_path, capsys, verify):
    amc.convert_checkpoint(saved, tmp_path / "made", rules=[], verify=verify, progress=True)
    assert "converting: 100%" in capsys.readouterr().err


# --- what is refused, before anything is written ----------------------------------------------------------------------


def refused(source, destination, error, text, **options):
    with pytest.raises(error, match=text):
        amc.convert_checkpoint(source, destination, **options)
    assert not destination.exists() or not list(destination.iterdir())


@needs_transformers
def test_what_only_upstreams_own_code_can_make_is_refused(published, tmp_path, monkeypatch):
    stock = MergeModulelist.convert
    monkeypatch.setattr(MergeModulelist, "convert", lambda self, *args, **kwargs: stock(self, *args, **kwargs))
    text = r"only transformers' own code can convert 6 tensors(.|\n)*experts\.(.|\n)*load the model and save it"
    refused(published, tmp_path / "made", UnsupportedError, text)


@needs_transformers
def test_a_source_that_does_not_fit_its_model_is_refused(published, tmp_path):
    tensors = tensors_of(published)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(published / "config.json", tmp_path)
    refused(tmp_path, tmp_path / "made", NameProblems, r"layers\.1\.(.|\n)*experts\.3\.w1")


def test_a_source_without_a_config_is_refused_without_rules(saved, tmp_path):
    if build_model is None:
        pytest.skip("transformers is not installed")
    refused(saved, tmp_path / "made", UnsupportedError, r"no config\.json")


@pytest.mark.parametrize("options", [{"layout": "grouped"}, {"source_layout": "grouped"}])
def test_an_unknown_layout_is_refused(saved, tmp_path, options):
    refused(saved, tmp_path / "made", UnsupportedError, "unknown layout 'grouped'", rules=[], **options)


@pytest.mark.parametrize("options", [{"threads": 0}, {"scratch_bytes": 1000}])
def test_impossible_options_are_refused(saved, tmp_path, options):
    refused(saved, tmp_path / "made", ConversionError, "scratch_bytes >=", rules=[], **options)


def test_other_wrong_arguments_are_refused(saved, tmp_path):
    refused(saved, tmp_path / "made", UnsupportedError, "not a size", rules=[], max_shard_size="5 apples")
    refused(saved, tmp_path / "made", UnsupportedError, "floating torch dtype", rules=[], dtype=torch.int8)
    refused(tmp_path / "nowhere", tmp_path / "made", CheckpointError, "nowhere", rules=[])


def test_a_disk_with_too_little_room_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "free_bytes", lambda directory: 100)
    with pytest.raises(WriteError, match=r"too little room(.|\n)*bytes for 1 files(.|\n)*100"):
        amc.convert_checkpoint(saved, tmp_path / "made", rules=[])
    assert not list((tmp_path / "made").glob("*.safetensors"))


# --- verifying --------------------------------------------------------------------------------------------------------


def flip(directory, name, element, byte=0):
    """Change a bit of one element of a tensor on the disk."""
    checkpoint = amc.open_checkpoint(directory)
    row = checkpoint.position[name]
    path = Path(checkpoint.files[checkpoint.file_ids[row]])
    data = bytearray(path.read_bytes())
    size = checkpoint.nbytes[row] // max(1, torch.Size(checkpoint.shapes[row]).numel())
    data[checkpoint.offsets[row] + element * size + byte] ^= 4
    path.write_bytes(data)


def test_equal_checkpoints_verify_however_they_are_divided(saved, tmp_path):
    for n, size in enumerate((10, 100, 3000, "5GB")):
        amc.convert_checkpoint(saved, tmp_path / str(n), rules=[], max_shard_size=size)
        assert amc.verify_checkpoint(saved, tmp_path / str(n)) == sum(t.nbytes for t in plain().values())
        assert amc.verify_checkpoint(tmp_path / str(n), saved, threads=1, scratch_bytes=1 << 16) > 0


def test_files_whose_data_is_not_aligned_verify(saved, tmp_path):
    """Others write headers of any length; elements then lie at odd bytes."""
    amc.convert_checkpoint(saved, tmp_path / "made", rules=[], dtype=torch.float32)
    [file] = (tmp_path / "made").glob("*.safetensors")
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes((length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :])
    assert amc.verify_checkpoint(saved, tmp_path / "made", rules=[], dtype=torch.float32) > 0
    flip(tmp_path / "made", "z.weight", 31)
    with pytest.raises(VerificationError, match=r"z\.weight(.|\n)*\[1, 1\] of F32 \[40, 30\]"):
        amc.verify_checkpoint(saved, tmp_path / "made", rules=[], dtype=torch.float32)


@pytest.mark.parametrize("division", [100, "5GB"])
@pytest.mark.parametrize(
    ("name", "element", "byte", "text"),
    [
        ("z.weight", 0, 0, r"\[0, 0\] of BF16 \[40, 30\]"),
        ("z.weight", 0, 1, r"\[0, 0\] of BF16 \[40, 30\]"),
        ("z.weight", 1199, 1, r"\[39, 29\] of BF16 \[40, 30\]"),
        ("z.weight", 64, 0, r"\[2, 4\] of BF16 \[40, 30\]"),
        ("a.scale", 0, 3, r"\[0\] of F32 \[\]"),
        ("codes", 50, 0, r"\[16, 2\] of U8 \[17, 3\]"),
        ("fp8", 7, 0, r"\[1, 2\] of F8_E4M3 \[9, 5\]"),
    ],
)
def test_the_first_element_that_differs_is_named(saved, tmp_path, division, name, element, byte, text):
    amc.convert_checkpoint(saved, tmp_path / "made", rules=[], max_shard_size=division)
    flip(tmp_path / "made", name, element, byte)
    for scratch_bytes in (1 << 16, None):
        with pytest.raises(VerificationError, match=rf"{re.escape(name)} is not what the source(.|\n)*{text}"):
            amc.verify_checkpoint(saved, tmp_path / "made", scratch_bytes=scratch_bytes)


@needs_transformers
@pytest.mark.parametrize("layout", ["transformers", "gpt_oss"])
def test_a_difference_in_grouped_experts_is_named_by_its_place_in_them(published, tmp_path, layout):
    amc.convert_checkpoint(published, tmp_path / "made", layout=layout)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    _, rows, columns = tensors_of(tmp_path / "made")[name].shape
    flip(tmp_path / "made", name, (5 * rows + 7) * columns + 11)
    with pytest.raises(VerificationError, match=rf"{re.escape(name)}(.|\n)*\[5, 7, 11\] of BF16"):
        amc.verify_checkpoint(published, tmp_path / "made", layout=layout)
    flip(tmp_path / "made", name, 3)
    with pytest.raises(VerificationError, match=r"\[0, 0, 3\] of BF16"):
        amc.verify_checkpoint(published, tmp_path / "made", layout=layout)


@needs_transformers
def test_a_difference_in_the_source_is_found_too(published, tmp_path):
    shutil.copytree(published, tmp_path / "source")
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout="nemo")
    flip(tmp_path / "source", "model.layers.2.block_sparse_moe.experts.4.w3.weight", 0)
    text = r"layers\.2\.mlp\.experts\.gate_and_up_projs(.|\n)*\[4, 0, 44\]"
    with pytest.raises(VerificationError, match=text):
        amc.verify_checkpoint(tmp_path / "source", tmp_path / "made", layout="nemo")


def test_all_tensors_that_differ_in_name_dtype_or_shape_are_listed(saved, tmp_path):
    tensors = plain()
    tensors["codes"] = tensors["codes"].to(torch.int8)
    tensors["z.weight"] = tensors["z.weight"].t().contiguous()
    tensors["new"] = tensors.pop("a.scale")
    amc.save_checkpoint(tensors, tmp_path / "other", rules=[])
    with pytest.raises(VerificationError, match="4 tensors differ") as error:
        amc.verify_checkpoint(saved, tmp_path / "other", rules=[])
    for line in (
        "a.scale: missing",
        "new: not in the source",
        "codes: I8 [17, 3] instead of U8 [17, 3]",
        "z.weight: BF16 [30, 40] instead of BF16 [40, 30]",
    ):
        assert line in str(error.value)


@needs_transformers
def test_two_checkpoints_with_the_same_names_are_compared_as_they_are(published, tmp_path):
    shutil.copytree(published, tmp_path / "copy")
    assert amc.verify_checkpoint(published, tmp_path / "copy") == sum(t.nbytes for t in tensors_of(published).values())
    amc.convert_checkpoint(published, tmp_path / "grouped")
    assert amc.verify_checkpoint(published, tmp_path / "grouped") > 0
    with pytest.raises(VerificationError, match="differ in name"):
        amc.verify_checkpoint(published, tmp_path / "grouped", rules=[])


@needs_transformers
def test_what_is_left_of_a_checkpoint_is_compared_as_it_is(published, tmp_path):
    source, made = tmp_path / "source", tmp_path / "made"
    shutil.copytree(published, source)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors_of(published) | {"mtp.norm": torch.ones(3)}, source / "model.safetensors")
    amc.convert_checkpoint(source, made, rules=[], drop=["mtp.*"])
    assert amc.verify_checkpoint(source, made, drop=["mtp.*"]) == sum(t.nbytes for t in tensors_of(published).values())
    with pytest.raises(VerificationError):
        amc.verify_checkpoint(source, made)


def test_a_conversion_that_writes_a_wrong_byte_says_so_and_is_no_checkpoint(saved, tmp_path, monkeypatch):
    real = writing.write_exactly

    def write_exactly(fd, views, offset, path):
        views = [bytearray(view) for view in views]
        if offset and ".safetensors" in path:
            views[-1][-1] ^= 1
        real(fd, [memoryview(view) for view in views], offset, path)

    monkeypatch.setattr(system, "copy_range", lambda *arguments: 0)
    monkeypatch.setattr(writing, "write_exactly", write_exactly)
    with pytest.raises(VerificationError, match="is not what the source makes it"):
        amc.convert_checkpoint(saved, tmp_path / "made", rules=[])
    assert not list((tmp_path / "made").glob("*.safetensors*"))
    with pytest.raises(CheckpointError):
        amc.open_checkpoint(tmp_path / "made")
    amc.convert_checkpoint(saved, tmp_path / "unverified", rules=[], verify=False)
    with pytest.raises(VerificationError):
        amc.verify_checkpoint(saved, tmp_path / "unverified")


def test_default_scratch_and_files_are_those_of_the_documentation(saved, tmp_path):
    report = amc.convert_checkpoint(saved, tmp_path / "made", rules=[])
    assert report.peak_extra_bytes <= converting.DEFAULT_SCRATCH_BYTES == 256 << 20
    with safe_open(tmp_path / "made" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# --- called again when it is complete ---------------------------------------------------------------------------------


@pytest.fixture
def complete(tmp_path):
    """A source, and what the conversion of it to float32 and other files has made."""
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    save_file(plain(), source / "model.safetensors")
    (source / "config.json").write_text("{}")
    amc.convert_checkpoint(source, made, rules=[], max_shard_size="300B")
    return source, made


def again(source, made, **options):
    return amc.convert_checkpoint(source, made, **{"rules": [], "max_shard_size": "300B", **options})


@pytest.mark.parametrize("verify", [True, False])
def test_a_complete_conversion_called_again_compares_and_writes_nothing(complete, verify):
    before = {path: path.stat().st_mtime_ns for path in complete[1].iterdir()}
    report = again(*complete, verify=verify)
    assert report.was_complete
    assert report.bytes_written == 0
    assert report.files_resumed == len(report.files) > 1
    assert {path: path.stat().st_mtime_ns for path in complete[1].iterdir()} == before


@pytest.mark.parametrize(
    "options",
    [{"resume": False}, {"dtype": torch.float32}, {"max_shard_size": "5GB"}, {"drop": ["codes"]}, {"checksums": True}],
    ids=str,
)
def test_other_options_are_refused_by_a_complete_conversion(complete, options):
    before = contents(complete[1])
    with pytest.raises(DestinationError, match="holds a checkpoint already"):
        again(*complete, **options)
    assert contents(complete[1]) == before


def test_another_source_is_refused_by_a_complete_conversion(complete):
    source, made = complete
    before = contents(made)
    other = plain()
    other["codes"][-1, -1] += 1
    save_file(other, source / "model.safetensors")
    with pytest.raises(DestinationError, match="not what this conversion makes") as told:
        again(source, made)
    assert "codes" in str(told.value)
    assert contents(made) == before


@pytest.mark.parametrize("change", ["a config", "an index", "one byte", "a file more", "a file less", "a header"])
def test_what_was_changed_after_a_conversion_is_refused(complete, change):
    source, made = complete
    shard = sorted(made.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    if change == "a config":
        (made / "config.json").write_text("{ }")
    elif change == "an index":
        index = made / "model.safetensors.index.json"
        index.write_text(index.read_text() + "\n")
    elif change == "a file more":
        (made / "model.safetensors").write_bytes(bytes(data))
    elif change == "a file less":
        shard.unlink()
    else:
        data[-1 if change == "one byte" else 9] ^= 1
        shard.write_bytes(bytes(data))
    before = contents(made)
    with pytest.raises(DestinationError):
        again(source, made)
    assert contents(made) == before


def test_a_complete_conversion_of_one_file_and_of_nothing_beside_it_is_known(tmp_path):
    save_file({"a": torch.ones(3), "empty": torch.ones(0, 4)}, tmp_path / "one.safetensors")
    for expected in (False, True):
        assert again(tmp_path / "one.safetensors", tmp_path / "made").was_complete is expected


def test_a_conversion_onto_its_own_source_is_refused_by_whatever_path_it_is_called(complete, tmp_path):
    made = complete[1]
    (tmp_path / "link").symlink_to(made)
    before = contents(made)
    for place in (made, tmp_path / "link", f"{made}/../{made.name}/"):
        with pytest.raises(DestinationError, match="holds a checkpoint already"):
            again(made, place)
    assert contents(made) == before


def test_a_change_of_either_of_two_source_files_of_one_name_is_noticed(tmp_path, monkeypatch):
    source = tmp_path / "source"
    for folder in ("a", "b"):
        (source / folder).mkdir(parents=True)
        save_file({folder: torch.ones(3)}, source / folder / "x.safetensors")
    weight_map = {folder: f"{folder}/x.safetensors" for folder in ("a", "b")}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def stop(*arguments):
        raise KeyboardInterrupt

    for folder in ("a", "b"):
        made = tmp_path / f"made {folder}"
        with monkeypatch.context() as patch:
            patch.setattr(Destination, "commit", stop)
            with pytest.raises(KeyboardInterrupt):
                again(source, made)
        os.utime(source / folder / "x.safetensors", ns=(1, 2 * 10**18))
        with pytest.raises(DestinationError, match=f"source files, {folder}/x.safetensors"):
            again(source, made)
