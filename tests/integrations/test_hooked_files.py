"""The files that transformers opens under the hook."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="what is hooked is transformers' own")

from safetensors.torch import save_file
from transformers import modeling_utils as upstream

import automodel_conv as amc


@pytest.fixture(autouse=True)
def _restored():
    yield
    amc.uninstall()


def test_what_the_hook_hands_out_can_be_copied(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with amc.accelerate_transformers():
        opened = upstream.safe_open(tmp_path / "a.safetensors", framework="pt")
        assert copy.copy(opened).get_slice("a")[:].tolist() == copy.copy(opened.get_slice("a"))[:].tolist() == [1, 1]


def test_an_open_file_is_an_instance_of_what_opened_it(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    before = upstream.safe_open(tmp_path / "a.safetensors", framework="pt")
    with amc.accelerate_transformers():
        opened = upstream.safe_open(tmp_path / "a.safetensors", framework="pt")
        assert isinstance(opened, upstream.safe_open)
        assert isinstance(before, upstream.safe_open)
        assert not isinstance(opened.get_slice("a"), upstream.safe_open)
