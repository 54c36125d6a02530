"""Tests of the zoo: every type builds, distinguishes axes, and round-trips through transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the zoo needs transformers")

from safetensors import safe_open
from transformers import PreTrainedModel, WeightConverter
from transformers.conversion_mapping import get_model_conversion_mapping

from tests.model_zoo import (
    DTYPE,
    EQUAL_SIZES,
    EXCLUDED,
    UNEQUAL,
    build_model,
    extra_models,
    write_checkpoint,
    zoo_names,
)

pytestmark = pytest.mark.sweep

BUILT = [name for name in zoo_names() if name not in EXCLUDED]

# Models that the project promises by name; older releases of transformers lack some.
PROMISED = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "olmoe"),
    *("minimax_m2", "qwen3_next", "glm4_moe", "glm4v_moe", "kimi_k25", "ernie4_5_moe", "jamba"),
    *("longcat_flash", "nemotron_h", "qwen3_vl_moe", "llava", "llava+qwen3_moe"),
}
NEWER_THAN_5_12 = {"kimi_k25"}

# Extras with checkpoints that need no conversion: one plain, one stored as the model holds it.
STORED_AS_IS = {"gpt_oss", "llama"}

# Converters that a checkpoint of `save_pretrained` never needs, by their first target.
UNUSED_CONVERTERS = {
    "inkling2_text": {r"mlp.experts.gate_up_proj_scale_inv": "scales of quantized checkpoints"},
    "inkling2": {r"mlp.experts.gate_up_proj_scale_inv": "scales of quantized checkpoints"},
    "nemo_speechlm": {
        r"\.mixer\.experts\.up_proj": "NeMo's grouped names; saving writes one name per expert",
        r"\.mixer\.experts\.down_proj": "NeMo's grouped names; saving writes one name per expert",
    },
}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _stored_shapes(directory: Path) -> dict[str, torch.Size]:
    shapes = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                shapes[name] = torch.Size(file.get_slice(name).get_shape())
    return shapes


def _patterns(converter: WeightConverter) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (
        tuple(converter._original_source_patterns),
        tuple(converter._original_target_patterns),
    )


def test_promised_models_are_in_the_zoo():
    missing = PROMISED - set(zoo_names())
    assert missing <= NEWER_THAN_5_12
    assert extra_models()


def test_exclusions_have_a_reason_and_do_not_build():
    for name in EXCLUDED.keys() & set(zoo_names()):
        assert EXCLUDED[name]
        with pytest.raises(Exception):  # noqa: B017, PT011 - any failure justifies the exclusion
            build_model(name)


def test_excluded_equal_sizes_are_refused_by_the_config():
    for name in UNEQUAL.keys() & set(zoo_names()):
        part, reason = UNEQUAL[name]
        for equal in EQUAL_SIZES:
            if part in equal:
                with pytest.raises(Exception, match=reason):
                    build_model(name, equal=equal)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "phimoe"])
@pytest.mark.parametrize("equal", EQUAL_SIZES)
def test_sizes_declared_equal_are_equal(name, equal):
    state_dict = build_model(name, equal=equal).state_dict()
    experts, hidden, size = next(
        tensor.shape for key, tensor in state_dict.items() if key.endswith("experts.down_proj")
    )
    values = {"E": experts, "H": hidden, "I": size, "2I": 2 * size, "1": 1}
    for part in equal.split(", "):
        assert len({values[word] for word in part.split(" == ")}) == 1, values


@pytest.mark.parametrize("name", BUILT)
def test_models_are_small_and_expert_weights_have_pairwise_different_sizes(name):
    state_dict = build_model(name).state_dict()
    assert sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values()) < 20e6
    for key, tensor in state_dict.items():
        if "experts." in key and tensor.dim() == 3:
            # Halves too: a fused dimension is twice that of a projection.
            sizes = [*tensor.shape, *(size // 2 for size in tensor.shape[1:])]
            assert len(set(sizes)) == len(sizes), f"{key}: {sizes}"


@pytest.mark.parametrize("name", BUILT)
def test_original_format_round_trips_and_uses_every_converter(name, tmp_path):
    model = build_model(name)
    write_checkpoint(model, tmp_path)
    state_dict = model.state_dict()
    stored = _stored_shapes(tmp_path)
    as_is = all(key in state_dict and state_dict[key].shape == stored[key] for key in stored)
    assert as_is == (name in STORED_AS_IS)

    loaded = _assert_loads_exactly(model, tmp_path)
    rules = get_model_conversion_mapping(loaded, add_legacy=False)
    available = {_patterns(rule) for rule in rules if isinstance(rule, WeightConverter)}
    used = {_patterns(r) for r in loaded._weight_conversions if isinstance(r, WeightConverter)}
    unused = {targets[0] for _, targets in available - used}
    assert unused == set(UNUSED_CONVERTERS.get(name, {}))


@pytest.mark.parametrize("name", BUILT)
def test_converted_format_round_trips(name, tmp_path):
    model = build_model(name)
    write_checkpoint(model, tmp_path, original_format=False)
    assert _stored_shapes(tmp_path).keys() <= model.state_dict().keys()
    _assert_loads_exactly(model, tmp_path)


def _assert_loads_exactly(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded, info = type(model).from_pretrained(directory, dtype=DTYPE, output_loading_info=True)
    assert not any(info.values()), info
    expected, actual = model.state_dict(), loaded.state_dict()
    assert list(actual) == list(expected)
    for key, tensor in expected.items():
        assert (actual[key].shape, actual[key].dtype) == (tensor.shape, tensor.dtype), key
        assert _bytes(actual[key]) == _bytes(tensor), key
    return loaded


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_values_are_seeded_finite_and_vary_between_neighbours(name):
    first, again, other = (build_model(name, seed=seed).state_dict() for seed in (0, 0, 1))
    for key, tensor in first.items():
        assert _bytes(tensor) == _bytes(again[key]), key
        assert _bytes(tensor) != _bytes(other[key]), key
        assert tensor.isfinite().all(), key
        assert tensor.ne(0).all(), key
    flat = torch.cat([tensor.flatten().float() for tensor in first.values()])
    assert flat.diff().ne(0).float().mean() > 0.999
