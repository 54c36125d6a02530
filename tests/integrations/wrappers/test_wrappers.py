"""Models that torch and accelerate have wrapped, whole or in parts, at every door: as the model itself, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

pytest.importorskip("transformers", reason="the models are transformers'")

from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import automodel_conv as amc
from automodel_conv.errors import NameProblems, UnsupportedError
from automodel_conv.integrations.dcp import HuggingFaceReader, HuggingFaceWriter
from automodel_conv.testing import POISON, assert_bytes_equal
from automodel_conv.upstream.wrappers import unwrapped
from tests.comparing import assert_same, assert_same_in_order, contents
from tests.model_zoo import build_model, save_upstream

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_place_of(path, wrap):
    """One module of the model is wrapped, and put back."""

    def wrapped(model):
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, wrap(model.get_submodule(path)))
        return model

    return wrapped


def regions(model):
    return pytest.importorskip("accelerate.utils").compile_regions(model)


def compiled_in_place(model):
    model.model.layers[0].compile()
    return model


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def sharded_and_compiled(model):
    model = sharded(model)
    return torch.compile(in_place_of("model.layers.1", torch.compile)(model))


WHOLE = {
    "compiled": torch.compile,
    "compiled over a compiled layer": lambda m: torch.compile(in_place_of("model.layers.0", torch.compile)(m)),
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "DDP of compiled": lambda model: DistributedDataParallel(torch.compile(model)),
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model)),
}
PARTS = {
    "a compiled layer": in_place_of("model.layers.0", torch.compile),
    "compiled experts": in_place_of("model.layers.1.mlp.experts", torch.compile),
    "compiled embeddings": in_place_of("model.embed_tokens", torch.compile),
    "a compiled base model": in_place_of("model", torch.compile),
    "compiled in place": compiled_in_place,
    "a compiled layer in DDP": lambda m: DistributedDataParallel(in_place_of("model.layers.0", torch.compile)(m)),
    "a checkpointed layer": in_place_of("model.layers.0", checkpoint_wrapper),
    "a compiled checkpointed layer": in_place_of("model.layers.0", lambda m: torch.compile(checkpoint_wrapper(m))),
    "compiled regions": regions,
}
SHARDED = {"FSDP2": sharded, "FSDP2 and compiled": sharded_and_compiled}
WAYS = WHOLE | PARTS | SHARDED | {"averaged": AveragedModel}


class Published:
    """A model, and what upstream writes of it."""

    def __init__(self, name, directory):
        self.path = directory
        self.model = build_model(name)
        save_upstream(self.model, self.path, "5GB")
        self.tensors = load_file(self.path / "model.safetensors")

    def wrapped(self, way, *, poisoned=False):
        model = copy.deepcopy(self.model)
        if poisoned:
            for tensor in model.state_dict().values():
                tensor.reshape(-1).view(torch.uint8).fill_(POISON)
        return WAYS[way](model)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return Published("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return Published("qwen2_moe-tied", tmp_path_factory.mktemp("tied"))


EACH = [("mixtral", way) for way in WAYS]
EACH += [("tied", way) for way in ("compiled", "a compiled layer", "compiled embeddings", "FSDP2 and compiled")]


@pytest.fixture
def published(request, name):
    return request.getfixturevalue(name)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def wholes(tensors):
    return {name: whole(tensor) for name, tensor in tensors.items()}


# --- as the model itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), EACH)
def test_a_wrapped_model_is_saved_as_upstream_saves_the_model(published, way, tmp_path):
    amc.save_checkpoint(published.wrapped(way), tmp_path)
    assert contents(tmp_path) == contents(published.path)


@pytest.mark.parametrize(("name", "way"), EACH)
def test_the_very_parameters_of_a_wrapped_model_are_filled(published, way):
    model = published.wrapped(way, poisoned=True)
    before = {id(p): local(p).data_ptr() for p in model.parameters()}
    report = amc.load_model(model, published.path)
    assert report.missing_keys == report.unexpected_keys == ()
    assert {id(p): local(p).data_ptr() for p in model.parameters()} == before
    assert_same_in_order(wholes(unwrapped(model).state_dict()), published.model.state_dict())


@pytest.mark.parametrize(("name", "way"), EACH)
def test_a_state_dict_for_a_wrapped_model_has_the_names_of_the_model(published, way):
    model = published.wrapped(way)
    assert_same_in_order(wholes(amc.load_state_dict(published.path, model)), published.model.state_dict())
    plan, plain = amc.compile_plan(published.path, model), amc.compile_plan(published.path, published.model)
    assert plan.targets == plain.targets
    if way not in SHARDED:
        assert_same_in_order(amc.convert_state_dict(published.tensors, model), published.model.state_dict())


@pytest.mark.parametrize("way", [way for way in WAYS if way not in SHARDED])
def test_the_state_dict_of_a_wrapped_model_is_reverted_to_published_names(mixtral, way):
    model = mixtral.wrapped(way)
    state = model.state_dict() if way != "averaged" else model.module.state_dict()
    assert_same(amc.revert_state_dict(state, model), mixtral.tensors)
    assert_same(amc.revert_state_dict(state, model, reference=mixtral.path), mixtral.tensors)
    out = {name: torch.empty_like(tensor).fill_(7) for name, tensor in mixtral.tensors.items()}
    assert_same(amc.revert_state_dict(state, model, out=out), mixtral.tensors)


@pytest.mark.parametrize("way", WAYS)
def test_rules_of_a_wrapped_model_are_those_of_the_model(mixtral, way):
    def described(model):
        rules = amc.get_model_conversion_mapping(model)
        return [(type(r), r.source_patterns, r.target_patterns, getattr(r, "scope_prefix", None)) for r in rules]

    model = mixtral.wrapped(way)
    assert described(model) == described(mixtral.model)
    rename, expected = (amc.get_combined_key_mapping("mixtral", model=each) for each in (model, mixtral.model))
    assert {name: rename(name) for name in mixtral.tensors} == {name: expected(name) for name in mixtral.tensors}


@pytest.mark.parametrize(
    "way", ["compiled DDP", "a compiled layer in DDP", "a checkpointed layer", "FSDP2 and compiled"]
)
def test_dcp_saves_and_loads_wrapped_models_under_either_names(mixtral, way, tmp_path):
    model = mixtral.wrapped(way)
    for called, state in (("own", model.state_dict()), ("torch", get_model_state_dict(model))):
        dcp.save(state, storage_writer=HuggingFaceWriter(tmp_path / called, model))
        assert contents(tmp_path / called) == contents(mixtral.path)
        for tensor in state.values():
            local(tensor).reshape(-1).view(torch.uint8).fill_(POISON)
        dcp.load(state, storage_reader=HuggingFaceReader(mixtral.path, model))
        assert_same_in_order(wholes(unwrapped(model).state_dict()), mixtral.model.state_dict())


@pytest.mark.parametrize("name", ["mixtral", "tied"])
@pytest.mark.parametrize("way", ["compiled", "a compiled layer", "compiled regions", "a checkpointed layer"])
def test_a_wrapped_model_on_the_meta_device_comes_to_life(published, way):
    with torch.device("meta"):
        model = type(published.model)(published.model.config)
    model = WAYS[way](model)
    amc.load_model(model, published.path, dtype=torch.bfloat16)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert_same(unwrapped(model).state_dict(), published.model.state_dict())
    if published.model.config.tie_word_embeddings:
        plain = unwrapped(model)
        assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_a_dtype_replaces_the_parameters_of_the_wrapped_model_itself(mixtral):
    model = mixtral.wrapped("a compiled layer")
    amc.load_model(model, mixtral.path, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(list(model.parameters())) == len(list(mixtral.model.parameters()))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_a_compiled_tower_has_the_rules_of_its_scope(name, tmp_path):
    published = Published(name, tmp_path / "published")
    model = copy.deepcopy(published.model)
    model.model.language_model = torch.compile(model.model.language_model)
    amc.save_checkpoint(model, tmp_path / "made")
    assert contents(tmp_path / "made") == contents(published.path)
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    amc.load_model(model, published.path)
    assert_same(unwrapped(model).state_dict(), published.model.state_dict())


def test_unwrapping_changes_nothing_of_the_model_and_gives_a_plain_one_back(mixtral):
    assert unwrapped(mixtral.model) is mixtral.model
    compiled = torch.compile(mixtral.model)
    assert unwrapped(compiled) is mixtral.model
    model = mixtral.wrapped("a compiled layer")
    modules, names = list(model.named_modules()), list(model.state_dict())
    plain = unwrapped(model)
    assert list(plain.state_dict()) == list(mixtral.model.state_dict())
    assert list(model.named_modules()) == modules
    assert list(model.state_dict()) == names
    assert type(plain) is type(mixtral.model)


def test_a_layer_that_is_there_twice_is_one_layer_without_its_wrapper():
    layer = nn.Linear(2, 2)
    model = nn.ModuleList([layer, torch.compile(layer), nn.ModuleList()])
    plain = unwrapped(model)
    assert plain[0] is plain[1] is layer
    assert len(plain[2]) == 0


# --- names in files and state dicts -----------------------------------------------------------------------------------


def named(tensors, rename):
    return {rename(name): tensor for name, tensor in tensors.items()}


def in_layers(name):
    return name.replace("layers.0.", "layers.0._orig_mod.").replace("experts.", "experts._orig_mod.")


NAMES = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parts": in_layers,
    "DDP": lambda name: f"module.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{in_layers(name)}",
}


@pytest.mark.parametrize("kind", NAMES)
def test_files_of_a_wrapped_model_load_and_convert_as_those_of_the_model(mixtral, tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    for file, data in contents(mixtral.path).items():
        (source / file).write_bytes(data)
    save_file(named(mixtral.tensors, NAMES[kind]), source / "model.safetensors", metadata={"format": "pt"})
    expected = mixtral.model.state_dict()
    assert_same_in_order(amc.load_state_dict(source), expected)
    assert_same_in_order(amc.load_state_dict(source, mixtral.model), expected)
    model = mixtral.wrapped("a compiled layer", poisoned=True)
    amc.load_model(model, source)
    assert_same_in_order(unwrapped(model).state_dict(), expected)
    assert_same_in_order(amc.convert_state_dict(load_file(source / "model.safetensors"), mixtral.model), expected)
    for layout in (None, "nemo", "per_expert"):
        amc.convert_checkpoint(source, tmp_path / f"made {layout}", layout=layout)
        amc.convert_checkpoint(mixtral.path, tmp_path / f"plain {layout}", layout=layout)
        assert contents(tmp_path / f"made {layout}") == contents(tmp_path / f"plain {layout}")
    assert amc.open_checkpoint(source).names == sorted(map(NAMES[kind], mixtral.tensors)) or kind == "parts"


@pytest.mark.parametrize("kind", ["compiled", "parts"])
def test_state_dicts_of_a_wrapped_model_are_taken_apart_by_rules_alone(mixtral, tmp_path, kind):
    state = named(mixtral.model.state_dict(), NAMES[kind])
    rules = amc.get_model_conversion_mapping(mixtral.model)
    assert_same(amc.revert_state_dict(state, rules=rules), mixtral.tensors)
    amc.save_checkpoint(state, tmp_path, rules=rules)
    assert_same(load_file(tmp_path / "model.safetensors"), mixtral.tensors)


def test_a_reference_gives_its_own_names_back(mixtral, tmp_path):
    file = tmp_path / "model.safetensors"
    stored = named(mixtral.tensors, NAMES["compiled DDP"])
    save_file(stored, file)
    assert_same(amc.revert_state_dict(mixtral.model.state_dict(), mixtral.model, reference=file), stored)
    amc.save_checkpoint(mixtral.model, tmp_path / "made", reference=file)
    assert_same(load_file(tmp_path / "made" / "model.safetensors"), stored)


def test_without_anything_to_name_tensors_by_all_names_are_kept(mixtral, tmp_path):
    state = named(mixtral.model.state_dict(), NAMES["compiled DDP"])
    amc.save_checkpoint(state, tmp_path, rules=[])
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    assert amc.load_state_dict(tmp_path, rules=[]).keys() == state.keys()


def test_names_that_become_one_are_told():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    state = {"0.weight": torch.ones(2, 2), "0._orig_mod.weight": torch.ones(2, 2)}
    with pytest.raises(NameProblems, match=r"0\.weight <- 0\.weight, 0\._orig_mod\.weight") as caught:
        amc.convert_state_dict(state, model)
    assert caught.value.duplicated == (("0.weight", ("0.weight", "0._orig_mod.weight")),)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)


def test_a_model_with_a_module_called_module_keeps_it():
    state = Held().state_dict()
    assert_same_in_order(amc.convert_state_dict(state, Held()), state)
    assert_same_in_order(amc.revert_state_dict(state, Held()), state)
    wrapped = nn.DataParallel(Held()).state_dict()  # module.module.weight: nothing says which of both is the model's
    with pytest.raises(NameProblems, match=r"module\.module\.weight"):
        amc.convert_state_dict(wrapped, Held())


class Original(nn.Module):
    """Not a wrapper, for all its name: what it holds beside ``_orig_mod`` is its own."""

    def __init__(self, beside):
        super().__init__()
        self._orig_mod = nn.Linear(2, 2)
        if beside == "a module":
            self.other = nn.Linear(2, 2)
        if beside == "a parameter":
            self.other = nn.Parameter(torch.ones(2))
        if beside == "a buffer":
            self.register_buffer("other", torch.ones(2))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel])
@pytest.mark.parametrize("beside", ["a module", "a parameter", "a buffer"])
def test_a_model_with_a_module_called_orig_mod_beside_others_keeps_all(beside, wrap, tmp_path):
    model = Original(beside)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = wrap(model)
    amc.save_checkpoint(wrapped, tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), state)
    assert_same_in_order(amc.convert_state_dict(state, wrapped), state)
    assert_same_in_order(amc.revert_state_dict(state, wrapped), state)
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    amc.load_model(wrapped, tmp_path)
    assert_same(model.state_dict(), state)
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    dcp.load(model.state_dict(), storage_reader=HuggingFaceReader(tmp_path, model))
    assert_same(model.state_dict(), state)


def test_only_names_that_all_begin_with_module_are_of_data_parallelism():
    state = {"module.0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)}
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with pytest.raises(NameProblems, match=r"module\.0\.weight"):
        amc.convert_state_dict(state, model)


# --- refused ----------------------------------------------------------------------------------------------------------


def refusals(model, published, tmp_path):
    """What each door says of a model that it does not take."""
    state = published.model.state_dict()
    doors = {
        "save_checkpoint": lambda: amc.save_checkpoint(model, tmp_path / "made"),
        "revert_state_dict": lambda: amc.revert_state_dict(state, model),
        "convert_state_dict": lambda: amc.convert_state_dict(published.tensors, model),
        "load_model": lambda: amc.load_model(model, published.path),
        "load_state_dict": lambda: amc.load_state_dict(published.path, model),
        "compile_plan": lambda: amc.compile_plan(published.path, model),
        "HuggingFaceReader": lambda: HuggingFaceReader(published.path, model),
        "HuggingFaceWriter": lambda: HuggingFaceWriter(tmp_path / "made", model),
    }
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    said = {}
    for name, door in doors.items():
        with pytest.raises(UnsupportedError) as caught:
            door()
        said[name] = str(caught.value)
    assert not (tmp_path / "made").exists()
    for name, tensor in model.named_parameters():
        assert_bytes_equal(tensor, before[name])
    return set(said.values())


def test_fsdp1_is_refused_at_every_door_with_advice(mixtral, tmp_path):
    model = FullyShardedDataParallel(copy.deepcopy(mixtral.model), device_id=torch.device("cpu"))
    [text] = refusals(model, mixtral, tmp_path)
    assert "fully_shard (FSDP2)" in text
    assert "get_model_state_dict" in text


class AdaptedLinear(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, 2, bias=False)


def lora(**where):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, **where)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def peft_model(model, **where):
    return pytest.importorskip("peft").get_peft_model(model, lora(**where))


def prompted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def with_own_adapter(model):
    model.add_adapter(lora(target_modules=["q_proj"]))
    return model


ADAPTED = {
    "stand-in": in_place_of("model.layers.0.self_attn.q_proj", AdaptedLinear),
    "attention": lambda m: peft_model(m, target_modules=["q_proj"]),
    "its inner model": lambda m: peft_model(m, target_modules=["q_proj"]).base_model.model,
    "experts": lambda m: peft_model(m, target_modules=[], target_parameters=EXPERTS),
    "inner model of experts": lambda m: peft_model(m, target_modules=[], target_parameters=EXPERTS).base_model.model,
    "compiled": lambda m: torch.compile(peft_model(m, target_modules=["q_proj"])),
    "of a compiled layer": lambda m: peft_model(PARTS["a compiled layer"](m), target_modules=["v_proj"]),
    "modules to save": lambda m: peft_model(m, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "prompts": prompted,
    "add_adapter": with_own_adapter,
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_are_refused_at_every_door_with_what_to_call(mixtral, kind, tmp_path):
    [text] = refusals(ADAPTED[kind](copy.deepcopy(mixtral.model)), mixtral, tmp_path)
    assert "adapters of PEFT are not converted" in text
    for call in ("merge_and_unload()", "save_pretrained()", "Load the base model before"):
        assert call in text


@pytest.mark.parametrize("kind", ["stand-in", "attention", "inner model of experts"])
def test_names_of_adapted_layers_are_refused_without_the_model_too(mixtral, kind, tmp_path):
    state = ADAPTED[kind](copy.deepcopy(mixtral.model)).state_dict()
    rules = amc.get_model_conversion_mapping(mixtral.model)
    for call in (amc.revert_state_dict, amc.convert_state_dict):
        with pytest.raises(UnsupportedError, match=r"(?s)adapters of PEFT.*base_layer.*merge_and_unload"):
            call(state, rules=rules)
    with pytest.raises(UnsupportedError, match="adapters of PEFT"):
        amc.save_checkpoint(state, tmp_path / "made", rules=rules)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "where", [{"target_modules": ["q_proj"]}, {"target_modules": [], "target_parameters": EXPERTS}]
)
def test_what_is_merged_is_saved_as_upstream_saves_it(mixtral, tmp_path, where):
    adapted = peft_model(copy.deepcopy(mixtral.model), init_lora_weights=False, **where)
    merged = adapted.merge_and_unload()
    amc.save_checkpoint(merged, tmp_path / "ours")
    save_upstream(merged, tmp_path / "upstream", "5GB")
    assert contents(tmp_path / "ours") == contents(tmp_path / "upstream")
    assert contents(tmp_path / "ours") != contents(mixtral.path)


# --- rules that meet nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "nemotron_h"])
def test_grouped_experts_that_rules_do_not_meet_are_named(model_type, tmp_path):
    model = build_model(model_type)
    rules = amc.get_model_conversion_mapping(model)
    assert amc.revert_state_dict(model.state_dict(), rules=rules)
    # Without the modules that patterns of this type name beside the experts.
    odd = {
        name.replace("mlp.experts", "moe.experts").replace("mixer.experts", "moe.experts"): t
        for name, t in model.state_dict().items()
    }
    with pytest.raises(UnsupportedError, match=r"(?s)no rule takes these experts apart.*moe\.experts\..*_proj"):
        amc.revert_state_dict(odd, rules=rules)
    with pytest.raises(UnsupportedError, match="no rule takes these experts apart"):
        amc.save_checkpoint(odd, tmp_path / "made", rules=rules)
    assert not (tmp_path / "made").exists()


def test_rules_that_meet_nothing_are_fine_where_there_are_no_experts(mixtral):
    state = {name: tensor for name, tensor in mixtral.model.state_dict().items() if "experts" not in name}
    expected = {name: tensor for name, tensor in mixtral.tensors.items() if "experts" not in name}
    assert_same(amc.revert_state_dict(state, mixtral.model), expected)
    assert amc.revert_state_dict({}, mixtral.model) == {}


def test_a_stage_of_a_pipeline_is_taken_apart_as_far_as_it_goes(mixtral):
    state = {name: tensor for name, tensor in mixtral.model.state_dict().items() if ".layers.1." in name}
    expected = {name: tensor for name, tensor in mixtral.tensors.items() if ".layers.1." in name}
    assert_same(amc.revert_state_dict(state, mixtral.model), expected)
