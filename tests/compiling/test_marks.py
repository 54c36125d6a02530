"""Tests of the layout that files name in their metadata and in their own names."""

import pytest
from torch import nn

from automodel_conv.compiling.marks import (
    layout_to_read,
    naming_like,
    naming_of_conversion,
    naming_of_save,
    stated_layout,
)
from automodel_conv.errors import CheckpointError, UnsupportedError
from automodel_conv.files.shards import DEFAULT_NAMING, LAYOUT_KEY, Naming
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import arranged_plan
from tests.compiling.support import Experts, Model, StatedExperts, table, tensors_of, write

EXPERTS = {"experts.gate_up_proj": (2, 6, 4), "experts.down_proj": (2, 4, 3)}
NEMO = {"experts.gate_and_up_projs": (2, 4, 6), "experts.down_projs": (2, 3, 4)}


def checkpoint_of(directory, layout=None, shapes=EXPERTS, file="model.safetensors"):
    metadata = {"format": "pt"} | ({} if layout is None else {LAYOUT_KEY: layout})
    return write(directory, tensors_of(shapes), file=file, metadata=metadata)


def plan_of(shapes, dtype="BF16") -> CopyPlan:
    return arranged_plan(table(shapes, dtype))


@pytest.mark.parametrize("layout", [*LAYOUTS, PER_EXPERT])
def test_metadata_states_the_layout(tmp_path, layout):
    checkpoint = checkpoint_of(tmp_path, layout)
    assert stated_layout(checkpoint, None) == layout
    assert stated_layout(checkpoint, layout) == layout


@pytest.mark.parametrize("file", ["nemo.safetensors", "nemo-00001-of-00002.safetensors"])
def test_name_of_a_file_states_the_layout_if_its_tensors_can_have_it(tmp_path, file):
    assert stated_layout(checkpoint_of(tmp_path, shapes=NEMO, file=file), None) == "nemo"
    assert stated_layout(checkpoint_of(tmp_path, shapes={"norm": (4,)}, file=file), None) is None
    assert stated_layout(checkpoint_of(tmp_path, shapes=NEMO, file="nemotron.safetensors"), None) is None


def test_without_a_mark_the_caller_decides(tmp_path):
    checkpoint = checkpoint_of(tmp_path)
    assert stated_layout(checkpoint, None) is None
    assert stated_layout(checkpoint, "gpt_oss") == "gpt_oss"


def test_files_that_contradict_the_caller_or_each_other_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match=r"'vllm'(.|\n)*gpt_oss(.|\n)*leave source_layout out"):
        stated_layout(checkpoint_of(tmp_path, "gpt_oss"), "vllm")
    with pytest.raises(CheckpointError, match=r"vllm, nemo|nemo, vllm"):
        stated_layout(checkpoint_of(tmp_path, "vllm", NEMO, "nemo.safetensors"), None)


@pytest.mark.parametrize("layout", ["megatron", ""])
def test_layout_that_is_not_known_is_quoted(tmp_path, layout):
    with pytest.raises(UnsupportedError, match=rf"{LAYOUT_KEY}: '{layout}'") as caught:
        stated_layout(checkpoint_of(tmp_path, layout), None)
    assert ("newer version" in str(caught.value)) == bool(layout)


def test_experts_that_keep_their_names_keep_their_layout(tmp_path):
    checkpoint = checkpoint_of(tmp_path, "gpt_oss")
    assert layout_to_read(checkpoint, None, keeps_names=False) == "gpt_oss"
    assert layout_to_read(checkpoint, None, keeps_names=True) is None
    assert layout_to_read(checkpoint_of(tmp_path, PER_EXPERT), None, keeps_names=False) is None


def test_copy_has_the_form_of_its_original(tmp_path):
    assert naming_like(checkpoint_of(tmp_path, "nemo", NEMO, "nemo.safetensors")) == Naming("nemo", "nemo")
    assert naming_like(checkpoint_of(tmp_path)) == DEFAULT_NAMING
    original = checkpoint_of(tmp_path, "nemo", NEMO, "nemo.safetensors")
    assert naming_of_save(plan_of(EXPERTS), None, None, original) == Naming("nemo", "nemo")


@pytest.mark.parametrize(
    ("layout", "dtype", "naming"),
    [
        ("transformers", "BF16", Naming("model", "transformers")),
        ("nemo", "BF16", Naming("nemo", "nemo")),
        ("transformers", "F8_E4M3", Naming("transformers", "transformers")),
        (PER_EXPERT, "BF16", Naming("model", PER_EXPERT)),
        (None, "BF16", Naming("model", "transformers")),
    ],
)
def test_files_that_transformers_cannot_load_have_another_name(tmp_path, layout, dtype, naming):
    model = Model(StatedExperts(2, 3, 4))
    assert naming_of_conversion(checkpoint_of(tmp_path), plan_of(EXPERTS, dtype), model, layout) == naming


def test_without_experts_no_layout_is_recorded(tmp_path):
    plan = plan_of({"weight": (2, 3)})
    assert naming_of_conversion(checkpoint_of(tmp_path), plan, nn.Linear(3, 2), "nemo") == DEFAULT_NAMING
    assert naming_of_save(plan, None, "nemo", None) == DEFAULT_NAMING


def test_save_records_the_layout_unless_transformers_knows_it():
    plan = plan_of(EXPERTS)
    assert naming_of_save(plan, Model(StatedExperts(2, 3, 4)), None, None) == DEFAULT_NAMING
    assert naming_of_save(plan, Model(Experts(2, 3, 4)), None, None) == Naming("model", None)
    assert naming_of_save(plan, None, "nemo", None) == Naming("model", "transformers")
    assert naming_of_save(plan, None, None, None, kept="vllm") == Naming("vllm", "vllm")
