"""Tests of the files that transformers opens under the hook."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="hooks functions of transformers")

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import modeling_utils as upstream

import automodel_conv as amc
from automodel_conv.integrations import hooked_files


@pytest.fixture(autouse=True)
def _restored():
    yield
    amc.uninstall()


def test_objects_of_the_hook_can_be_copied(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with amc.accelerate_transformers():
        opened = upstream.safe_open(tmp_path / "a.safetensors", framework="pt")
        assert copy.copy(opened).get_slice("a")[:].tolist() == copy.copy(opened.get_slice("a"))[:].tolist() == [1, 1]


def test_open_file_is_an_instance_of_safe_open(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    before = upstream.safe_open(tmp_path / "a.safetensors", framework="pt")
    with amc.accelerate_transformers():
        opened = upstream.safe_open(tmp_path / "a.safetensors", framework="pt")
        assert isinstance(opened, upstream.safe_open)
        assert isinstance(before, upstream.safe_open)
        assert not isinstance(opened.get_slice("a"), upstream.safe_open)


@pytest.fixture
def files(tmp_path):
    """Write two files, each with an extra tensor; return them as an index assigns them to a load."""
    save_file({"b": torch.ones(2), "stale": torch.ones(3)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(4, dtype=torch.int8), "b": torch.zeros(2)}, tmp_path / "2.safetensors")
    paths = [str(tmp_path / f"{n}.safetensors") for n in (1, 2)]
    weight_map = {"a": "2.safetensors", "b": "1.safetensors"}
    lister = hooked_files.wrap_index_reader(lambda: (paths, {"weight_map": weight_map}), lambda: True)
    indexed, metadata = lister()
    assert (indexed, metadata["weight_map"]) == (paths, weight_map)
    return indexed


def slices_of(paths, is_on=lambda: True):
    opened = [hooked_files.SafeOpen(safe_open, is_on)(path, framework="pt") for path in paths]
    return {name: file.get_slice(name) for file in opened for name in file.keys()}


def test_a_file_lists_the_tensors_that_the_index_assigns_to_it(files):
    slices = slices_of(files)
    assert {name: slices[name][:].tolist() for name in slices} == {"a": [0, 0, 0, 0], "b": [1, 1]}
    assert hooked_files.unindexed_in(slices) == (("stale", "1.safetensors"), ("b", "2.safetensors"))


def test_a_path_of_no_index_is_a_whole_file(files):
    slices = slices_of([str(files[0])])
    assert slices.keys() == {"b", "stale"}
    assert hooked_files.unindexed_in(slices) == ()
    assert hooked_files.unindexed_in({"a": torch.ones(1)}) == ()


def test_slices_become_a_checkpoint_of_their_own_rows(files):
    slices = slices_of(files)
    checkpoint = hooked_files.checkpoint_of({"a": slices["a"], "renamed": slices["b"]})
    assert (checkpoint.names, checkpoint.dtypes, checkpoint.shapes) == (["a", "renamed"], ["I8", "F32"], [(4,), (2,)])
    for row in range(2):
        with open(checkpoint.files[checkpoint.file_ids[row]], "rb") as file:
            file.seek(checkpoint.offsets[row])
            assert file.read(checkpoint.nbytes[row]) == slices[["a", "b"][row]][:].numpy().tobytes()
    assert hooked_files.checkpoint_of({}).names == []


def test_replacements_of_a_hook_that_is_off_do_nothing(files):
    lister = hooked_files.wrap_index_reader(lambda: (["x"], {}), lambda: False)
    assert lister() == (["x"], {})
    assert type(hooked_files.SafeOpen(safe_open, lambda: False)(files[0], framework="pt")) is safe_open
