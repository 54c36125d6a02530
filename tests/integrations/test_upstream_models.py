"""Cases of transformers' own tests of ``from_pretrained``, under the hook: the same results for whole models.

Every test counts the targets that were converted by plan.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="hooks the loader of transformers")
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.core_model_loading import Concatenate

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.integrations.cases import assert_same_tensors
from tests.integrations.support import assert_same_model, both, saved
from tests.model_zoo import build_model, write_checkpoint

# Experts only; tied embeddings; a text tower with experts inside another model.
MODELS = ["mixtral", "olmoe-tied", "mistral3+mixtral"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    checkpoints = {}
    for name in MODELS:
        directory = tmp_path_factory.mktemp("published")
        model = build_model(name)
        write_checkpoint(model, directory)
        checkpoints[name] = (type(model), directory)
    return checkpoints


def stored(directory: Path):
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def changed(source: Path, directory: Path, tensors):
    """Write a checkpoint with the source's config and these tensors."""
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


def under_both(action):
    """Return the results without and under the hook, from the same random state, and the targets converted by plan."""
    torch.manual_seed(0)
    stock = action()
    with amc.accelerate_transformers() as acceleration:
        torch.manual_seed(0)
        return stock, action(), acceleration.loads


@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_is_contiguous_and_saved_as_published(published, tmp_path, name):
    model_class, directory = published[name]
    _, hooked, [load] = both(model_class, directory)
    assert load.lowered
    assert load.left == {}
    assert all(tensor.is_contiguous() for tensor in hooked.state_dict().values())
    saved(hooked, tmp_path)
    assert_same_tensors(stored(tmp_path), stored(directory))


def test_grouped_and_ungrouped_layers_are_loaded_together(published, tmp_path):
    model_class, source = published["mixtral"]
    state = model_class.from_pretrained(source).state_dict()
    first = "model.layers.0."
    tensors = {n: t for n, t in stored(source).items() if not n.startswith(first)}
    tensors |= {n: t.contiguous() for n, t in state.items() if n.startswith(first)}
    _, hooked, [load] = both(model_class, changed(source, tmp_path, tensors))
    assert {name.split(".")[2] for name in load.lowered} == {"1", "2"}
    assert_same_tensors(hooked.state_dict(), state)


def test_grouped_checkpoint_is_loaded_unchanged(published, tmp_path):
    model_class, source = published["mixtral"]
    model = model_class.from_pretrained(source)
    model.save_pretrained(tmp_path, save_original_format=False)
    _, hooked, [load] = both(model_class, tmp_path)
    assert load == (model_class.__name__, (), {}, (), (), 0)
    assert_same_tensors(hooked.state_dict(), model.state_dict())


def test_a_base_model_is_loaded_from_a_model_with_a_head_and_back(published, tmp_path):
    model_class, source = published["mixtral"]
    _, hooked, [load] = both(AutoModel, source)
    assert load.lowered
    assert not any(name.startswith("model.") for name in load.lowered)
    hooked.save_pretrained(tmp_path)
    stock, again, [load] = under_both(lambda: model_class.from_pretrained(tmp_path, output_loading_info=True))
    assert load.lowered
    assert again[1] == stock[1]
    assert again[1]["missing_keys"] == {"lm_head.weight"}
    assert_same_model(again[0], stock[0])


def test_missing_weights_are_initialized_as_without_the_hook(published, tmp_path):
    model_class, source = published["mixtral"]
    tensors = {n: t for n, t in stored(source).items() if "layers.1.block_sparse_moe.experts" not in n}
    path = changed(source, tmp_path, {n: t for n, t in tensors.items() if not n.startswith("lm_head")})
    stock, hooked, [load] = under_both(lambda: model_class.from_pretrained(path, output_loading_info=True))
    assert len(load.lowered) == 2 * 2
    assert hooked[1] == stock[1]
    assert len(hooked[1]["missing_keys"]) == 3
    assert_same_model(hooked[0], stock[0])


def test_mismatched_shapes_are_refused_or_initialized_as_without_the_hook(published):
    model_class, path = published["mixtral"]

    def refused():
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes") as error:
            model_class.from_pretrained(path, vocab_size=77)
        return str(error.value)

    stock, hooked, [load] = under_both(refused)
    assert hooked == stock
    assert load.lowered
    options = {"vocab_size": 77, "ignore_mismatched_sizes": True, "output_loading_info": True}
    stock, hooked, [load] = under_both(lambda: model_class.from_pretrained(path, **options))
    assert load.lowered
    assert hooked[1] == stock[1]
    assert len(hooked[1]["mismatched_keys"]) == 2
    assert_same_model(hooked[0], stock[0])


def answer(model):
    with torch.no_grad():
        return model(torch.arange(7)[None]).logits


def test_partly_offloaded_model_has_the_same_outputs(published, tmp_path):
    model_class, path = published["mixtral"]
    eager = {"experts_implementation": "eager"}
    whole = model_class.from_pretrained(path, **eager)
    size = sum(tensor.nbytes for tensor in whole.state_dict().values())
    options = {"device_map": "auto", "max_memory": {"cpu": size * 2 // 3}, "offload_folder": tmp_path}
    options |= eager
    stock, hooked, [load] = both(model_class, path, **options)
    assert load.lowered
    assert load.left
    assert all("disk" in reason for reason in load.left.values())
    assert_bytes_equal(answer(hooked), answer(stock))
    assert_bytes_equal(answer(hooked), answer(whole))


def test_the_old_name_of_dtype_is_obeyed(published):
    model_class, path = published["mixtral"]
    _, hooked, [load] = both(model_class, path, torch_dtype=torch.float16)
    assert load.lowered
    assert_same_model(hooked, model_class.from_pretrained(path, dtype=torch.float16))
    assert hooked.dtype == torch.float16


def test_tied_weights_are_one_tensor_and_none_is_missing(published):
    model_class, path = published["olmoe-tied"]
    _, hooked, [load] = both(model_class, path)
    assert load.lowered
    assert hooked.lm_head.weight is hooked.model.embed_tokens.weight
    _, info = model_class.from_pretrained(path, output_loading_info=True)
    assert info["missing_keys"] == set()


def test_an_operation_that_raises_stops_the_load_as_without_the_hook(published, monkeypatch):
    def convert(self, *args, **kwargs):
        raise ValueError("no such luck")

    def fails():
        with pytest.raises(RuntimeError) as error:
            model_class.from_pretrained(path)
        return str(error.value)

    model_class, path = published["mixtral"]
    monkeypatch.setattr(Concatenate, "convert", convert)
    stock, hooked, [load] = under_both(fails)
    assert hooked == stock
    assert load.lowered
    assert all(name.endswith("down_proj") for name in load.lowered)


@pytest.mark.parametrize("deactivated", [True, False])
def test_switch_for_loading_without_threads_is_obeyed(published, monkeypatch, deactivated):
    def start(self, *args, **kwargs):
        started.append(self)
        return real(self, *args, **kwargs)

    model_class, path = published["mixtral"]
    model_class.from_pretrained(path)  # tqdm starts a thread on first use
    started: list[Any] = []
    real = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1" if deactivated else "0")
    _, _, [load] = both(model_class, path)
    assert load.lowered
    assert bool(started) is not deactivated


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "without mmap"])
def test_other_ways_to_read_files_are_left_to_transformers(published, tmp_path, kind):
    model_class, path = published["mixtral"]
    options = {}
    if kind == "without mmap":
        options = {"disable_mmap": True}
    else:
        torch.save(stored(path), tmp_path / kind)
        (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
        path = tmp_path
    _, _, [load] = both(model_class, path, **options)
    assert load.lowered == ()
