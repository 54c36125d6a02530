"""Tests of NeMo AutoModel with this package's rules: adapters against its own, and its checkpointer.

Tests that need it are skipped if it is not installed; ``make test-nemo`` installs it.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="uses rules of transformers")

from safetensors.torch import load_file, save_file

import automodel_conv as amc
from automodel_conv import conversion_mapping
from automodel_conv.integrations import nemo
from automodel_conv.integrations.nemo import StateDictAdapter
from automodel_conv.testing import POISON, address_valued, assert_bytes_equal
from tests.comparing import assert_same
from tests.model_zoo import build_model, write_checkpoint, zoo_names

needs_nemo = pytest.mark.skipif(
    importlib.util.find_spec("nemo_automodel") is None, reason="nemo_automodel is not installed"
)
E, INNER, H = 4, 6, 10
MERGING = frozenset(conversion_mapping.MODELS_REQUIRING_TENSOR_MERGING)
BF16 = torch.bfloat16


def experts(path, gated=True):
    shapes = {"gate_proj": (INNER, H)} if gated else {}
    shapes |= {"up_proj": (INNER, H), "down_proj": (H, INNER)}
    return {
        f"{path}.{e}.{name}.weight": address_valued(shape, BF16, 1000 * e + 100 * k)
        for e in range(E)
        for k, (name, shape) in enumerate(shapes.items())
    }


def others(path, *names):
    return {f"{path}.{name}": address_valued((H,), BF16, 9000 + 20 * k) for k, name in enumerate(names)}


# A checkpoint of each family, and the module of NeMo AutoModel's adapter for it.
FAMILIES = {
    "qwen3_moe": (
        experts("model.layers.0.mlp.experts") | others("model", "embed_tokens.weight", "layers.0.mlp.gate.weight"),
        ("qwen3_moe", "Qwen3MoeStateDictAdapter", {}),
    ),
    "deepseek_v3": (
        experts("model.layers.3.mlp.experts") | others("model", "norm.weight", "layers.3.mlp.gate.weight"),
        ("deepseek_v3", "DeepSeekV3StateDictAdapter", {}),
    ),
    "nemotron_h": (
        experts("backbone.layers.1.mixer.experts", gated=False)
        | others("backbone", "norm_f.weight", "layers.1.norm.weight"),
        ("nemotron_v3", "NemotronV3StateDictAdapter", {"expert_activation": "relu2"}),
    ),
    "gpt_oss": (
        {
            "model.layers.0.mlp.experts.gate_up_proj": address_valued((E, H, 2 * INNER), BF16),
            "model.layers.0.mlp.experts.down_proj": address_valued((E, INNER, H), BF16, 7),
        }
        | others("model.layers.0.mlp", "router.weight", "router.bias", "experts.gate_up_proj_bias"),
        ("gpt_oss", "GPTOSSStateDictAdapter", {}),
    ),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_adapters_round_trip(model_type):
    checkpoint, _ = FAMILIES[model_type]
    adapter = StateDictAdapter.of(model_type)
    native = adapter.from_hf(checkpoint)
    assert_same(adapter.to_hf(native), checkpoint)
    apart = {}
    for name, tensor in native.items():
        apart |= dict(adapter.convert_single_tensor_to_hf(name, tensor))
    assert_same(apart, checkpoint)
    assert not any(".experts." in name for name in adapter.to_hf(native, exclude_key_regex=r".*\.experts\."))


def test_keywords_that_the_checkpointer_passes_are_accepted():
    # nemo_automodel 0.7.0, components/checkpoint/checkpointing.py
    checkpoint, _ = FAMILIES["qwen3_moe"]
    adapter = StateDictAdapter.of("qwen3_moe")
    ignored = {"v4_compatible": True, "legacy_paramwrapper_layout": False}
    native = adapter.from_hf(checkpoint, device_mesh=None, **ignored)
    assert_same(adapter.to_hf(native, device_mesh=None, for_checkpoint_load=True, **ignored), checkpoint)
    name, tensor = next(iter(native.items()))
    assert dict(adapter.convert_single_tensor_to_hf(name, tensor, device_mesh=None, **ignored))


def test_grouped_experts_are_in_the_layout_of_nemo():
    checkpoint, _ = FAMILIES["qwen3_moe"]
    native = StateDictAdapter.of("qwen3_moe").from_hf(checkpoint)
    for e in range(E):
        gate, up, down = (
            checkpoint[f"model.layers.0.mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        path = "model.layers.0.mlp.experts"
        assert_bytes_equal(native[f"{path}.gate_and_up_projs"][e], torch.cat([gate.t(), up.t()], -1))
        assert_bytes_equal(native[f"{path}.down_projs"][e], down.t())
    ungated = StateDictAdapter.of("nemotron_h").from_hf(FAMILIES["nemotron_h"][0])
    assert ungated["model.layers.1.mixer.experts.gate_and_up_projs"].shape == (E, H, INNER)


def test_unsupported_calls_of_an_adapter_are_refused():
    adapter = StateDictAdapter.of("qwen3_moe")
    checkpoint, _ = FAMILIES["qwen3_moe"]
    with pytest.raises(amc.UnsupportedError, match="device_mesh"):
        adapter.from_hf(checkpoint, device_mesh=object())
    with pytest.raises(amc.UnsupportedError, match="quantization=False"):
        adapter.to_hf(adapter.from_hf(checkpoint), quantization=True)
    codes = "model.layers.0.mlp.experts.2.up_proj.weight"
    quantized = checkpoint | {codes: checkpoint[codes].to(torch.float8_e4m3fn), codes + "_scale_inv": torch.ones(1, 1)}
    with pytest.raises(amc.UnsupportedError, match=r"experts\.2\.up_proj\.weight has the form of quantized codes"):
        adapter.from_hf(quantized)
    with pytest.raises(amc.UnsupportedError, match="no rules for no_such_type"):
        StateDictAdapter.of("no_such_type")
    with pytest.raises(amc.UnsupportedError, match=r"StateDictAdapter\(automodel_conv\.recipes\.kimi_k2\(\)\)"):
        StateDictAdapter.of("kimi_k2")
    missing = {name: tensor for name, tensor in checkpoint.items() if ".2.up_proj" not in name}
    with pytest.raises(amc.ConversionError, match=r"experts\.2\.up_proj"):
        adapter.from_hf(missing)


@needs_nemo
@pytest.mark.parametrize("model_type", FAMILIES)
def test_adapters_equal_those_written_by_hand(model_type):
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.moe.config import MoEConfig

    checkpoint, (package, name, options) = FAMILIES[model_type]
    if model_type == "nemotron_h":  # transformers 5.12 reverts this name to another one
        checkpoint = checkpoint | {"backbone.embeddings.weight": address_valued((H,), BF16)}
    module = importlib.import_module(f"nemo_automodel.components.models.{package}.state_dict_adapter")
    config = MoEConfig(
        **dict.fromkeys(("n_routed_experts", "n_activated_experts"), E),
        **dict.fromkeys(("n_shared_experts", "gate_bias_update_factor", "aux_loss_coeff"), 0),
        **dict.fromkeys(("n_expert_groups", "n_limited_groups", "route_scale"), 1),
        **dict.fromkeys(("inter_dim", "moe_inter_dim"), INNER),
        **dict.fromkeys(("train_gate", "norm_topk_prob"), True),
        dim=H,
        score_func="softmax",
        **options,
    )
    backend = BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", experts="torch_mm", dispatcher="torch")
    theirs = getattr(module, name)(SimpleNamespace(), config, backend, dtype=BF16)
    ours = StateDictAdapter.of(model_type)
    native = theirs.from_hf(dict(checkpoint))
    assert_same(ours.from_hf(checkpoint), native)
    assert_same(ours.to_hf(native), theirs.to_hf(dict(native)))
    for key, tensor in native.items():
        single = dict(theirs.convert_single_tensor_to_hf(key, tensor))
        assert_same(dict(ours.convert_single_tensor_to_hf(key, tensor)), single)


@pytest.fixture
def installed():
    nemo.install()
    yield
    nemo.uninstall()


@needs_nemo
def test_install_replaces_module_and_names_and_uninstall_restores_them():
    import nemo_automodel.components.checkpoint as package
    import nemo_automodel.components.checkpoint.checkpointing as checkpointing
    import nemo_automodel.components.checkpoint.conversion_mapping as theirs

    merging = checkpointing.requires_tensor_merging
    assert merging is theirs.requires_tensor_merging
    nemo.install()
    nemo.install()
    assert package.conversion_mapping is conversion_mapping
    assert sys.modules[theirs.__name__] is conversion_mapping
    assert checkpointing.requires_tensor_merging is conversion_mapping.requires_tensor_merging
    nemo.uninstall()
    nemo.uninstall()
    assert package.conversion_mapping is theirs
    assert sys.modules[theirs.__name__] is theirs
    assert checkpointing.requires_tensor_merging is merging


@pytest.mark.skipif(importlib.util.find_spec("nemo_automodel") is not None, reason="nemo_automodel is installed")
def test_install_without_nemo_is_an_error():
    with pytest.raises(amc.UnsupportedError, match="nemo_automodel cannot be imported"):
        nemo.install()


def load_base_model(model, path):
    """Poison the model, then load it by NeMo AutoModel's checkpointer."""
    from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig

    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    config = CheckpointingConfig(checkpoint_dir=path / "out", model_cache_dir=path, save_consolidated=False)
    Checkpointer(config, 0, 0, 0).load_base_model(model, torch.device("cpu"), str(path), str(path))


# The first is in its list of types that need merging; the second is missing from it.
@needs_nemo
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "minimax_m2", "glm4_moe_lite", "nemotron_h", "solar_open"])
def test_checkpointer_loads_types_that_it_loses_or_refuses_without_this_package(name, tmp_path):
    if name not in zoo_names():
        pytest.skip(f"this transformers has no {name}")
    model = build_model(name)
    write_checkpoint(model, tmp_path)
    expected = type(model).from_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    load_base_model(model, tmp_path)
    assert_same(model.state_dict(), expected.state_dict())


@needs_nemo
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["internvl+qwen3_moe", "mistral3+mixtral"])
def test_checkpointer_loads_nested_experts_if_the_outer_type_is_listed(name, tmp_path, monkeypatch):
    """Check that NeMo asks only for the outer type, and raises without the name: no file has a grouped tensor."""
    monkeypatch.setattr(conversion_mapping, "MODELS_REQUIRING_TENSOR_MERGING", set(MERGING))
    model = build_model(name)
    write_checkpoint(model, tmp_path)
    expected = type(model).from_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    with pytest.raises(BaseException, match=r"Size mismatch.*mlp\.experts"):  # CheckpointException is no Exception
        load_base_model(model, tmp_path)
    conversion_mapping.MODELS_REQUIRING_TENSOR_MERGING.add(model.config.model_type)
    load_base_model(model, tmp_path)
    assert_same(model.state_dict(), expected.state_dict())


def test_every_type_with_merging_rules_requires_merging():
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converting = [
        name
        for name in zoo_names()
        if any(isinstance(rule, WeightConverter) for rule in get_checkpoint_conversion_mapping(name) or ())
    ]
    assert len(converting) > 20
    assert all(map(amc.requires_tensor_merging, converting))


def test_a_text_tower_with_experts_inside_another_model_is_converted(tmp_path):
    """Check a case in which NeMo asks for rules of the outer model type only."""
    name = next(
        name for name in zoo_names() if name.endswith("+mixtral") or (name.endswith("qwen3_moe") and "+" in name)
    )
    model = build_model(name)
    write_checkpoint(model, tmp_path)
    assert_same(amc.load_state_dict(tmp_path), type(model).from_pretrained(tmp_path).state_dict())


def test_an_expert_of_a_wrong_shape_is_one_error_and_nothing_is_written(tmp_path):
    """Check a case in which NeMo only warns and leaves all experts unchanged."""
    model = build_model("mixtral")
    write_checkpoint(model, tmp_path)
    tensors = {n: t for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}
    name = next(name for name in sorted(tensors) if ".experts." in name)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors | {name: tensors[name][1:].contiguous()}, tmp_path / "model.safetensors")
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    with pytest.raises(amc.NameProblems, match="cannot be converted"):
        amc.load_model(model, tmp_path)
    assert all((tensor.reshape(-1).view(torch.uint8) == POISON).all() for tensor in model.state_dict().values())


def test_files_next_to_the_index_are_not_read(tmp_path):
    """Check a case in which NeMo reads every .safetensors file, and the last one wins."""
    model = build_model("mixtral")
    write_checkpoint(model, tmp_path)
    assert list(tmp_path.glob("*.index.json"))
    expected = type(model).from_pretrained(tmp_path).state_dict()
    strays = {n: t + 1 for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}
    save_file(strays, tmp_path / "consolidated.safetensors")
    assert_same(amc.load_state_dict(tmp_path), expected)


def test_key_mapping_of_the_model_precedes_that_of_its_type():
    """Check a case in which NeMo returns a table of multimodal types before it looks at the argument."""
    first = {"^odd\\.": "even."}
    mapping = amc.get_combined_key_mapping("gemma3", first)
    assert next(iter(mapping.items())) == ("^odd\\.", "even.")


def test_two_tensors_of_one_name_are_refused():
    router = {"model.layers.0.mlp.router.weight": torch.ones(2), "model.layers.0.mlp.gate.weight": torch.zeros(2)}
    with pytest.raises(amc.NameProblems, match="two tensors would be model"):
        StateDictAdapter.of("gpt_oss").from_hf(router)


@pytest.fixture
def stand_in(monkeypatch):
    """Return modules with the names of NeMo AutoModel's: the package, replaced modules, and importers of functions."""
    package = ModuleType("nemo_automodel.components.checkpoint")
    theirs, importer = (ModuleType(f"{package.__name__}.{name}") for name in ("conversion_mapping", "checkpointing"))
    theirs.requires_tensor_merging = lambda model_type: False
    package.conversion_mapping = theirs
    for module in (package, theirs, importer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield package, theirs, importer
    nemo.uninstall()


def test_functions_imported_after_install_are_restored(stand_in):
    package, theirs, importer = stand_in
    nemo.install()
    exec("from nemo_automodel.components.checkpoint.conversion_mapping import requires_tensor_merging", vars(importer))
    assert importer.requires_tensor_merging is conversion_mapping.requires_tensor_merging
    nemo.uninstall()
    assert importer.requires_tensor_merging is theirs.requires_tensor_merging
    assert package.conversion_mapping is sys.modules[theirs.__name__] is theirs


def test_patch_of_others_over_ours_stays(stand_in):
    package, theirs, importer = stand_in
    importer.requires_tensor_merging = theirs.requires_tensor_merging
    nemo.install()
    assert importer.requires_tensor_merging is conversion_mapping.requires_tensor_merging
    patch, module = (lambda model_type: True), ModuleType("somebody's")
    importer.requires_tensor_merging = patch
    package.conversion_mapping = sys.modules[theirs.__name__] = module
    nemo.uninstall()
    assert importer.requires_tensor_merging is patch
    assert package.conversion_mapping is sys.modules[theirs.__name__] is module
