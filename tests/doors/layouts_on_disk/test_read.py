"""Which layout files are read in: what they say, what is checked where they say nothing, and chains of layouts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="the types, and what they are compared with, are transformers'")
import transformers
from transformers import AutoConfig

import automodel_conv as amc
from automodel_conv.cli.app import app
from automodel_conv.files.shards import LAYOUT_KEY
from tests.comparing import assert_same
from tests.doors.layouts_on_disk.support import GROUPED, SIZES, TYPES, own_of, weights_in

STEM = re.compile(r"^[a-z_]+")


def without_marks(directory, rename=False):
    """Take out of files and index what says a layout, and with ``rename`` out of the files' names too."""
    files = sorted(Path(directory).glob("*.safetensors"))
    names = {path.name: STEM.sub("model", path.name) if rename else path.name for path in files}
    for path in files:
        tensors = load_file(path)
        path.unlink()
        save_file(tensors, path.with_name(names[path.name]), metadata={"format": "pt"})
    for path in Path(directory).glob("*.index.json"):
        index = json.loads(path.read_text())
        index["metadata"].pop(LAYOUT_KEY, None)
        index["weight_map"] = {name: names[file] for name, file in index["weight_map"].items()}
        path.unlink()
        path.with_name("model.safetensors.index.json" if rename else path.name).write_text(json.dumps(index))


def doors(directory, tmp_path):
    """Every door that reads a checkpoint whole, as functions of ``source_layout``."""
    from automodel_conv.integrations.dcp import HuggingFaceReader

    model = transformers.Qwen3MoeForCausalLM(AutoConfig.from_pretrained(directory)).bfloat16()
    return {
        "compile_plan": lambda **said: amc.compile_plan(directory, **said),
        "load_state_dict": lambda **said: amc.load_state_dict(directory, **said),
        "load_state_dict, not strict": lambda **said: amc.load_state_dict(directory, strict=False, **said),
        "load_model": lambda **said: amc.load_model(model, directory, **said),
        "HuggingFaceReader": lambda **said: HuggingFaceReader(directory, **said).read_metadata(),
        "to the model's": lambda **said: amc.convert_checkpoint(directory, tmp_path / "a", **said),
        "to nemo": lambda **said: amc.convert_checkpoint(directory, tmp_path / "b", layout="nemo", **said),
        "per expert": lambda **said: amc.convert_checkpoint(directory, tmp_path / "c", layout="per_expert", **said),
        "verify": lambda **said: amc.verify_checkpoint(directory, tmp_path / "other", layout="nemo", **said),
    }


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm"])
def test_an_unmarked_layout_is_one_error_that_names_source_layout_at_every_door(published, tmp_path, layout, sizes):
    source, tensors = published("qwen3_moe", sizes)
    amc.convert_checkpoint(source, tmp_path / "other", layout="nemo")
    amc.convert_checkpoint(source, tmp_path / "made", layout=layout)
    without_marks(tmp_path / "made", rename=True)
    for door in doors(tmp_path / "made", tmp_path).values():
        with pytest.raises(amc.UnsupportedError, match="source_layout="):
            door()
        door(source_layout=layout)
    assert_same(amc.load_state_dict(tmp_path / "made", source_layout=layout), tensors)


@pytest.mark.parametrize("said", ["transformers", "gpt_oss", "vllm", "per_expert"])
def test_a_source_layout_that_the_files_contradict_is_an_error(published, tmp_path, said):
    source, _ = published("qwen3_moe")
    amc.convert_checkpoint(source, tmp_path / "made", layout="nemo")
    with pytest.raises(amc.UnsupportedError, match="contradicts the checkpoint"):
        amc.load_state_dict(tmp_path / "made", source_layout=said)


def test_files_that_contradict_each_other_are_an_error(published, tmp_path):
    source, _ = published("qwen3_moe")
    amc.convert_checkpoint(source, tmp_path / "made", layout="nemo", max_shard_size="6KB")
    path = tmp_path / "made" / weights_in(tmp_path / "made")[0]
    save_file(load_file(path), path, metadata={LAYOUT_KEY: "vllm"})
    with pytest.raises(amc.CheckpointError, match="state different layouts"):
        amc.load_state_dict(tmp_path / "made")


def test_a_layout_of_a_later_version_is_named(published, tmp_path):
    source, _ = published("qwen3_moe")
    shutil.copytree(source, tmp_path / "made")
    path = tmp_path / "made" / weights_in(tmp_path / "made")[0]
    save_file(load_file(path), path, metadata={LAYOUT_KEY: "spiral"})
    with pytest.raises(amc.UnsupportedError, match=r"spiral[\s\S]*newer version"):
        amc.load_state_dict(tmp_path / "made")


@pytest.mark.parametrize("mark", ["", " "])
def test_an_empty_mark_is_told_as_one(published, tmp_path, mark):
    source, _ = published("qwen3_moe")
    shutil.copytree(source, tmp_path / "made")
    path = tmp_path / "made" / weights_in(tmp_path / "made")[0]
    save_file(load_file(path), path, metadata={LAYOUT_KEY: mark})
    with pytest.raises(amc.UnsupportedError, match=f"per_expert[\\s\\S]*{mark!r}[\\s\\S]*remove it") as error:
        amc.load_state_dict(tmp_path / "made")
    assert "newer version" not in str(error.value)


@pytest.mark.parametrize("layout", [*GROUPED, "per_expert"])
def test_a_missing_expert_is_an_error_in_every_layout(published, tmp_path, layout):
    source, _ = published("qwen3_moe")
    for number, form in enumerate((source, tmp_path / "grouped")):
        if number:
            amc.convert_checkpoint(source, form)
        less = tmp_path / f"less-{number}"
        shutil.copytree(form, less)
        tensors = {n: t for file in sorted(less.glob("*.safetensors")) for n, t in load_file(file).items()}
        for path in [*less.glob("*.safetensors"), *less.glob("*.index.json")]:
            path.unlink()
        for name in list(tensors):
            if ".experts.2." in name:
                del tensors[name]
            elif ".experts." in name and number:
                tensors[name] = tensors[name][:2].contiguous()
        save_file(tensors, less / "model.safetensors")
        with pytest.raises(amc.NameProblems, match="experts"):
            amc.convert_checkpoint(less, tmp_path / f"made-{number}", layout=layout)
        assert not (tmp_path / f"made-{number}").exists()


def test_rules_that_only_a_model_can_follow_are_named_before_the_layout(published):
    source, _ = published("qwen3_vl_moe")
    model_class = getattr(transformers, AutoConfig.from_pretrained(source).architectures[0])
    rules = amc.get_model_conversion_mapping(model_class.from_pretrained(source))
    with pytest.raises(amc.NameProblems, match="which only a model has"):
        amc.load_state_dict(source, rules=rules, layout="nemo")


def test_a_layout_that_changes_nothing_is_an_error(published, tmp_path):
    source, _ = published("qwen3_moe")
    for layout in GROUPED:
        with pytest.raises(amc.UnsupportedError, match="no tensor is in the layout"):
            amc.convert_checkpoint(source, tmp_path / "made", layout=layout, rules=[])
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "made"), "--no-model", "--layout", "nemo"])
    assert result.exit_code == 1
    assert not (tmp_path / "made").exists()
    amc.convert_checkpoint(source, tmp_path / "grouped")
    with pytest.raises(amc.UnsupportedError, match="no rule splits these experts"):
        amc.convert_checkpoint(tmp_path / "grouped", tmp_path / "made", layout="per_expert", rules=[])


steps = st.lists(
    st.tuples(
        st.sampled_from([*GROUPED, "per_expert", None]),
        st.booleans(),  # whether the next reader is told the layout
        st.sampled_from(["marked", "unmarked", "renamed"]),
    ),
    min_size=1,
    max_size=3,
)


def follow(source, tensors, model_type, chain, scratch):
    """Convert along a chain and load what is at its end; raises what the doors raise."""
    before, told = source, {}
    for number, (layout, tells, marks) in enumerate(chain):
        after = scratch / str(number)
        amc.convert_checkpoint(before, after, layout=layout, max_shard_size="6KB", verify=False, **told)
        if marks == "renamed" and (model_type, layout) == ("qwen3_vl_moe", "gpt_oss"):
            marks = "unmarked"  # renamed it is, to the last bit of its headers, what the type publishes
        if marks != "marked":
            without_marks(after, rename=marks == "renamed")
        said = own_of(model_type) if layout is None else layout
        before, told = after, {"source_layout": said} if tells else {}
    assert_same(amc.load_state_dict(before, **told), tensors)


def check_chain(published, tmp_path_factory, model_type, sizes, chain):
    source, tensors = published(model_type, sizes)
    scratch = tmp_path_factory.mktemp("chain")
    try:
        follow(source, tensors, model_type, chain, scratch)
    except amc.UnsupportedError as error:
        untold = any(marks != "marked" and not tells for _, tells, marks in chain)
        if not untold or "source_layout=" not in str(error):
            raise
    shutil.rmtree(scratch)


chains = given(model_type=st.sampled_from(TYPES), sizes=st.sampled_from(SIZES), chain=steps)
slow = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(slow, max_examples=25)
@chains
def test_any_chain_of_layouts_gives_the_first_bytes_or_an_error(published, tmp_path_factory, model_type, sizes, chain):
    check_chain(published, tmp_path_factory, model_type, sizes, chain)


@pytest.mark.long
@settings(slow, max_examples=600)
@chains
def test_many_chains_of_layouts_give_the_first_bytes_or_an_error(published, tmp_path_factory, model_type, sizes, chain):
    check_chain(published, tmp_path_factory, model_type, sizes, chain)
