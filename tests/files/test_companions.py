"""Tests of ``companions_of``: which files accompany the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from automodel_conv.files.companions import companions_of, is_companion
from automodel_conv.files.staging import STAGING_NAME

# Names in published repositories.
GO = """
    config.json generation_config.json tokenizer.json tokenizer.model spiece.model merges.txt qwen.tiktoken
    chat_template.jinja additional_chat_templates/tool_use.jinja LICENSE README.md Makefile modeling_own.py
    original/params.json original/tokenizer.model inference/kernel.py a/b/c/d.txt figures/bench.png assets/sample.mp4
    preprocessor_config.json lock journal.jsonl beside/x
""".split()
STAY = f"""
    model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json consolidated.safetensors
    pytorch_model.bin pytorch_model.bin.index.json original/consolidated.00.pth metal/model.bin m.PTH model-Q4_K_M.gguf
    onnx/model.onnx onnx/model.onnx_data onnx/model.onnx_data_1 onnx/model.onnx.data tf_model.h5 tf_model.h5.index.json
    flax_model.msgpack rust_model.ot model.ckpt model.tflite dcp/__0_0.distcp model.safetensors.checksums.json
    optimizer.pt scheduler.pt rng_state_0.pth training_args.bin checkpoint-500/trainer_state.json
    .gitattributes .git/config .cache/huggingface/x.metadata code/.hidden/x __pycache__/a.pyc
    {STAGING_NAME}/journal.jsonl
""".split()


def written(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


@pytest.mark.parametrize("name", GO)
def test_files_that_are_not_weights_are_companions(name):
    assert is_companion(name)


@pytest.mark.parametrize("name", STAY)
def test_weights_in_any_format_and_hidden_files_are_not_companions(name):
    assert not is_companion(name)


def test_companions_of_a_directory_are_selected_by_name(tmp_path):
    assert companions_of(str(written(tmp_path, *GO, *STAY)), str(tmp_path.parent / "out")) == sorted(GO)


def test_directory_without_other_files_has_no_companions(tmp_path):
    (tmp_path / "empty").mkdir()
    assert companions_of(str(written(tmp_path, "model.safetensors")), str(tmp_path.parent / "out")) == []


def test_links_to_files_count_as_files(tmp_path):
    """Use links to blobs that are named by their hashes, as in a snapshot of the Hub."""
    blobs, snapshot = written(tmp_path / "blobs", "0", "1"), tmp_path / "snapshots" / "abc"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0")
    (snapshot / "additional_chat_templates" / "rag.jinja").symlink_to("../../../blobs/1")
    (snapshot / "model.safetensors").symlink_to(blobs / "0")
    (snapshot / "broken.json").symlink_to("nowhere")
    assert companions_of(str(snapshot), str(tmp_path)) == ["additional_chat_templates/rag.jinja", "tokenizer.json"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    source = written(tmp_path / "source", "tokenizer/vocab.json")
    (tmp_path / "source" / "tokenizer" / "circle").symlink_to("..")
    (tmp_path / "source" / "elsewhere").symlink_to(written(tmp_path / "other", "x.json"))
    (tmp_path / "source" / "itself").symlink_to("itself")
    (tmp_path / "source" / "above").symlink_to(tmp_path)
    (tmp_path / "source" / "again").symlink_to("tokenizer")
    assert companions_of(str(source), str(tmp_path / "out")) == ["elsewhere/x.json", "tokenizer/vocab.json"]


def test_source_that_is_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(written(tmp_path / "source", "a/x.json"))
    assert companions_of(str(tmp_path / "link"), str(tmp_path / "out")) == ["a/x.json"]


@pytest.mark.parametrize("spelling", ["made/out", "made/../made/out", "link/out"])
def test_destination_within_the_source_is_skipped(tmp_path, spelling):
    source = written(tmp_path / "source", "x.json", "made/y.json", "made/out/z.json")
    (source / "link").symlink_to("made")
    assert companions_of(str(source), str(source / spelling)) == ["made/y.json", "x.json"]
