"""Tests of Megatron-Bridge's mappings as loading code: traced and executed, they do what they do when they are run.

They are skipped if it is not installed; ``make test`` installs it. The package itself imports Transformer Engine, which
needs a GPU, so its module of mappings is imported alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from automodel_conv import load_with
from automodel_conv.testing import assert_bytes_equal
from tests.integrations.loading_code import addressed

pytest.importorskip("megatron.core", reason="the mappings import it")
_BRIDGE = "megatron.bridge"
if importlib.util.find_spec(_BRIDGE) is None:
    pytest.skip("Megatron-Bridge is not installed", allow_module_level=True)

E, HEADS, KV_HEADS, HEAD_DIM, H, INNER = 12, 6, 2, 4, 10, 14


@pytest.fixture(scope="module")
def mappings():
    """Return the module of mappings; its packages are empty ones."""
    spec = importlib.util.find_spec(_BRIDGE)
    assert spec is not None
    root = Path(str(spec.origin)).parent
    packages = {_BRIDGE: root, f"{_BRIDGE}.models": root / "models"}
    packages |= {f"{_BRIDGE}.models.conversion": root / "models" / "conversion"}
    with pytest.MonkeyPatch.context() as patch:
        for name, path in packages.items():
            package = ModuleType(name)
            package.__path__ = [str(path)]
            patch.setitem(sys.modules, name, package)
        yield importlib.import_module(f"{_BRIDGE}.models.conversion.param_mapping")


class ColumnParallelLinear(nn.Module):
    """A module that mappings know by the name of its class."""


def megatron_model():
    """Return a module with the parameters of a layer of experts, in the layout of Megatron."""
    model, shapes = ColumnParallelLinear(), {}
    shapes["linear_qkv"] = ((HEADS + 2 * KV_HEADS) * HEAD_DIM, H)
    shapes["router"] = (E, H)
    for expert in range(E):
        shapes[f"linear_fc1_{expert}"] = (2 * INNER, H)
        shapes[f"linear_fc2_{expert}"] = (H, INNER)
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)))
    model.config = SimpleNamespace(
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        kv_channels=HEAD_DIM,
        hidden_size=H,
        attention_output_gate=False,
    )
    return model


def tensors_of_layer():
    attention = {"q": (HEADS * HEAD_DIM, H), "k": (KV_HEADS * HEAD_DIM, H), "v": (KV_HEADS * HEAD_DIM, H)}
    shapes = {f"self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
    shapes["mlp.gate.weight"] = (E, H)
    for expert in range(E):
        shapes |= {f"mlp.experts.{expert}.{name}_proj.weight": (INNER, H) for name in ("gate", "up")}
        shapes[f"mlp.experts.{expert}.down_proj.weight"] = (H, INNER)
    return addressed({name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})


def loader(mappings, model):
    """Return loading code that fills the parameters by mappings, as the bridge's own loop does."""
    experts = {
        f"linear_fc1_{e}": mappings.GatedMLPMapping(
            f"linear_fc1_{e}", f"mlp.experts.{e}.gate_proj.weight", f"mlp.experts.{e}.up_proj.weight"
        )
        for e in range(E)
    }
    by_parameter = {
        "linear_qkv": mappings.QKVMapping("linear_qkv", *(f"self_attn.{name}_proj.weight" for name in ("q", "k", "v"))),
        "router": mappings.ReplicatedMapping("router", "mlp.gate.weight"),
        **experts,
        **{
            f"linear_fc2_{e}": mappings.RowParallelMapping(f"linear_fc2_{e}", f"mlp.experts.{e}.down_proj.weight")
            for e in range(E)
        },
    }

    def load(tensors):
        for name, mapping in by_parameter.items():
            names = mapping.hf_param
            given = tensors[names] if isinstance(names, str) else {key: tensors[n] for key, n in names.items()}
            model.get_parameter(name).data.copy_(mapping.hf_to_megatron(given, model))

    return load


def test_mappings_to_megatron_equal_their_own(mappings, tmp_path):
    tensors = tensors_of_layer()
    save_file(tensors, tmp_path / "model.safetensors")
    model, expected = megatron_model(), megatron_model()
    loader(mappings, expected)(tensors)
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).fill_(0xA5)
    report = load_with(loader(mappings, model), tmp_path, model, calls="dict")
    assert not report.computed
    assert not report.missing_keys
    for name, parameter in expected.named_parameters():
        assert_bytes_equal(model.get_parameter(name).detach(), parameter.detach(), strides=True)


def test_mappings_to_megatron_interleave_heads_and_join_gate_and_up(mappings, tmp_path):
    tensors = tensors_of_layer()
    save_file(tensors, tmp_path / "model.safetensors")
    model = megatron_model()
    load_with(loader(mappings, model), tmp_path, model, calls="dict")
    q, k, v = (tensors[f"self_attn.{name}_proj.weight"].reshape(-1, HEAD_DIM, H) for name in "qkv")
    group = HEADS // KV_HEADS
    heads = [part for g in range(KV_HEADS) for part in (*q[g * group : (g + 1) * group], k[g], v[g])]
    assert_bytes_equal(model.linear_qkv.detach(), torch.cat(heads))
    for e in range(E):
        gate, up = (tensors[f"mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up"))
        assert_bytes_equal(model.get_parameter(f"linear_fc1_{e}").detach(), torch.cat([gate, up]))
