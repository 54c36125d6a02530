"""Tests of models with equal sizes, so that shapes do not distinguish axes: every type, every public function.

The oracle is the model that was written; transformers loads the same, except if its rule looks only at shapes.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("transformers", reason="needs models of transformers")

from transformers.core_model_loading import SplitModulelist

import automodel_conv as amc
from automodel_conv.integrations.dcp import HuggingFaceReader
from automodel_conv.testing import POISON
from automodel_conv.upstream.models import expert_layouts
from tests.comparing import assert_same, assert_same_in_order, contents, numel_of, tensors_of
from tests.model_zoo import DTYPE, OTHER_ORDER, build_model, equal_names, save_upstream, write_checkpoint

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]

ALWAYS = {
    ("qwen3_moe", "2I == H"),
    ("mixtral", "I == H"),
    ("deepseek_v3", "E == 1, 2I == H"),
    ("nemotron_h", "I == H"),
    ("gpt_oss", "I == H"),
    ("jamba", "E == I == H"),
    ("inkling2_text", "2I == H"),
    *(("qwen3_vl_moe", equal) for equal in ("2I == H", "I == H", "E == I == H", "E == 1, 2I == H")),
}

# transformers mistakes a published square matrix for the model's own.
MISREAD = {("qwen3_vl_moe", equal) for _, equal in equal_names() if "I == H" in equal}


@functools.cache
def keeps_sizes_of_one():
    """Return whether transformers keeps dimensions of size 1 when it splits experts; 5.17.0 writes other shapes."""
    split = SplitModulelist(dim=0).convert({"a": torch.zeros(2, 1, 3)}, ["a"], ["b.*"])
    return split["b.0"].shape == (1, 3)


class Case:
    """A model, its published checkpoint, and the checkpoint that ``save_pretrained`` writes."""

    def __init__(self, name: str, equal: str, directory: Path):
        self.name, self.equal = name, equal
        if "I == 1" in equal and not keeps_sizes_of_one():
            pytest.skip("this transformers publishes experts without their dimension of size 1")
        self.model = build_model(name, equal=equal)
        if shapes_of(self.model) == usual_shapes(name):
            pytest.skip(f"nothing of {name} becomes equal")
        self.expected = self.model.state_dict()
        self.most_bytes = sum(tensor.nbytes for tensor in self.expected.values()) // 4
        self.published, self.converted, self.saved = (directory / kind for kind in ("published", "converted", "saved"))
        write_checkpoint(self.model, self.published)
        write_checkpoint(self.model, self.converted, original_format=False)
        save_upstream(self.model, self.saved, self.most_bytes)

    def load_options(self, directory):
        """Return the options of a directory: the layout of grouped experts without a gate that are all square."""
        first = [t.shape for n, t in self.expected.items() if n.endswith(".experts.up_proj")]
        ambiguous = directory == self.converted and any(shape[1] == shape[2] for shape in first)
        return {"source_layout": "transformers"} if ambiguous else {}

    def poisoned(self):
        model = copy.deepcopy(self.model)
        for tensor in model.state_dict().values():
            tensor.reshape(-1).view(torch.uint8).fill_(POISON)
        return model


def shapes_of(model):
    return [tensor.shape for tensor in model.state_dict().values()]


@functools.cache
def usual_shapes(name):
    return shapes_of(build_model(name))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(one, id=": ".join(one), marks=() if one in ALWAYS else pytest.mark.long) for one in equal_names()
    ],
)
def case(request, tmp_path_factory):
    return Case(*request.param, tmp_path_factory.mktemp("equal"))


def assert_files(case, actual, expected):
    if case.name not in OTHER_ORDER:
        assert contents(actual) == contents(expected)
    assert_same(tensors_of(actual), tensors_of(expected))


def test_every_function_loads_the_original(case):
    for directory in (case.published, case.converted):
        load_options = case.load_options(directory)
        if load_options:
            with pytest.raises(amc.UnsupportedError, match="source_layout="):
                amc.load_state_dict(directory)
        assert_same_in_order(amc.load_state_dict(directory, dtype=DTYPE, **load_options), case.expected)
        model = case.poisoned()
        amc.load_model(model, directory, **load_options)
        assert_same_in_order(model.state_dict(), case.expected)
        with torch.device("meta"):
            model = type(case.model)._from_config(copy.deepcopy(case.model.config), dtype=DTYPE)
        amc.load_model(model, directory, **load_options)
        assert_same_in_order(model.state_dict(), case.expected)
        state = case.poisoned().state_dict()
        dcp.load(state, storage_reader=HuggingFaceReader(directory, **load_options))
        assert_same_in_order(state, case.expected)
        assert_same_in_order(amc.convert_state_dict(tensors_of(directory), case.model, **load_options), case.expected)


def test_from_pretrained_loads_the_original_under_the_hook(case):
    for directory in (case.published, case.converted):
        with amc.accelerate_transformers() as acceleration:
            hooked = type(case.model).from_pretrained(directory, dtype=DTYPE)
        [load] = acceleration.loads
        assert load.left == {}
        assert_same_in_order(hooked.state_dict(), case.expected)
        stock = type(case.model).from_pretrained(directory, dtype=DTYPE)
        if directory == case.published and (case.name, case.equal) in MISREAD:
            assert any(not torch.equal(tensor, case.expected[name]) for name, tensor in stock.state_dict().items())
        else:
            assert_same_in_order(stock.state_dict(), case.expected)


def test_it_is_saved_as_by_transformers_or_like_a_reference(case, tmp_path):
    amc.save_checkpoint(case.model, tmp_path / "ours", max_shard_size=case.most_bytes)
    assert_files(case, tmp_path / "ours", case.saved)
    for reference in (case.published, case.converted, case.saved):
        if numel_of(tensors_of(reference)) > numel_of(case.expected):
            with pytest.raises(amc.CoverageError, match="such as padding"):
                amc.save_checkpoint(case.model, tmp_path / reference.name, reference=reference)
            continue
        amc.save_checkpoint(case.model, tmp_path / reference.name, reference=reference)
        assert_files(case, tmp_path / reference.name, reference)
        reverted = amc.revert_state_dict(case.expected, case.model, reference=reference)
        assert_same(reverted, tensors_of(reference))


def test_it_is_converted_on_disk_and_back(case, tmp_path):
    amc.convert_checkpoint(case.published, tmp_path / "own")
    assert_same(amc.load_state_dict(tmp_path / "own", dtype=DTYPE), case.expected)
    amc.convert_checkpoint(tmp_path / "own", tmp_path / "back", layout="per_expert")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(case.saved))
    layouts = expert_layouts(case.model).values()
    if layouts and None not in layouts:
        amc.convert_checkpoint(case.published, tmp_path / "nemo", layout="nemo")
        amc.convert_checkpoint(tmp_path / "nemo", tmp_path / "again", layout="per_expert")
        assert_same(tensors_of(tmp_path / "again"), tensors_of(case.saved))
