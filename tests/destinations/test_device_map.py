"""``device_map``: looked up as accelerate does, refused before anything is read if it does not fit, and obeyed."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.destinations import device_map as device_map_module
from automodel_conv.destinations.device_map import DeviceMap
from automodel_conv.destinations.devices import as_device, loadable
from automodel_conv.execution import device as streaming
from automodel_conv.execution import filling, mapping
from automodel_conv.execution import host as cpu
from automodel_conv.execution.buffers import allocate
from automodel_conv.testing import POISON, assert_bytes_equal
from tests.execution.elsewhere import FIRST, HOST, SECOND, Devices, Elsewhere, put

TENSORS = {
    "embed.weight": torch.arange(1200.0).reshape(30, 40),
    "layers.1.weight": torch.arange(7.0),
    "layers.10.weight": torch.arange(9.0),
    "head.weight": torch.arange(1200.0).reshape(30, 40) + 0.5,
}
MAP = {"embed": 0, "layers.1": 1, "layers.10": "cpu", "": "cuda:1"}
WHERE = {"embed.weight": FIRST, "layers.1.weight": SECOND, "layers.10.weight": HOST, "head.weight": SECOND}


class Weight(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class Model(nn.Module):
    """Parameters of the names of ``TENSORS``."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.head = Weight(30, 40), Weight(30, 40)
        self.layers = nn.ModuleDict({"1": Weight(7), "10": Weight(9)})
        if tied:
            self.head.weight = self.embed.weight


@pytest.fixture
def published(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """All reads of tensor data."""
    seen = []
    for module in (cpu, streaming):
        stock = module.read

        def noted(reads, *how, stock=stock):
            seen.append(reads)
            return stock(reads, *how)

        monkeypatch.setattr(module, "read", noted)
    return seen


@pytest.fixture
def devices(monkeypatch):
    """Two CUDA devices as far as loads can see: ``FIRST`` and ``SECOND``, in host memory."""
    made, empty_like = Devices(), torch.empty_like

    def there(device, where=None):
        device = as_device(device, where)
        return (
            torch.device("xpu", device.index or 0)
            if device.type == "cuda" and (device.index or 0) < 2
            else loadable(device, where)
        )

    def allocate_there(targets, device="cpu"):
        return {name: put(tensor, torch.device(device)) for name, tensor in allocate(targets).items()}

    def empty_like_there(tensor, *, device):
        return put(empty_like(tensor, device="cpu"), torch.device(device))

    monkeypatch.setattr(device_map_module, "loadable", there)
    monkeypatch.setattr(filling, "transfer_device", made)
    monkeypatch.setattr(mapping, "allocate", allocate_there)
    monkeypatch.setattr(torch, "empty_like", empty_like_there)
    return made


def meta(model):
    return model.to("meta")


def tied():
    with torch.device("meta"):
        return Model(tied=True)


def poisoned(model):
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    return model


def assert_loaded(state, where, wanted=TENSORS):
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert tensor.device == where[name], name
        assert_bytes_equal(tensor.as_subclass(torch.Tensor), wanted[name])


# --- looking names up -------------------------------------------------------------------------------------------------


def simple(entries):
    """A map to devices that are no devices, but numbers."""
    made = DeviceMap({})
    made.entries = entries
    return made


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.1.mlp.weight", "layer 1"),
        ("model.layers.10.mlp.weight", "rest"),
        ("model.layers.1", "layer 1"),
        ("model.layers", "rest"),
        ("model.layers.1.norm.weight", "norm"),
        ("model.layers.1.norm.weights", "layer 1"),
        ("lm_head.weight", "rest"),
    ],
)
def test_the_longest_name_of_whole_components_decides(name, wanted):
    entries = {"": "rest", "model.layers.1": "layer 1", "model.layers.1.norm.weight": "norm"}
    assert simple(entries).device_of(name) == wanted


def test_what_no_name_begins_is_covered_by_the_empty_one_only():
    assert simple({"a": "first"}).device_of("b.weight") is None
    assert simple({"a": "first", "": "rest"}).device_of("b.weight") == "rest"


paths = st.lists(st.sampled_from(["a", "ab", "layers", "1", "10"]), min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(paths | st.just(""), st.integers(0, 7), max_size=6), paths)
def test_names_are_looked_up_as_accelerate_does(entries, name):
    modeling = pytest.importorskip("accelerate.utils.modeling")
    try:
        wanted = modeling._get_param_device(name, entries)
    except ValueError:
        wanted = None
    assert simple(entries).device_of(name) == wanted


def test_numbers_are_cuda_devices(devices):
    assert DeviceMap({"a": 0, "b": "cuda:1", "c": torch.device("cuda", 1), "d": "cpu", "e": "cpu:0"}).entries == {
        "a": FIRST, "b": SECOND, "c": SECOND, "d": HOST, "e": HOST,
    }  # fmt: skip


# --- loads ------------------------------------------------------------------------------------------------------------


def test_a_state_dict_lies_where_the_map_says(published, devices):
    for arguments in ({"model": meta(Model())}, {"rules": []}):
        loaded = amc.load_state_dict(published, device_map=MAP, **arguments)
        assert_loaded(loaded, WHERE)
        assert all(isinstance(loaded[name], Elsewhere) == (home != HOST) for name, home in WHERE.items())
    assert devices.keys() == {FIRST, SECOND}


def test_new_parameters_lie_where_the_map_says(published, devices):
    model = meta(Model())
    report = amc.load_model(model, published, device_map=MAP)
    assert_loaded(model.state_dict(keep_vars=True), WHERE)
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    assert report.bytes_read == sum(tensor.nbytes for tensor in TENSORS.values())


def test_devices_of_a_map_are_filled_at_the_same_time(published, devices, monkeypatch):
    meeting, stock = threading.Barrier(3, timeout=30), filling._fill_device

    def met(*arguments):
        meeting.wait()
        return stock(*arguments)

    monkeypatch.setattr(filling, "_fill_device", met)
    amc.load_state_dict(published, rules=[], device_map=MAP)


def test_parameters_that_have_memory_are_filled_in_place_if_the_map_agrees(published):
    model = poisoned(Model())
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    amc.load_model(model, published, device_map={"": "cpu"})
    assert_loaded(model.state_dict(), dict.fromkeys(TENSORS, HOST))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places


def test_parameters_that_have_memory_elsewhere_are_refused(published, devices, reads):
    model = poisoned(Model())
    with pytest.raises(amc.ConversionError, match=r"filled where they are[\s\S]*embed.weight: xpu:0 in the map, cpu"):
        amc.load_model(model, published, device_map=MAP)
    assert reads == []
    assert all((tensor.view(torch.uint8) == POISON).all() for tensor in model.state_dict().values())


def test_a_parameter_elsewhere_is_refused_though_the_checkpoint_lacks_it(tmp_path, devices, reads):
    save_file({name: TENSORS[name] for name in TENSORS if name != "head.weight"}, tmp_path / "model.safetensors")
    model = meta(Model())
    model.head = Weight(30, 40)
    with pytest.raises(amc.ConversionError, match=r"filled where they are[\s\S]*head.weight: xpu:1 in the map, cpu"):
        amc.load_model(model, tmp_path, device_map=MAP, strict=False)
    assert reads == []


def test_parameters_of_another_dtype_are_replaced_where_they_were(published, devices):
    model = Model().to(torch.float64)
    with pytest.raises(amc.ConversionError, match="filled where they are"):
        amc.load_model(model, published, device_map=MAP, dtype=torch.float32)
    amc.load_model(model, published, device_map={"": "cpu"}, dtype=torch.float32)
    assert_loaded(model.state_dict(), dict.fromkeys(TENSORS, HOST))


def mixtral(tmp_path):
    from tests.model_zoo import build_model, write_checkpoint

    write_checkpoint(build_model("mixtral"), tmp_path)
    return build_model("mixtral")


def test_a_map_that_accelerate_has_made_places_every_tensor_of_a_model(tmp_path, devices):
    pytest.importorskip("transformers", reason="the model is one of transformers")
    accelerate = pytest.importorskip("accelerate")
    model = mixtral(tmp_path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    device_map = accelerate.infer_auto_device_map(
        model,
        max_memory={0: size * 2 // 3, 1: size * 2 // 3, "cpu": size},
        no_split_module_classes=["MixtralDecoderLayer"],
    )
    assert set(device_map.values()) == {0, 1}
    wanted = amc.load_state_dict(tmp_path)
    computed = {name: buffer.clone() for name, buffer in model.named_buffers()}
    amc.load_model(meta(model), tmp_path, device_map=device_map)
    where = {name: DeviceMap(device_map).device_of(name) for name in (*wanted, *computed)}
    assert_loaded(model.state_dict(keep_vars=True), where, wanted)
    for name, buffer in model.named_buffers():
        assert buffer.device == where[name]
        assert_bytes_equal(buffer.as_subclass(torch.Tensor), computed[name])
    assert_loaded(amc.load_state_dict(tmp_path, device_map=device_map), where, wanted)


@pytest.mark.parametrize("rotary", [FIRST, HOST])
def test_computed_buffers_go_where_their_module_does(tmp_path, devices, rotary):
    pytest.importorskip("transformers", reason="the model is one of transformers")
    model = mixtral(tmp_path)
    computed = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert computed
    amc.load_model(meta(model), tmp_path, device_map={"": 1, "model.rotary_emb": 0 if rotary == FIRST else "cpu"})
    for name, buffer in model.named_buffers():
        assert buffer.device == rotary
        assert_bytes_equal(buffer.as_subclass(torch.Tensor), computed[name])


def test_a_computed_buffer_that_no_entry_covers_is_named(tmp_path, devices):
    pytest.importorskip("transformers", reason="the model is one of transformers")
    model = mixtral(tmp_path)
    device_map = dict.fromkeys(["model.embed_tokens", "model.layers", "model.norm", "lm_head"], 0)
    with pytest.raises(amc.ConversionError, match=r"gives no device[\s\S]*model\.rotary_emb\.inv_freq"):
        amc.load_model(meta(model), tmp_path, device_map=device_map)


def empty_copy(model, build):
    """A model of the same config, as callers build it whose parameters shall have no memory yet."""
    accelerate = pytest.importorskip("accelerate") if build == "init_empty_weights" else None
    with torch.device("meta") if accelerate is None else accelerate.init_empty_weights():
        return type(model)._from_config(model.config, dtype=torch.bfloat16)


def zoo_model(name):
    """A tiny model of a type, or ``"tied"``: one whose head is its embedding."""
    from tests.model_zoo import build_model

    if name != "tied":
        return build_model(name)
    config = build_model("mixtral").config
    config.tie_word_embeddings = True
    return type(build_model("mixtral"))._from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("build", ["meta device", "init_empty_weights"])
@pytest.mark.parametrize("name", ["mixtral", "tied", "deepseek_v3", "qwen3_vl_moe"])
def test_every_tensor_of_an_empty_model_goes_where_the_map_says(tmp_path, devices, name, build):
    pytest.importorskip("transformers", reason="the model is one of transformers")
    from tests.model_zoo import write_checkpoint

    full = zoo_model(name)
    write_checkpoint(full, tmp_path)
    wanted = {name: tensor.detach() for name, tensor in full.state_dict(keep_vars=True).items()}
    wanted |= dict(full.named_buffers())
    rotary = next(name for name in wanted if name.endswith("inv_freq")).rpartition(".")[0]
    device_map = {"": 1, rotary: 0, "lm_head": 1}
    model = empty_copy(full, build)
    # The dtype, because a buffer with memory would keep its own, where a new one of some is float32.
    report = amc.load_model(model, tmp_path, device_map=device_map, dtype=torch.bfloat16)
    assert report.missing_keys == ()
    found = model.state_dict(keep_vars=True) | dict(model.named_buffers())
    assert_loaded(found, {name: DeviceMap(device_map).device_of(name) for name in wanted}, wanted)
    if name == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("build", ["meta device", "init_empty_weights"])
def test_a_lenient_load_places_what_there_is(tmp_path, devices, build):
    pytest.importorskip("transformers", reason="the model is one of transformers")
    full = mixtral(tmp_path)
    tensors = amc.load_state_dict(tmp_path, rules=[])
    del tensors["lm_head.weight"], tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "some.safetensors")
    model = empty_copy(full, build)
    device_map = {"": 1, "no.such.module": 0}
    report = amc.load_model(model, tmp_path / "some.safetensors", device_map=device_map, strict=False)
    assert set(report.missing_keys) == {"lm_head.weight", "model.norm.weight"}
    for name, tensor in (model.state_dict(keep_vars=True) | dict(model.named_buffers())).items():
        assert tensor.device == (torch.device("meta") if name in report.missing_keys else SECOND), name


class Buffered(nn.Module):
    """A parameter, a buffer of the checkpoint, and one that no checkpoint holds."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(7))
        self.register_buffer("steps", torch.zeros(3))
        self.register_buffer("table", table, persistent=False)


BUFFERED = {"weight": torch.arange(7.0), "steps": torch.arange(3.0)}


@pytest.fixture
def buffered(tmp_path):
    """Three modules on the meta device with buffers on the CPU, one table for all of them, and their checkpoint."""
    table = torch.arange(5.0)
    model = nn.ModuleDict({name: Buffered(table) for name in "abc"})
    for module in model.values():
        module.weight = nn.Parameter(module.weight.to("meta"))
    tensors = {f"{m}.{name}": tensor.clone() for m in "abc" for name, tensor in BUFFERED.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    return model, tmp_path / "m.safetensors"


def test_buffers_that_have_memory_are_moved(buffered, devices):
    model, file = buffered
    amc.load_model(model, file, device_map={"a": 0, "": 1})
    for module, home in zip(model.values(), (FIRST, SECOND, SECOND), strict=True):
        wanted = BUFFERED | {"table": torch.arange(5.0)}
        found = dict(module.named_parameters()) | dict(module.named_buffers())
        assert_loaded(found, dict.fromkeys(wanted, home), wanted)
    assert model["b"].table is model["c"].table
    assert model["a"].table is not model["b"].table


def test_a_buffer_that_the_checkpoint_lacks_is_moved_as_it_is(buffered, devices):
    model, file = buffered
    save_file({f"{m}.weight": BUFFERED["weight"].clone() for m in "abc"}, file)
    report = amc.load_model(model, file, device_map={"": 1}, strict=False)
    assert report.missing_keys == ("a.steps", "b.steps", "c.steps")
    assert_loaded(dict(model["a"].named_buffers(recurse=False)), {"steps": SECOND, "table": SECOND}, {
        "steps": torch.zeros(3), "table": torch.arange(5.0),
    })  # fmt: skip


def test_a_load_that_fails_moves_no_buffer(buffered, devices):
    model, file = buffered
    devices[FIRST].fail_at = 1
    before = dict(model.named_buffers(remove_duplicate=False))
    with pytest.raises(RuntimeError, match="an illegal access"):
        amc.load_model(model, file, device_map={"": 0})
    after = dict(model.named_buffers(remove_duplicate=False))
    assert all(after[name] is buffer for name, buffer in before.items())


def test_buffers_stay_where_they_are_without_a_map(buffered):
    model, file = buffered
    before = dict(model.named_buffers(remove_duplicate=False))
    amc.load_model(model, file)
    assert all(buffer is before[name] for name, buffer in model.named_buffers(remove_duplicate=False))


def test_a_buffer_that_has_memory_and_no_entry_is_named(buffered, devices, reads):
    model, file = buffered
    device_map = {f"{m}.{name}": 1 for m in "abc" for name in BUFFERED}
    with pytest.raises(amc.ConversionError, match=r"gives no device to 3 of 9[\s\S]*a\.table"):
        amc.load_model(model, file, device_map=device_map)
    assert reads == []


# --- maps that do not fit ---------------------------------------------------------------------------------------------


def both(path, model, **arguments):
    """The two loads that take a map."""
    return (
        lambda: amc.load_state_dict(path, model(), **arguments),
        lambda: amc.load_model(model(), path, **arguments),
    )


def test_tensors_that_no_entry_covers_are_named_before_anything_is_read(published, devices, reads):
    device_map = {name: device for name, device in MAP.items() if name not in ("", "layers.10")}
    for load in both(published, lambda: meta(Model()), device_map=device_map):
        with pytest.raises(amc.ConversionError) as raised:
            load()
        text = str(raised.value)
        assert "gives no device to 2 of 4 tensors" in text
        assert "layers.10.weight" in text
        assert "head.weight" in text
        assert "embed" not in text
        assert '""' in text
    assert reads == []


def test_an_entry_that_names_nothing_is_refused_unless_the_load_is_lenient(published, devices, reads):
    device_map = MAP | {"layer.1": 0}
    for load in both(published, lambda: meta(Model()), device_map=device_map):
        with pytest.raises(amc.ConversionError, match=r"no module and no parameter[\s\S]*layer\.1"):
            load()
    assert reads == []
    for arguments in ({"model": meta(Model())}, {"rules": []}):
        assert_loaded(amc.load_state_dict(published, device_map=device_map, strict=False, **arguments), WHERE)


def test_rules_alone_do_not_say_which_modules_there_are(published, devices):
    device_map = MAP | {"rotary_emb": 0, "layers.0.act_fn": "cpu"}
    assert_loaded(amc.load_state_dict(published, rules=[], device_map=device_map), WHERE)


def test_names_of_one_tensor_go_to_one_device(tmp_path, devices, reads):
    save_file(
        {name: tensor for name, tensor in TENSORS.items() if name != "head.weight"}, tmp_path / "model.safetensors"
    )
    for load in both(tmp_path, tied, device_map=MAP):
        with pytest.raises(amc.ConversionError, match=r"embed.weight and head.weight are one[\s\S]*xpu:0, xpu:1"):
            load()
    assert reads == []
    for device_map in (MAP | {"head": 0}, MAP | {"embed": 1}):
        home = DeviceMap(device_map).device_of("head.weight")
        model = tied()
        amc.load_model(model, tmp_path, device_map=device_map)
        assert model.head.weight is model.embed.weight
        assert model.head.weight.device == home
        loaded = amc.load_state_dict(tmp_path, tied(), device_map=device_map)
        assert loaded["head.weight"] is loaded["embed.weight"]
        assert loaded["head.weight"].device == home


@pytest.mark.parametrize(
    ("device_map", "kind", "text"),
    [
        ({"": "cpu", "head": "disk"}, amc.UnsupportedError, r"the disk[\s\S]*'head'[\s\S]*offload_folder"),
        ({"": 0}, amc.UnsupportedError, "cannot load to cuda:0"),
        ({"": "cuda:99"}, amc.UnsupportedError, "cannot load to cuda:99"),
        ({"": "mps"}, amc.UnsupportedError, "cannot load to mps"),
        ({"": "meta"}, amc.UnsupportedError, r"meta device holds no data[\s\S]*compile_plan"),
        ({"": -1}, amc.UnsupportedError, r"not a device[\s\S]*cpu[\s\S]*-1"),
        ({"": 300}, amc.UnsupportedError, r"not a device[\s\S]*300"),
        ({"": "cuda:256"}, amc.UnsupportedError, r"not a device[\s\S]*cuda:256"),
        ({"": 2**70}, amc.UnsupportedError, "not a device"),
        ({"": True}, amc.ConversionError, r"not a device[\s\S]*True"),
        ({"": None}, amc.ConversionError, r"not a device[\s\S]*None"),
        ({"embed": "gpu"}, amc.ConversionError, r"where: +device_map\['embed'\]"),
        ({1: "cpu"}, amc.ConversionError, r"takes names[\s\S]*device_map\[1\]"),
        ("auto", amc.ConversionError, r"not a mapping[\s\S]*'auto'[\s\S]*infer_auto_device_map"),
        ("cuda:0", amc.ConversionError, r"not a mapping[\s\S]*device= is for one device"),
        (0, amc.ConversionError, "not a mapping"),
    ],
)
def test_a_map_that_cannot_be_is_refused_before_anything_is_opened(tmp_path, device_map, kind, text):
    if torch.cuda.is_available() and device_map == {"": 0}:
        pytest.skip("there is such a device")
    for load in both(tmp_path / "nowhere", lambda: meta(Model()), device_map=device_map):
        with pytest.raises(kind, match=text):
            load()


@pytest.mark.parametrize("kind", [str, torch.device])
def test_a_device_and_a_map_exclude_each_other(published, kind):
    for load in both(published, lambda: meta(Model()), device_map={"": "cpu"}, device=kind("cuda:0")):
        with pytest.raises(amc.ConversionError, match="exclude each other"):
            load()
    # The default of one load is the CPU, that of the other is none.
    to_a_dict, to_a_model = both(published, lambda: meta(Model()), device_map={"": "cpu"}, device=kind("cpu"))
    assert_loaded(to_a_dict(), dict.fromkeys(TENSORS, HOST))
    with pytest.raises(amc.ConversionError, match="exclude each other"):
        to_a_model()


def test_parameters_that_a_mesh_places_are_refused(published, devices, monkeypatch):
    monkeypatch.setattr(device_map_module, "is_distributed", lambda tensor: True)
    for load in both(published, lambda: meta(Model()), device_map=MAP):
        with pytest.raises(amc.UnsupportedError, match=r"these are DTensors[\s\S]*embed\.weight"):
            load()


# --- memory -----------------------------------------------------------------------------------------------------------

LEAST = 2 * 2 * streaming.LEAST_SCRATCH_BYTES + cpu.LEAST_SCRATCH_BYTES
"""The least of a ring and windows for each of two devices, and of a scratch for the host."""


@pytest.mark.parametrize("budget", [60_000, 100_000, 1 << 20, 1 << 40])
@pytest.mark.parametrize("threads", [None, 1, 3, 8])
def test_all_devices_together_stay_within_the_budget(published, devices, budget, threads):
    # Cast, so that everything goes through windows and scratch.
    loaded = amc.load_state_dict(
        published, rules=[], device_map=MAP, dtype=torch.bfloat16, memory_budget=budget, threads=threads
    )
    assert 0 < loaded.report.peak_extra_bytes <= budget
    assert 0 < sum(device.pinned_bytes + device.scratch_bytes for device in devices.values()) <= budget
    assert_loaded(loaded, WHERE, {name: tensor.to(torch.bfloat16) for name, tensor in TENSORS.items()})


def test_a_budget_too_small_for_all_devices_is_refused_and_what_is_asked_for_is_enough(published, devices, reads):
    with pytest.raises(amc.ConversionError, match="no load fits") as raised:
        amc.load_state_dict(published, rules=[], device_map=MAP, memory_budget=LEAST - 1)
    assert reads == []
    needed = int(str(raised.value).split("at least ")[1].split()[0])
    loaded = amc.load_state_dict(published, rules=[], device_map=MAP, memory_budget=needed)
    assert loaded.report.peak_extra_bytes <= needed
    assert_loaded(loaded, WHERE)


def test_a_device_that_fails_leaves_a_model_as_it_was_and_names_what_was_filled(published, devices):
    devices[FIRST].fail_at = 1
    model = meta(Model())
    with pytest.raises(RuntimeError, match="an illegal access") as raised:
        amc.load_model(model, published, device_map=MAP)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert "embed.weight" not in "".join(getattr(raised.value, "__notes__", ()))
