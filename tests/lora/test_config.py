"""Tests of the config of an adapter: ranks and scales of modules, and what is refused."""

import json
import math
import re

import pytest

from automodel_conv.errors import CheckpointError, UnsupportedError
from automodel_conv.lora.config import alpha_for, config_of, read_config, scale_of
from tests.lora.support import SETTINGS

REFUSED = {
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {"target_modules": ["q_proj"]},
    "lora_bias": True,
    "alora_invocation_tokens": [1, 2],
    "layer_replication": [[0, 2], [1, 3]],
    "kasa_config": {"beta": 1},
    "arrow_config": {"top_k": 2},
    "monteclora_config": {"samples": 2},
    "trainable_token_indices": [3],
    "megatron_config": {"tp": 2},
    "fan_in_fan_out": True,
    "bias": "all",
    "init_lora_weights": "pissa_niter_4",
}


def config(**settings):
    return config_of(SETTINGS | settings, "here")


def test_ranks_and_alphas_are_those_of_the_first_pattern_that_matches():
    stated = config(
        r=8,
        lora_alpha=16,
        rank_pattern={"q_proj": 4, "layers.0.q_proj": 2, r"layers\.\d+\.k_proj": 3},
        alpha_pattern={"^layers.1.q_proj": 1, "up_proj": 0},
    )
    names = ["layers.0.q_proj", "xq_proj", "layers.12.k_proj", "layers.1.q_proj.more", "a.layers.1.q_proj", "up_proj"]
    assert [stated.rank(name) for name in names] == [4, 8, 3, 8, 4, 8]
    assert [stated.alpha(name) for name in (*names, "layers.1.q_proj")] == [16, 16, 16, 16, 16, 0, 1]


def test_ranks_are_those_of_peft():
    other = pytest.importorskip("peft.utils.other", reason="compares with PEFT")
    patterns = {"q_proj": 4, "layers.0.k_proj": 2, r"layers\.\d+\.v_proj": 3, "^o_proj": 5, "mlp.*": 6, "a|b_proj": 7}
    names = ["q_proj", "model.q_proj", "xq_proj", "layers.0.k_proj", "layers.10.k_proj", "m.layers.7.v_proj"]
    names += ["o_proj", "m.o_proj", "mlp.gate", "m.mlp.x.y", "a", "xb_proj", "x.a", "a.x"]
    stated = config(rank_pattern=patterns, r=9)
    for name in names:
        key = other.get_pattern_key(patterns.keys(), name)
        assert stated.rank(name) == patterns.get(key, 9), name


@pytest.mark.parametrize(("rank", "alpha"), [(1, 0), (4, 16), (3, 7), (16, 0.1), (64, 64)])
def test_scale_is_alpha_by_rank_or_by_its_root(rank, alpha):
    assert config(r=rank, lora_alpha=alpha).scale("x") == alpha / rank
    assert config(r=rank, lora_alpha=alpha, use_rslora=True).scale("x") == alpha / math.sqrt(rank)


@pytest.mark.parametrize("uses_rslora", [False, True])
def test_alpha_gives_the_same_scale_at_another_rank(uses_rslora):
    for alpha in (0, 1, 16, 0.1, -3):
        for old in (1, 3, 8, 12):
            scale = scale_of(old, alpha, uses_rslora)
            assert alpha_for(scale, old, uses_rslora) == alpha
            for new in (2, 5, 24):
                found = scale_of(new, alpha_for(scale, new, uses_rslora), uses_rslora)
                assert math.isclose(found, scale, rel_tol=1e-12)
    assert type(alpha_for(2.0, 8, False)) is int
    assert alpha_for(1 / 3, 6, False) == 2


VERSIONS = {"0.17.1": (0, 17, 1), "0.19.0": (0, 19, 0), "0.19": (0, 19, 0), "1.2.3.dev0": (1, 2, 3)}


def test_version_is_read_and_is_0_17_if_none_is_stated():
    assert {text: config(peft_version=text).peft_version for text in VERSIONS} == VERSIONS
    for absent in (None, "", "unknown"):
        assert config(peft_version=absent).peft_version == (0, 17, 0)


@pytest.mark.parametrize(
    ("version", "plain", "transposed"),
    [
        ("0.17.0", False, False),
        ("0.18.1", False, False),
        ("0.19.0", False, True),
        ("0.19.1", True, False),
        ("0.21.2", True, False),
        ("1.0.0", True, False),
    ],
)
def test_order_of_dimensions_depends_on_the_version(version, plain, transposed):
    stated = config(peft_version=version)
    assert (stated.reads_last(False), stated.reads_last(True)) == (plain, transposed)


def test_order_of_b_is_peft_s_unless_stated():
    assert [config(lora_B_layout=value).groups_b for value in (None, "rank_major", "grouped_by_expert")] == [0, 0, 1]


def test_targeted_parameters_are_none_or_a_list():
    assert config(target_parameters=None).target_parameters == config().target_parameters == ()
    assert config(target_parameters=["a.b", "c"]).target_parameters == ("a.b", "c")


@pytest.mark.parametrize("key", REFUSED)
def test_each_variant_is_refused_by_name(key):
    with pytest.raises(UnsupportedError, match=rf"here\n(.|\n)*{key}") as caught:
        config(**{key: REFUSED[key]})
    assert not any(f"    {other}" in str(caught.value) for other in REFUSED if other != key)


def test_all_variants_are_in_one_error():
    with pytest.raises(UnsupportedError) as caught:
        config(**REFUSED)
    assert all(f"    {key}" in str(caught.value) for key in REFUSED)


@pytest.mark.parametrize("initial", ["pissa", "PiSSA", "olora", "corda", "loftq", "pissa_niter_16"])
def test_initial_values_that_change_the_base_are_refused(initial):
    with pytest.raises(UnsupportedError, match=f"{initial}(.|\n)*path_initial_model_for_weight_conversion"):
        config(init_lora_weights=initial)


def test_settings_that_change_nothing_are_accepted():
    neutral = {key: None for key in REFUSED} | {"use_dora": False, "bias": "none", "megatron_config": {}}
    for initial in (True, False, "gaussian", "orthogonal", "eva"):
        assert config(**neutral | {"init_lora_weights": initial}).rank("x") == 2
    settings = dict(SETTINGS)
    assert config_of(settings, "here").settings is settings


@pytest.mark.parametrize("kind", ["LOHA", "lora", "", 3, None])
def test_other_kinds_of_adapters_are_refused(kind):
    with pytest.raises(UnsupportedError, match=f"not LoRA(.|\n)*peft_type LORA(.|\n)*{kind or ''}"):
        config(peft_type=kind)


MALFORMED = [
    ("r", 0),
    ("r", -1),
    ("r", "8"),
    ("r", 2.0),
    ("r", True),
    ("r", None),
    ("lora_alpha", "16"),
    ("lora_alpha", None),
    ("lora_alpha", True),
    ("lora_alpha", float("nan")),
    ("rank_pattern", [1]),
    ("rank_pattern", {"x": 0}),
    ("rank_pattern", {"(": 4}),
    ("alpha_pattern", {"x": None}),
    ("alpha_pattern", "x"),
    ("lora_B_layout", "another"),
    ("target_parameters", "experts.down_proj"),
    ("target_parameters", [3]),
]


@pytest.mark.parametrize(("key", "value"), MALFORMED, ids=str)
def test_malformed_settings_are_refused(key, value):
    with pytest.raises(CheckpointError, match=r"malformed(.|\n)*here"):
        config(**{key: value})


def test_all_malformed_settings_are_in_one_error():
    with pytest.raises(CheckpointError) as caught:
        config(r=0, lora_alpha="x", rank_pattern={"[": 1, "a": "b"}, alpha_pattern=3)
    lines = re.findall(r"^    (?!  )(.*)", str(caught.value), re.MULTILINE)
    assert len([line for line in lines if line.startswith(("rank", "alpha"))]) == 5


def test_config_is_read_from_its_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS | {"r": 5}))
    stated = read_config(str(tmp_path))
    assert stated.rank("x") == 5
    assert stated.path == str(tmp_path / "adapter_config.json")


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "nul", "{}}", "[" * 100_000, b"\xff\xfe"], ids=range(7))
def test_file_that_is_no_json_is_named(tmp_path, text):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_config.json"):
        read_config(str(tmp_path))


@pytest.mark.parametrize("value", [[], "text", 3, None])
def test_json_that_is_no_object_is_named(tmp_path, value):
    (tmp_path / "adapter_config.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=f"not an object(.|\n)*found.*{type(value).__name__}"):
        read_config(str(tmp_path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"no adapter_config.json(.|\n)*{tmp_path.name}"):
        read_config(str(tmp_path))
