"""Tests of plans against traces of every model type: ``from_pretrained``, traced, makes the copies that are planned.

Only headers are needed, so that a type takes a fraction of a second. Saving is the same with the rules reversed.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="traces the loader of transformers")

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

import automodel_conv as amc
from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.loading_code.dry_run import traced
from automodel_conv.upstream.models import state_table
from tests.comparing import assert_same_in_order
from tests.model_zoo import (
    DTYPE,
    EXCLUDED,
    OTHER_ORDER,
    build_model,
    build_on_meta,
    equal_names,
    is_transposed_on_disk,
    published_tensors,
    write_checkpoint,
    zoo_names,
)
from tests.planning import oracles
from tests.planning.element_maps import assert_same_targets

pytestmark = pytest.mark.sweep

# With these, the rules use every operation of the registry.
ALWAYS = {
    *("mixtral", "ernie4_5_vl_moe", "inkling2_loop", "kimi_k25", "lara_mini", "qwen3_vl_moe", "Tipsv2TextModel"),
    "olmoe-tied",
}
NAMES = [name for name in zoo_names() if name not in EXCLUDED]
# Published under names without the prefix that their models have, so that none can be removed.
OTHER_PREFIX = {"inkling2", "inkling2_loop"}
ALWAYS_EQUAL = {("mixtral", "E == I == H"), ("qwen3_vl_moe", "2I == H"), ("ernie4_5_vl_moe", "E == 1, 2I == H")}
EQUAL = [
    pytest.param(*one, id=": ".join(one), marks=[] if one in ALWAYS_EQUAL else pytest.mark.long)
    for one in equal_names()
]


def own_tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def without_prefix(model):
    return {
        name.removeprefix(f"{model.base_model_prefix}."): tensor for name, tensor in published_tensors(model).items()
    }


def in_mixed_dtypes(model):
    dtypes = itertools.cycle([torch.float32, DTYPE, torch.float16])
    backwards = reversed(published_tensors(model).items())
    return {name: tensor.to(next(dtypes)) if tensor.is_floating_point() else tensor for name, tensor in backwards}


FORMS = {
    "published": published_tensors,
    "as in the model": own_tensors,
    "mixed dtypes": in_mixed_dtypes,
}

EVERY_RUN = {"published", "mixed dtypes"}


def each(parameter, values, always):
    """Return a mark that runs a test with each value; ordinary runs only with those of ``always``."""
    marked = [pytest.param(value, marks=[] if value in always else pytest.mark.long) for value in values]
    return pytest.mark.parametrize(parameter, marked)


def read_nothing(rows):
    assert not rows, "transformers reads values"
    return []


def loaded_by(model):
    """Return the loader of transformers for a model, and a list that gets what it reports."""
    reports = []

    def load(tensors):
        config = copy.deepcopy(model.config)
        options = {"config": config, "state_dict": tensors, "dtype": DTYPE, "output_loading_info": True}
        loaded, info = type(model).from_pretrained(None, **options)
        reports.append(info)
        return loaded.state_dict()

    return load, reports


def with_tied(plan):
    """Return a plan in which all names of a tied tensor are targets."""
    planned = {target.name: target for target in plan.targets}
    first = {name: next(n for n in names if n in planned) for names in plan.tied for name in names}
    more = [planned[leader]._replace(name=name) for name, leader in first.items() if name not in planned]
    return replace(plan, targets=(*plan.targets, *more))


def assert_traced_as_planned(model, tensors):
    table = state_table(tensors)
    load, _ = loaded_by(model)
    trace = traced(load, table, None, "dict", read_nothing)
    plan, problems = loading_plan(table, model=model)
    problems.raise_unless_fit("the test")
    assert (trace.computed, trace.plan.missing) == ({}, ())
    assert_same_targets(trace.plan, with_tied(plan))
    assert set(map(frozenset, trace.plan.tied)) == set(map(frozenset, plan.tied))


@each("name", NAMES, ALWAYS)
@each("form", FORMS, EVERY_RUN)
def test_from_pretrained_copies_what_is_planned(name, form):
    model = build_on_meta(name)
    assert_traced_as_planned(model, FORMS[form](model))


@each("name", [name for name in NAMES if name not in OTHER_PREFIX], ALWAYS)
def test_checkpoint_of_the_base_model_is_planned_as_from_pretrained_copies(name):
    model = build_on_meta(name)
    table = state_table(without_prefix(model))
    load, reports = loaded_by(model)
    trace = traced(load, table, None, "dict", read_nothing)
    plan, problems = loading_plan(table, model=model)
    assert set(problems.missing) == set(reports[0]["missing_keys"])
    assert set(problems.unexpected) == set(reports[0]["unexpected_keys"])
    kept = tuple(target for target in trace.plan.targets if target.name not in problems.missing)
    assert_same_targets(replace(trace.plan, targets=kept), with_tied(plan))


@pytest.mark.parametrize(("name", "equal"), EQUAL)
def test_axes_of_equal_sizes_are_not_mistaken(name, equal):
    model = build_on_meta(name, equal=equal)
    tensors = published_tensors(model)
    squares = [n for n, t in tensors.items() if is_transposed_on_disk(model) and t.dim() == 3 and t.mT.shape == t.shape]
    if squares:
        # transformers compares shapes, and so leaves them as stored. The plan orients them as their module.
        with pytest.raises(AssertionError, match="elements differ"):
            assert_traced_as_planned(model, tensors)
        tensors |= {n: t for n, t in own_tensors(model).items() if ".experts." in n}
    assert_traced_as_planned(model, tensors)


@each("name", NAMES, ALWAYS)
def test_saving_copies_what_is_planned(name):
    model = build_on_meta(name)
    tensors = own_tensors(model)
    table = state_table(tensors)
    trace = traced(lambda tensors: revert_weight_conversion(model, tensors), table, None, "dict", read_nothing)
    plan = saving_plan(table, model=model)
    assert not trace.computed
    assert_same_targets(trace.plan, plan)
    in_order = [target.name for target in trace.plan.targets] == [target.name for target in plan.targets]
    assert in_order == (name not in OTHER_ORDER)


@pytest.mark.parametrize("name", ["mixtral", "olmoe-tied", "qwen3_vl_moe"])
def test_from_pretrained_on_files_is_traced_planned_and_loaded(name, tmp_path):
    model = build_model(name)
    write_checkpoint(model, tmp_path)
    load, _ = loaded_by(model)
    trace = amc.trace_loader(load, tmp_path, calls="dict")
    assert_same_targets(trace, with_tied(amc.compile_plan(tmp_path)))
    loaded = amc.load_with(load, tmp_path, calls="dict")
    assert loaded.report.computed == {}
    upstream = type(model).from_pretrained(tmp_path)
    assert_same_in_order(loaded, upstream.state_dict())
    for tied, first in upstream.all_tied_weights_keys.items():
        assert loaded[tied].data_ptr() == loaded[first].data_ptr()


@pytest.mark.skipif(not set(zoo_names()) >= ALWAYS, reason="this transformers lacks some of the types")
def test_types_of_every_run_use_every_operation_of_the_registry():
    registered = {
        type(operation).__name__
        for rules in oracles.registry().values()
        for rule in rules
        for operation in getattr(rule, "operations", None) or ()
    }
    used = {
        type(operation).__name__
        for name in ALWAYS
        for rule in get_model_conversion_mapping(build_on_meta(name))
        for operation in getattr(rule, "operations", None) or ()
    }
    assert registered <= used
