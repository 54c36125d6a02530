"""Tests of the contents of a save: the tensors of a model, their dtypes, and their files."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from automodel_conv.errors import UnsupportedError
from automodel_conv.files.shards import Naming, Spec
from automodel_conv.planning.boxes import run_of
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.publishing.saved import (
    not_saved,
    places_in,
    refuse_unlike_stored,
    saved_tensors,
    shards_for,
    specs_of,
    with_dtype,
)
from tests.execution.support import write_checkpoint


def plan_of(**dtypes):
    """A plan of one tensor of four elements for each name."""
    names = list(dtypes)
    run = (StridedCopy(run_of(4), (0,), (0,), (0,)),)
    targets = tuple(Target(name, dtype, (4,), -1, (row,), run) for row, (name, dtype) in enumerate(dtypes.items()))
    return CopyPlan(SourceTable(names, list(dtypes.values()), [(4,)] * len(names)), targets)


def dtypes(plan):
    return {target.name: target.dtype for target in plan.targets}


def test_only_floating_targets_get_the_dtype():
    plan = plan_of(a="F32", b="BF16", steps="I64", codes="F8_E4M3")
    wanted = {"a": "F16", "b": "F16", "steps": "I64", "codes": "F8_E4M3"}
    assert dtypes(with_dtype(plan, torch.float16, None)) == wanted
    assert with_dtype(plan, None, None) is plan


def test_parameters_of_a_plain_model_get_the_dtype_by_the_rules():
    model = nn.Module()
    model.a = nn.Parameter(torch.ones(4))
    assert dtypes(with_dtype(plan_of(a="F32", more="F32"), torch.bfloat16, model, [])) == {"a": "BF16", "more": "BF16"}


def test_specs_are_names_dtypes_and_shapes_of_targets():
    assert specs_of(plan_of(a="F32", b="I8").targets) == [Spec("a", "F32", (4,)), Spec("b", "I8", (4,))]


@pytest.mark.parametrize(("targets", "words"), [([], "no tensors"), (plan_of(odd="F6_E2M3").targets, "odd")], ids=str)
def test_nothing_and_dtypes_that_torch_lacks_are_refused(targets, words):
    with pytest.raises(UnsupportedError, match=words):
        specs_of(targets)


def test_places_are_the_file_and_the_offset_of_each_target_in_their_order():
    targets = plan_of(a="U8", b="F32", c="F32").targets
    shards = shards_for(targets, None, 20, Naming())
    assert [[spec.name for spec in shard.specs] for shard in shards] == [["b", "a"], ["c"]]
    first, second = (len(shard.header) for shard in shards)
    assert places_in(shards, targets) == [(0, first + 16), (0, first), (1, second)]


def test_files_are_those_of_the_reference_and_new_tensors_go_to_its_last(tmp_path):
    files = {"x.safetensors": {"b": torch.ones(4), "gone": torch.ones(1)}, "y.safetensors": {"a": torch.ones(4)}}
    reference = write_checkpoint(tmp_path, files)
    shards = shards_for(plan_of(a="F32", b="F32", new="F32").targets, reference, "5GB", Naming())
    assert {shard.name: {spec.name for spec in shard.specs} for shard in shards} == {
        "x.safetensors": {"b"},
        "y.safetensors": {"a", "new"},
    }
    assert not_saved(None, reference, ["a", "b", "new"]) == ["gone"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.embed = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.embed.weight = self.head.weight


def test_a_tied_tensor_is_saved_once_under_the_name_that_is_kept():
    model = Tied()
    assert saved_tensors(model).keys() == {"head.weight"}
    model.all_tied_weights_keys = {"head.weight": "embed.weight"}
    assert saved_tensors(model).keys() == {"embed.weight"}


def test_names_that_a_model_never_saves_are_left_out_and_told():
    model = nn.Linear(2, 3)
    model._keys_to_ignore_on_save = ["bias", "no such name"]
    assert saved_tensors(model).keys() == {"weight"}
    assert not_saved(model, None, ["weight"]) == ["bias"]


def test_extra_state_and_shards_of_an_older_transformers_are_refused():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state): ...

    with pytest.raises(UnsupportedError, match="_extra_state: dict"):
        saved_tensors(Extra(2, 3))
    sharded = nn.Linear(2, 3)
    sharded._tp_size = 2
    with pytest.raises(UnsupportedError, match="shards that are not DTensors"):
        saved_tensors(sharded)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, device="meta"), "odd has no data"),
        (torch.ones(2, dtype=torch.complex64).conj(), "odd cannot be saved as it is stored"),
        (torch.ones(2, dtype=torch.complex64)._neg_view(), "odd cannot be saved as it is stored"),
    ],
    ids=["meta", "conjugated", "negated"],
)
def test_tensors_whose_bytes_are_not_their_values_are_refused(tensor, words):
    with pytest.raises(UnsupportedError, match=words):
        refuse_unlike_stored({"fine": torch.ones(2), "text": "not a tensor", "odd": tensor})
    refuse_unlike_stored({"fine": torch.ones(2)})


def test_a_model_that_transformers_has_quantized_is_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1))
    model.hf_quantizer = SimpleNamespace()
    with pytest.raises(UnsupportedError, match=r"quantized by transformers"):
        saved_tensors(model)
