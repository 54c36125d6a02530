"""Tests of loads by loading code: whatever it does, ``load_with`` leaves what the code leaves when it is run."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

from automodel_conv import ConversionError, UnsupportedError, load_with, trace_loader
from automodel_conv.loading_code.stand_ins import named_tensors
from tests.loading_code.loads import (
    SOURCES,
    Model,
    bits,
    checkpoint_of,
    described,
    everything_of,
    has_data,
    loaded_as_run,
)


def own_targets():
    return {name: torch.full((3, 4), -1.0) for name in "xyz"}


PLANNED = {}
"""Loading code that fills a mapping by copies and constants."""
COMPUTED = {}
"""Loading code, with the names of the targets that it computes."""
IN_MODULE = {}
"""Loading code that fills a module, with the names of the parameters that it computes."""


def planned(load):
    PLANNED[load.__name__] = load
    return load


def computed(*names):
    def decorate(load):
        COMPUTED[load.__name__] = load, names
        return load

    return decorate


def in_module(*names):
    def decorate(load):
        IN_MODULE[load.__name__] = load, names
        return load

    return decorate


@planned
def copies(targets, given):
    targets["x"].copy_(given["a"])
    targets["y"].copy_(given["b"].t().contiguous().t())


@planned
def later_write_wins(targets, given):
    targets["x"].copy_(given["a"])
    targets["y"].copy_(targets["x"])
    targets["x"].copy_(given["b"])
    targets["x"][1] = given["a"][0]


@planned
def constants_that_are_rounded(targets, given):
    targets["x"].copy_(torch.full((3, 4), 0.1, dtype=torch.bfloat16))
    targets["y"].copy_(torch.empty(3, 4, dtype=torch.int32).fill_(1.7))
    targets["z"].copy_(torch.tensor(0.1, dtype=torch.float16))


@planned
def constant_bytes(targets, given):
    made = torch.empty(12)
    made.view(torch.uint8).fill_(1)
    targets["x"].copy_(made.view(3, 4))
    targets["y"].fill_(float("nan"))
    targets["z"].fill_(True)


@planned
def changes_of_shape(targets, given):
    targets["x"].copy_(given["a"].t_().contiguous().t())
    made = given["b"].clone()[None]
    made.squeeze_(0)
    targets["y"].copy_(made)


@planned
def resized_memory(targets, given):
    made = torch.empty(0)
    made.resize_(3, 4).copy_(given["a"])
    targets["x"].copy_(made)
    made = given["b"].clone()
    targets["y"][:2].copy_(made.resize_(2, 4))
    targets["y"][2] = 5


@planned
def deep_copies(targets, given):
    targets["x"].copy_(copy.deepcopy(given["a"]))
    targets["y"].copy_(copy.deepcopy(targets["x"]))


@planned
def tensors_told_apart_by_address(targets, given):
    targets["x"].fill_(len({tensor.data_ptr() for tensor in given.values()}))
    assert given["a"][1:].data_ptr() == given["a"].data_ptr() + 16


@planned
def other_devices_and_modes(targets, given):
    with torch.inference_mode():
        targets["x"].copy_(given["a"].cpu().clone())
    with torch.no_grad():
        targets["y"].copy_(given["b"].to(targets["y"].device, targets["y"].dtype, copy=True))


@planned
def texts_of_tensors(targets, given):
    assert f"{given['a']} {len(given['a'])} {given['a'].device}"
    for index, row in enumerate(given["a"]):
        targets["x"][index] = row


@planned
def sources_are_overwritten(targets, given):
    given["a"].zero_()
    given["a"][:, 1] = given["c"]
    targets["x"].copy_(given["a"])


@planned
def entries_are_set(targets, given):
    targets["x"] = given["a"].clone()
    targets["new"] = given["b"].t()
    del targets["z"]


@planned
def copies_in_threads(targets, given):
    def put(pair):
        targets[pair[0]].copy_(torch.cat([given[pair[1]][:1], given["b"][1:]]))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(put, [("x", "a"), ("y", "b")]))
    thread = threading.Thread(target=put, args=[("z", "a")])
    thread.start()
    thread.join()


@computed("x")
def arrays_that_share_memory(targets, given):
    made = torch.zeros(3, 4)
    made.numpy()[:] = 5
    targets["x"].copy_(made)
    targets["y"].copy_(given["b"])


@computed("x")
def arrays_filled_after_a_constant(targets, given):
    made = torch.zeros(3, 4)
    array = made.numpy()
    made.fill_(2)
    array[:] = 5
    targets["x"].copy_(made)


@computed("x")
def parts_as_another_dtype(targets, given):
    targets["x"].view(-1)[0].copy_(given["c"][:2].view(torch.int64)[0])
    targets["x"].view(-1)[1:].zero_()


@computed("x")
def arrays(targets, given):
    targets["x"].copy_(torch.from_numpy(numpy.asarray(given["a"]) * 2))
    targets["y"].copy_(given["b"])


@computed("x")
def other_libraries(targets, given):
    targets["x"].copy_(torch.from_dlpack(given["a"]))
    targets["y"].copy_(given["b"])


@computed("x")
def control_flow(targets, given):
    targets["x"].copy_(given["a"] if given["a"].sum() > 0 else given["b"])
    targets["y"].copy_(given["b"])


@computed("x")
def checked_targets(targets, given):
    targets["x"].copy_(given["a"])
    assert torch.equal(targets["x"], given["a"])
    assert not targets["x"].isnan().any()
    targets["y"].copy_(given["b"])


@computed("x")
def old_values_of_targets(targets, given):
    targets["x"].copy_(targets["z"])
    targets["y"].copy_(given["b"])


@computed("x")
def rows_checked_before_they_are_filled(targets, given):
    for row, source in enumerate((given["a"], given["b"], given["a"])):
        assert targets["x"][row].isfinite().all()
        targets["x"][row].copy_(source[row])
    targets["y"].fill_(2)


@computed("x", "y")
def sums(targets, given):
    targets["x"].add_(given["a"])
    targets["y"].copy_(given["a"])
    targets["y"] += given["b"]


@computed("x")
def shapes_of_values(targets, given):
    count = given["a"].nonzero().shape[0]
    targets["x"].view(-1)[:count].copy_(given["a"].view(-1)[:count])
    targets["y"].copy_(given["b"])


@computed("x")
def pickles(targets, given):
    targets["x"].copy_(pickle.loads(pickle.dumps(given["a"])))
    targets["y"].copy_(given["b"])


@computed("x")
def saved_bytes(targets, given):
    targets["x"].copy_(load_bytes(save_bytes({"own": given["a"]}))["own"])
    targets["y"].copy_(given["b"])


@computed("x")
def bytes_of_storages(targets, given):
    numbers = given["a"].untyped_storage().tolist()
    targets["x"].copy_(torch.tensor(numbers, dtype=torch.uint8).view(torch.float32).view(3, 4))
    targets["y"].copy_(given["b"])


@planned
def tensors_told_apart_by_storage(targets, given):
    targets["x"].fill_(len({tensor.untyped_storage().data_ptr() for tensor in given.values()}))


@computed("x")
def sums_of_what_no_trace_sees(targets, given):
    targets["x"].add_(pickle.loads(pickle.dumps(given["a"])))
    targets["y"].copy_(given["b"])


@computed("x")
def files_of_its_own(targets, given):
    targets["x"].copy_(load_bytes(save_bytes({"own": torch.ones(3, 4) * 5}))["own"])
    targets["y"].copy_(given["b"])


@computed("x")
def random_numbers(targets, given):
    targets["x"].copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(3)))
    targets["y"].copy_(given["b"])


@computed("x")
def memory_is_set(targets, given):
    targets["x"].data = given["a"]
    targets["y"].copy_(given["b"])


@computed("x")
def targets_are_transposed(targets, given):
    targets["x"].t_().copy_(given["a"].t())
    targets["y"].copy_(given["b"])


@computed("y")
def out_arguments(targets, given):
    torch.cat([given["a"][:1], given["b"][1:]], out=targets["x"])
    torch.add(given["a"], 1, out=targets["y"])


@computed("x")
def casts_that_cut(targets, given):
    targets["x"].copy_(given["a"].int())
    targets["y"].copy_(given["b"].double())


@computed("x")
def computed_in_threads(targets, given):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: targets["x"].copy_(given["a"] * 2)).result()
    targets["y"].copy_(given["b"])


@pytest.mark.parametrize("load", PLANNED.values(), ids=PLANNED)
def test_planned_load_equals_run(load, tmp_path):
    assert loaded_as_run(tmp_path, load, own_targets).computed == {}


@pytest.mark.parametrize(("load", "names"), COMPUTED.values(), ids=COMPUTED)
def test_computed_load_equals_run(load, names, tmp_path):
    report = loaded_as_run(tmp_path, load, own_targets)
    assert {*report.computed} == {*names}
    assert all(report.computed.values())


@in_module()
def parameters(model, given):
    model.first.weight.weight_loader(model.first.weight, given["a"])
    model.first.bias.data.copy_(given["c"])
    model.second.weight.data[:] = given["b"]
    model.saved.copy_(given["c"])
    model.unsaved.fill_(2)
    model.parts[0][0].weight.data.copy_(given["a"][:2, :2])


@in_module()
def state_dict(model, given):
    model.load_state_dict({"first.weight": given["a"], "first.bias": given["c"]}, strict=False)


@in_module()
def state_dict_assigned(model, given):
    model.load_state_dict({"first.weight": given["a"], "first.bias": given["c"]}, strict=False, assign=True)


@in_module()
def data_set(model, given):
    model.first.weight.data = given["a"]
    model.second.weight.data = torch.ones(3, 4)


@in_module("first.bias", "second.weight")
def data_set_to_values(model, given):
    model.first.weight.data = given["a"].t().bfloat16()
    model.first.bias.data = model.first.bias.data.half()
    model.second.weight.data = torch.tensor(given["b"].tolist())


@in_module("first.bias")
def parameters_set(model, given):
    model.first.weight = nn.Parameter(given["a"], requires_grad=False)
    model.first.bias = nn.Parameter(given["c"] + 1)
    model.second._parameters["weight"] = nn.Parameter(given["b"])
    model.second.register_parameter("bias", nn.Parameter(given["c"]))


@in_module()
def buffers_set(model, given):
    model.register_buffer("saved", given["c"])
    model.register_buffer("new", given["c"].clone())
    model.register_buffer("temporary", given["c"].clone(), persistent=False)
    del model.unsaved
    model.unsaved = nn.Parameter(given["c"].clone())


@in_module()
def removed(model, given):
    del model.second.weight
    model.first.bias = None
    model.first.weight.data.copy_(given["a"])


@in_module()
def tied_by_the_code(model, given):
    model.first.weight.data.copy_(given["a"])
    model.second.weight = model.first.weight


@in_module("first.weight", "second.weight")
def tied_and_computed(model, given):
    model.second.weight = model.first.weight
    model.first.weight.data.copy_(given["a"] * 2)


@in_module("parts.0.0.weight", "saved", "unsaved")
def cast_as_a_whole(model, given):
    model.first.weight.data.copy_(given["a"])
    model.first.bias.data.copy_(given["c"])
    model.second.weight.data.copy_(given["b"])
    model.half()


@in_module("second.weight")
def own_values_turned(model, given):
    model.first.weight.data.copy_(given["a"])
    model.second.weight = nn.Parameter(model.second.weight.data.t(), requires_grad=False)


@in_module("saved", "new", "second.weight")
def without_values(model, given):
    model.first.weight.data.copy_(given["a"])
    model.second.weight = nn.Parameter(torch.empty(2, 0))
    model.saved = torch.empty(0, 5)
    model.register_buffer("new", torch.empty(0, 7))


@in_module("first.bias")
def old_values_of_what_is_moved(model, given):
    model.first.bias.data.copy_(torch.cat([torch.zeros(1), model.saved[1:]]))
    model.saved.data = given["c"].clone()


@in_module("first.weight")
def tensors_that_are_changed_and_read(model, given):
    if given["a"].add_(1)[0, 0].item() == 2 and given["c"][0].item() == 7:
        model.first.weight.data.copy_(given["a"])


@in_module("first.weight")
def sources_changed_through_a_target(model, given):
    model.second.weight.data = given["a"]
    model.second.weight.data.mul_(2)
    model.first.weight.data.copy_(given["a"] + 1)
    model.second.weight.data = given["b"]


@in_module("first.weight")
def sources_that_are_overwritten(model, given):
    given["b"].fill_(2)
    mask = torch.tensor([True, False, True, False])
    model.first.weight.data.copy_(torch.where(mask, given["b"], torch.zeros(4)))


@in_module("first.weight")
def sources_that_others_are_copied_to(model, given):
    given["b"].copy_(given["a"])
    mask = torch.tensor([True, False, True, False])
    model.first.weight.data.copy_(torch.where(mask, given["b"], torch.zeros(4)))


@in_module("first.weight")
def buffers_read(model, given):
    assert model.saved[0].item() < 0
    model.first.weight.data.copy_(given["a"] * 2)
    model.second.weight.data.copy_(given["b"])


@in_module("saved")
def old_values(model, given):
    model.saved.copy_(model.first.bias.data)
    model.first.weight.data.copy_(given["a"])


@in_module("first.weight", "second.weight")
def in_threads(model, given):
    with ThreadPoolExecutor(2) as pool:
        pool.submit(model.first.weight.data.copy_, given["a"] * 2).result()
        pool.submit(lambda: model.second.weight.data.copy_(given["b"] * 2)).result()
        pool.submit(model.saved.copy_, given["c"]).result()


@in_module()
def attributes(model, given):
    model.names.append("x")
    model.settings["nested"].append(2)
    model.plain.fill_(3)
    model.other = 3
    model.train(False)
    model.first.register_forward_hook(print)
    model.first.weight.loaded = True
    model.first.weight.requires_grad_(True)
    model.first.weight.data.copy_(given["a"])


@pytest.mark.parametrize(("load", "names"), IN_MODULE.values(), ids=IN_MODULE)
def test_load_of_module_equals_run(load, names, tmp_path):
    assert {*loaded_as_run(tmp_path, load).computed} == {*names}


@pytest.mark.parametrize("is_filled", [False, True])
def test_target_that_gets_other_memory_leaves_that_of_others(is_filled, tmp_path):
    def make():
        model = Model()
        model.second.weight = nn.Parameter(model.first.weight.data, requires_grad=False)
        return model

    def load(model, given):
        model.second.weight.data = given["b"]
        if is_filled:
            model.first.weight.data.copy_(given["a"])

    assert loaded_as_run(tmp_path, load, make).computed == {}


@pytest.mark.parametrize("load", [parameters, tied_by_the_code], ids=lambda load: load.__name__)
def test_filled_parameters_stay_the_same_objects(load, tmp_path):
    model = Model()
    before = model.first.weight, model.first.weight.data_ptr(), model.names
    load_with(lambda pairs: load(model, dict(pairs)), checkpoint_of(tmp_path), model)
    assert model.first.weight is before[0]
    assert model.first.weight.data_ptr() == before[1]
    assert model.names is before[2]


def test_computed_parameters_stay_the_same_objects(tmp_path):
    model = Model()
    weight = model.first.weight
    load_with(lambda pairs: model.first.weight.data.copy_(dict(pairs)["a"] * 2), checkpoint_of(tmp_path), model)
    assert model.first.weight is weight
    assert bits(weight) == bits(SOURCES["a"] * 2)


@pytest.mark.parametrize("factor", [1, 2])
def test_parameters_that_the_code_holds_itself_are_filled(factor, tmp_path):
    model = Model()
    held = list(model.parameters())
    load_with(lambda pairs: held[0].data.copy_(dict(pairs)["a"] * factor), checkpoint_of(tmp_path), model)
    assert bits(model.first.weight) == bits(SOURCES["a"] * factor)


@pytest.mark.parametrize(
    ("load", "names"),
    [
        (parameters, {"first.weight", "first.bias", "second.weight", "saved", "unsaved", "parts.0.0.weight"}),
        (tied_and_computed, {"first.weight", "second.weight"}),
        (tied_by_the_code, {"first.weight", "second.weight"}),
        (state_dict, {"first.weight", "first.bias"}),
        (buffers_set, {"saved", "unsaved", "new", "temporary"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_module_without_data_gets_what_run_leaves(load, names, tied, tmp_path):
    run, model = Model(tied=tied), Model(tied=tied, device="meta")
    with torch.no_grad():
        load(run, {name: tensor.clone() for name, tensor in SOURCES.items()})
    load_with(lambda pairs: load(model, dict(pairs)), checkpoint_of(tmp_path), model)
    filled = {name: tensor for name, tensor in named_tensors(model).items() if not tensor.is_meta}
    assert names <= filled.keys() <= names | {"second.weight"}
    assert described(filled) == {name: value for name, value in described(run).items() if name in filled}
    assert (model.first.weight is model.second.weight) == (run.first.weight is run.second.weight)
    if load is not buffers_set:
        assert model.first.weight.weight_loader is not None
    assert model.state_dict().keys() == run.state_dict().keys()


ERRORS = [ValueError, KeyboardInterrupt, SystemExit]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("load", [load for load, _ in IN_MODULE.values()], ids=IN_MODULE)
def test_errors_in_the_middle_leave_everything_as_it_was(load, error, tmp_path):
    def failing(pairs):
        load(model, dict(pairs))
        raise error("in the middle")

    model = Model()
    before = everything_of(model)
    path = checkpoint_of(tmp_path)
    with pytest.raises(error, match="in the middle"):
        trace_loader(failing, path, model)
    assert everything_of(model) == before
    with pytest.raises(error, match="in the middle"):
        load_with(failing, path, model)
    assert everything_of(model) == before


@pytest.mark.parametrize("load", [*PLANNED.values(), *(load for load, _ in COMPUTED.values())])
def test_errors_in_the_middle_leave_a_mapping_as_it_was(load, tmp_path):
    def failing(pairs):
        load(targets, dict(pairs))
        raise ValueError("in the middle")

    targets = own_targets()
    before = everything_of(targets)
    with pytest.raises(ValueError, match="in the middle"):
        load_with(failing, checkpoint_of(tmp_path), targets)
    assert everything_of(targets) == before


def test_settings_that_the_code_leaves_changed_are_put_back(tmp_path):
    def load(given):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.manual_seed(5)
        torch.rand(3)
        return given

    before = torch.random.get_rng_state()
    trace_loader(load, checkpoint_of(tmp_path), calls="dict")
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("load", "found"),
    [
        (lambda given: {"x": torch.zeros(3, 4).map_(given["a"], max)}, "map_"),
        (lambda given: setattr(torch.zeros(3, 4), "grad", given["a"]), "gradient"),
    ],
)
def test_steps_that_need_data_are_one_error(load, found, tmp_path):
    with pytest.raises(UnsupportedError, match="does not run on tensors without data") as error:
        load_with(load, checkpoint_of(tmp_path), calls="dict")
    assert found in str(error.value)
    assert "do:" in str(error.value)


def test_values_that_nothing_has_are_one_error(tmp_path):
    unknown = torch.empty(3, device="meta")
    with pytest.raises(ConversionError, match="reads values that nothing has"):
        load_with(lambda given: {"x": torch.full((3,), unknown.sum().item())}, checkpoint_of(tmp_path), calls="dict")


def test_target_made_of_tensors_without_data_is_named(tmp_path):
    unknown = torch.empty(3, device="meta")
    with pytest.raises(ConversionError, match=r"tensors without data\n *where: *x"):
        load_with(lambda given: {**given, "x": unknown + 1}, checkpoint_of(tmp_path), calls="dict")


def test_new_parts_of_a_module_are_named_before_anything_is_read(tmp_path):
    def load(pairs):
        model.new = nn.Linear(4, 3, bias=False)
        model.new.weight.data.copy_(dict(pairs)["a"])
        model.first.weight.data.copy_(dict(pairs).get("b", model.new.weight))

    model = Model()
    before = everything_of(model)
    with pytest.raises(UnsupportedError, match=r"adds a part to the module\n *where: *new\.weight"):
        load_with(load, checkpoint_of(tmp_path), model)
    assert everything_of(model) == before


class Watched:
    """Loading code that keeps what it is called with."""

    def __init__(self, load):
        self.load, self.with_data = load, []

    def __call__(self, given):
        given = dict(given)
        self.with_data.append(sorted(name for name, tensor in given.items() if has_data(tensor)))
        return self.load(given)


@pytest.mark.parametrize(
    ("load", "with_data"),
    [
        (lambda given: {"x": given["a"], "y": given["b"].t()}, [[]]),
        (lambda given: {"x": given["a"] * 2, "y": given["b"]}, [[], ["a"]]),
        (lambda given: {"x": given["a"] + given["c"][0], "y": given["b"]}, [[], ["a", "c"]]),
        (lambda given: {"x": given["a"] * given["c"].sum().item(), "y": given["b"]}, [[], ["c"], ["a", "c"]]),
        (lambda given: {"x": torch.zeros(2).numpy() is None or torch.rand(2), "y": given["b"]}, [[], []]),
        (lambda given: {"x": given["a"] * 2 if given["b"].sum() > 0 else given["c"]}, [[], ["b"], ["a", "b"]]),
    ],
)
def test_code_sees_data_only_where_computed_targets_need_it(load, with_data, tmp_path):
    watched = Watched(load)
    load_with(watched, checkpoint_of(tmp_path), calls="dict")
    assert watched.with_data == with_data


def test_bytes_of_planned_targets_are_read_once(tmp_path):
    report = load_with(
        lambda given: {"x": given["a"], "y": given["b"] * 2}, checkpoint_of(tmp_path), calls="dict"
    ).report
    assert report.bytes_read == SOURCES["a"].nbytes + SOURCES["b"].nbytes
    assert report.left_out == ("c",)
    assert report.computed == {"y": "aten.mul.Tensor"}


@pytest.mark.parametrize("calls", ["pairs", "dict"])
def test_results_may_be_yielded_or_returned(calls, tmp_path):
    def load(given):
        for name, tensor in given if calls == "pairs" else given.items():
            yield f"new {name}", tensor.t() if tensor.dim() == 2 else tensor * 2

    loaded = load_with(load, checkpoint_of(tmp_path), calls=calls)
    expected = {"new a": SOURCES["a"].t(), "new b": SOURCES["b"].t(), "new c": SOURCES["c"] * 2}
    assert list(loaded) == list(expected)
    assert described(loaded) == described(expected)


def test_pairs_that_are_left_over_do_not_matter(tmp_path):
    loaded = load_with(lambda pairs: [next(pairs)], checkpoint_of(tmp_path))
    assert described(loaded) == described({"a": SOURCES["a"]})


def test_budget_for_what_the_code_computes_is_refused(tmp_path):
    directory = checkpoint_of(tmp_path)
    load_with(lambda given: {"x": given["a"].t()}, directory, calls="dict", memory_budget=1 << 20)
    with pytest.raises(UnsupportedError, match=r"memory_budget cannot be kept(?s:.*)found: *\n *x\n"):
        load_with(lambda given: {"x": given["a"] * 2}, directory, calls="dict", memory_budget=1 << 20)


def test_usual_steps_do_not_import_the_compiler_of_torch(tmp_path):
    code = """
import sys, torch, automodel_conv

def load(given):
    a, b = given["a"], given["b"]
    padded = torch.zeros_like(a.repeat(2, 1))
    padded[:3].copy_(b)
    return {
        "x": torch.cat([a, b], 1).t().contiguous(),
        "y": torch.stack([a, b]).bfloat16(),
        "z": padded,
        "scaled": (a * 2 + b[:1]).exp(),
    }

assert {*automodel_conv.load_with(load, sys.argv[1], calls="dict").report.computed} == {"scaled"}
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    command = [sys.executable, "-c", code, str(checkpoint_of(tmp_path))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
