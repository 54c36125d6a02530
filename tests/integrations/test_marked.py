"""Tests of renamed files that state another layout of experts: refused under the hook instead of random experts."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="hooks functions of transformers")

from transformers import AutoModelForCausalLM

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.model_zoo import build_model, write_checkpoint


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    write_checkpoint(build_model("mixtral"), directory)
    return directory


def renamed(published, directory, layout, size="5GB"):
    """Convert a checkpoint, and rename its files to the names that transformers looks for."""
    amc.convert_checkpoint(published, directory, layout=layout, max_shard_size=size)
    for path in directory.glob(f"{layout}*"):
        text = path.read_text() if path.suffix == ".json" else None
        if text is not None:
            path.write_text(text.replace(f"{layout}-0", "model-0"))
        path.rename(path.with_name(path.name.replace(layout, "model", 1)))
    assert (directory / "model.safetensors").exists() or (directory / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("layout", ["nemo", "vllm", "gpt_oss"])
def test_renamed_files_in_another_layout_are_refused(published, tmp_path, layout, size):
    renamed(published, tmp_path / "made", layout, size)
    with amc.accelerate_transformers(), pytest.raises(amc.UnsupportedError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert f"cannot load experts in the layout '{layout}'" in str(error.value)
    assert f"expert_layout: {layout} in the metadata of the file" in str(error.value)
    assert 'convert_checkpoint(..., layout="per_expert")' in str(error.value)
    assert "load_model()" in str(error.value)


def test_the_advice_for_renamed_files_helps(published, tmp_path):
    renamed(published, tmp_path / "made", "nemo")
    expected = AutoModelForCausalLM.from_pretrained(published).state_dict()
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "back", layout="per_expert")
    with amc.accelerate_transformers() as done:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert done.loads[0].lowered
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(model.config)
    amc.load_model(other, tmp_path / "made")
    for name, tensor in expected.items():
        assert_bytes_equal(model.state_dict()[name], tensor)
        assert_bytes_equal(other.state_dict()[name], tensor)


@pytest.mark.parametrize("layout", [None, "transformers"])
def test_files_that_state_the_layout_of_the_model_are_loaded(published, tmp_path, layout):
    amc.convert_checkpoint(published, tmp_path / "made", layout=layout)
    expected = AutoModelForCausalLM.from_pretrained(published).state_dict()
    with amc.accelerate_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    for name, tensor in expected.items():
        assert_bytes_equal(model.state_dict()[name], tensor)


def test_a_model_without_experts_may_be_loaded_from_marked_files(published, tmp_path):
    """Check that a mark without experts in its layout does not matter."""
    shutil.copytree(published, tmp_path / "made")
    for path in (tmp_path / "made").glob("*.safetensors*"):
        path.unlink()
    from safetensors.torch import save_file

    tensors = {n: t for f in published.glob("*.safetensors") for n, t in amc.load_state_dict(f, rules=[]).items()}
    save_file(tensors, tmp_path / "made" / "model.safetensors", metadata={"format": "pt", "expert_layout": "nemo"})
    with amc.accelerate_transformers():
        AutoModelForCausalLM.from_pretrained(tmp_path / "made")
