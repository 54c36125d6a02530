"""Tests of computed targets: the code runs again on what they need, and changes nothing else."""

from __future__ import annotations

import pytest
import torch

from automodel_conv import ConversionError, open_checkpoint
from automodel_conv.loading_code.computing import computed_values
from automodel_conv.loading_code.dry_run import traced
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.origins import Unknown
from tests.loading_code.loads import SOURCES, Model, bits, checkpoint_of, everything_of, has_data


def computed(tmp_path, load, targets, change=lambda trace: trace):
    """Trace code, and return the targets that it computes."""
    checkpoint = open_checkpoint(checkpoint_of(tmp_path))
    trace = traced(load, SourceTable.from_checkpoint(checkpoint), targets, "dict", lambda rows: [])
    values, _ = computed_values(load, checkpoint, targets, "dict", change(trace))
    return values


def test_nothing_runs_if_nothing_is_computed(tmp_path):
    calls = []
    assert computed(tmp_path, lambda given: calls.append(1) or {"x": given["a"]}, None) == {}
    assert len(calls) == 1


def test_only_computed_targets_are_returned(tmp_path):
    values = computed(tmp_path, lambda given: {"x": given["a"] * 2, "y": given["b"]}, None)
    assert list(values) == ["x"]
    assert bits(values["x"]) == bits(SOURCES["a"] * 2)


def test_sources_without_data_stay_without_data(tmp_path):
    def load(given):
        seen.append({name: has_data(tensor) for name, tensor in given.items()})
        return {"x": given["a"] * 2, "y": given["b"]}

    seen = []
    computed(tmp_path, load, None)
    assert seen[1] == {"a": True, "b": False, "c": False}


def test_other_targets_of_a_module_stay_as_they_are(tmp_path):
    def load(given):
        model.first.weight.data.copy_(given["a"] * 2)
        model.second.weight.data.copy_(given["b"])
        model.saved.fill_(3)
        model.first.bias = None
        model.names.append("x")

    model, expected = Model(), Model()
    values = computed(tmp_path, load, model)
    assert values["first.weight"] is model.first.weight
    expected.first.weight.data.copy_(SOURCES["a"] * 2)
    assert [bits(one) for one in model.state_dict().values()] == [bits(one) for one in expected.state_dict().values()]
    assert model.names == []


def test_targets_that_are_added_to_are_added_to_once(tmp_path):
    def without_rows(trace):
        trace.computed["first.weight"] = Unknown("nobody knows")
        return trace

    def load(given):
        model.first.weight.data.add_(1)
        model.first.weight.data.add_(given["a"])

    model = Model()
    before = model.first.weight.detach().clone()
    computed(tmp_path, load, model, without_rows)
    assert bits(model.first.weight) == bits(before + 1 + SOURCES["a"])


def test_error_for_want_of_data_runs_the_code_on_everything(tmp_path):
    def without_rows(trace):
        trace.computed["x"] = Unknown("nobody knows")
        return trace

    def load(given):
        if has_data(given["a"]):
            return {"x": torch.tensor(given["a"].tolist()) * 2}
        assert not calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no data")
        return {"x": given["a"] * 2}

    calls = []
    values = computed(tmp_path, load, None, without_rows)
    assert bits(values["x"]) == bits(SOURCES["a"] * 2)


def test_error_on_everything_is_that_of_the_code(tmp_path):
    def load(given):
        calls.append(1)
        if len(calls) > 1:
            raise LookupError("of the code")
        return {"x": given["a"] * 2}

    calls = []
    with pytest.raises(LookupError, match="of the code"):
        computed(tmp_path, load, None)


def test_interrupt_leaves_everything_else_as_it_was(tmp_path):
    def load(given):
        model.second.weight.data = given["b"]
        model.first.weight.data.copy_(given["a"] * 2)
        if has_data(given["a"]):
            raise KeyboardInterrupt

    model = Model()
    model.first.weight.data.zero_()
    before = everything_of(model)
    with pytest.raises(KeyboardInterrupt):
        computed(tmp_path, load, model)
    model.first.weight.data.zero_()
    assert everything_of(model) == before


def test_target_that_is_gone_is_named(tmp_path):
    def load(given):
        calls.append(1)
        return {"x": given["a"] * 2} if len(calls) == 1 else {"y": given["a"]}

    calls = []
    with pytest.raises(ConversionError, match=r"where: *x\n"):
        computed(tmp_path, load, None)


def test_memory_that_the_first_run_moves_is_moved_back_before_the_second(tmp_path):
    def without_rows(trace):
        trace.computed["first.weight"] = Unknown("nobody knows")
        return trace

    def load(given):
        model.second.weight.data.add_(1)
        model.second.weight.data = given["b"][:1]
        model.first.weight.data.mul_(given["a"])
        model.first.bias.data = given["c"][:1] * 2
        model.first.weight.data = given["a"][:2] * 2

    model = Model()
    flat = torch.arange(13.0)
    model.first.weight.data, model.second.weight.data = flat[:12].view(3, 4), flat[1:].view(3, 4)
    values = computed(tmp_path, load, model, without_rows)
    assert bits(values["first.weight"]) == bits(SOURCES["a"][:2] * 2)
    assert bits(flat[:12]) == bits(torch.tensor([0.0, *range(2, 13)]) * SOURCES["a"].reshape(-1))


def test_bytes_of_both_runs_are_counted(tmp_path):
    """Code that does not run on what its targets need runs on everything."""

    def load(given):
        assert not calls or has_data(given["c"])
        return {"x": given["a"] * 2}

    calls = []
    checkpoint = open_checkpoint(checkpoint_of(tmp_path))
    trace = traced(load, SourceTable.from_checkpoint(checkpoint), None, "dict", lambda rows: [])
    calls.append(1)
    values, bytes_read = computed_values(load, checkpoint, None, "dict", trace)
    assert bits(values["x"]) == bits(SOURCES["a"] * 2)
    assert bytes_read == SOURCES["a"].nbytes + sum(tensor.nbytes for tensor in SOURCES.values())


def test_constants_over_sources_without_data_reach_computed_targets(tmp_path):
    def load(given):
        filled = given["a"].clone()
        filled.fill_(2)
        padded = filled.new_full((4, 4), 1)
        padded[:3].copy_(filled)
        model.first.weight.data.view(-1)[:5].copy_(padded.view(-1)[:5])
        model.second.weight.data.copy_(given["b"])

    model = Model()
    old = model.first.weight.detach().clone()
    computed(tmp_path, load, model)
    assert bits(model.first.weight) == bits(torch.cat([torch.full((5,), 2.0), old.flatten()[5:]]))


def test_elements_of_tensors_without_data_do_not_make_others_unknown(tmp_path):
    def load(given):
        for _ in range(3):
            padded = torch.zeros(4, 4)
            padded[:3].copy_(given["b"])
            model.second.weight.data.copy_(padded[:3])
            del padded
        seen.append(sorted(name for name, tensor in given.items() if has_data(tensor)))
        model.first.weight.data.copy_(given["a"] * 2)

    model, seen = Model(), []
    computed(tmp_path, load, model)
    assert seen == [[], ["a"]]
    assert bits(model.first.weight) == bits(SOURCES["a"] * 2)
