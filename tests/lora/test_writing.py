"""Tests of writing adapters: files, settings by which PEFT finds every module, and what is refused."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from automodel_conv.errors import DestinationError, NameProblems, UnsupportedError, WriteError
from automodel_conv.files import system
from automodel_conv.files.shards import LAYOUT_KEY
from automodel_conv.files.uploads.output_folders import LocalFolder
from automodel_conv.lora import writing
from automodel_conv.lora.adapter import open_adapter
from automodel_conv.lora.config import config_of
from automodel_conv.lora.writing import _found_by, _shortened, write_reformed
from tests.lora.support import (
    HIDDEN,
    INNER,
    PREFIX,
    SETTINGS,
    dyadic,
    in_memory,
    lora,
    per_expert,
    toy_base,
    write_adapter,
)

FIRST = per_expert() | lora("q_proj", 6, HIDDEN, seed=50)


def converted(source, destination, form, base=None):
    """Write an adapter of a directory, or in memory, in another form, and return its settings."""
    adapter = open_adapter(source) if isinstance(source, Path) else source
    written = write_reformed(adapter, base or toy_base(), LocalFolder(str(destination)), form, False)
    return written, json.loads((destination / "adapter_config.json").read_text())


@pytest.mark.parametrize("form", ["transformers", "vllm"])
def test_adapter_is_the_same_after_the_way_there_and_back(tmp_path, form):
    first = write_adapter(tmp_path / "first", FIRST)
    converted(first, tmp_path / "there", form)
    assert open_adapter(tmp_path / "there").form == form
    converted(tmp_path / "there", tmp_path / "back", "per_expert")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == FIRST.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in FIRST.items())
    stated = open_adapter(tmp_path / "back").config
    assert {(stated.rank(p.module), stated.scale(p.module)) for p in open_adapter(first).pairs} == {(2, 2.0)}


def test_file_is_one_of_safetensors_with_its_form(tmp_path):
    written, _ = converted(in_memory(FIRST), tmp_path / "new", "transformers")
    with safe_open(tmp_path / "new" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()[LAYOUT_KEY] == "transformers"
    assert written.shard.name == "adapter_model.safetensors"
    assert written.copied == ()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_files_beside_the_weights_are_copied_and_the_config_is_not(tmp_path):
    first = write_adapter(tmp_path / "first", FIRST)
    (first / "tokenizer").mkdir()
    for name in ("README.md", "tokenizer/vocab.json"):
        (first / name).write_text(name)
    written, settings = converted(first, tmp_path / "new", "transformers")
    assert set(written.copied) == {"README.md", "tokenizer/vocab.json"}
    assert (tmp_path / "new" / "tokenizer" / "vocab.json").read_text() == "tokenizer/vocab.json"
    assert settings["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]


def test_settings_name_every_module_of_the_new_form(tmp_path):
    _, settings = converted(in_memory(FIRST, task_type="CAUSAL_LM"), tmp_path / "new", "transformers")
    assert settings["target_modules"] == ["q_proj"]
    assert (settings["task_type"], settings["lora_dropout"]) == ("CAUSAL_LM", 0.0)
    stated = config_of(settings, "new")
    names = {"mlp.experts.gate_up_proj": 4, "mlp.experts.down_proj": 2, "q_proj": 2}
    assert {name: stated.rank(name) for name in names} == names
    assert {stated.scale(name) for name in names} == {2.0}


def test_settings_that_select_modules_in_another_way_are_removed(tmp_path):
    selecting = {"exclude_modules": "x", "layers_to_transform": [0], "layers_pattern": "layers"}
    adapter = in_memory(FIRST, **selecting, target_modules="all-linear", lora_B_layout="rank_major")
    _, settings = converted(adapter, tmp_path / "new", "per_expert")
    assert [settings.get(name) for name in selecting] == [None] * 3
    assert "lora_B_layout" not in settings
    assert settings["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]


def test_only_trained_layers_are_targets():
    known = ["layers.0.q", "layers.1.q", "layers.0.k", "lm.q"]
    assert _shortened(["layers.0.k"], known, 1) == ["k"]
    assert _shortened(["layers.0.q", "layers.1.q"], known, 1) == ["layers.0.q", "layers.1.q"]
    assert _shortened(["layers.0.q", "layers.1.q", "lm.q"], known, 1) == ["q"]
    assert _shortened(["layers.0.q", "layers.0.k"], known, 2) == ["0.k", "0.q"]
    assert _found_by(["q"], known) == {"layers.0.q", "layers.1.q", "lm.q"}
    assert _found_by(["0.q", "lm.q"], known) == {"layers.0.q", "lm.q"}
    assert _found_by(["ers.0.q", "0"], known) == set()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"l.0.up": 4, "l.1.up": 4, "l.0.q": 2}, {"up": 4}),
        ({"l.0.up": 4, "l.1.up": 2, "l.0.q": 2}, {r"^l\.0\.up": 4}),
        ({"a.1.up": 4, "a.2.up": 4, "b.1.up": 2}, {r"^a\.\d+\.up": 4}),
        ({"up": 4, "x.up": 2}, {"^up": 4}),
        ({"x.y": 4, "xzy": 2}, {"y": 4}),
    ],
)
def test_patterns_state_the_values_of_their_names_and_of_no_other(values, expected):
    unusual = {name: value for name, value in values.items() if value != 2}
    patterns = writing._patterns(unusual, values)
    assert patterns == expected
    stated = config_of(SETTINGS | {"rank_pattern": patterns}, "here")
    assert {name: stated.rank(name) for name in values} == values


@pytest.mark.parametrize("seed", range(30))
def test_patterns_state_random_values(seed):
    rng = random.Random(seed)
    names = {
        f"{rng.choice(['m.layers', 'layers', 'x'])}.{rng.randint(0, 12)}.{rng.choice(['q', 'k.q', 'q.k', 'k'])}"
        for _ in range(12)
    }
    values = {name: rng.choice([2, 2, 4, 8]) for name in sorted(names)}
    patterns = writing._patterns({name: value for name, value in values.items() if value != 2}, values)
    stated = config_of(SETTINGS | {"rank_pattern": patterns}, "here")
    assert {name: stated.rank(name) for name in values} == values
    assert all(re.compile(pattern) for pattern in patterns)


def test_old_version_is_replaced_only_where_stacks_are_written(tmp_path):
    _, settings = converted(in_memory(FIRST, peft_version="0.17.0"), tmp_path / "stacks", "transformers")
    assert settings["peft_version"] == "0.19.1"
    _, settings = converted(in_memory(FIRST, peft_version="0.17.0"), tmp_path / "layers", "per_expert")
    assert settings["peft_version"] == "0.17.0"
    _, settings = converted(in_memory(FIRST), tmp_path / "new", "transformers")
    assert settings["peft_version"] == "0.21.2"


def test_whole_tensors_and_embeddings_are_written(tmp_path):
    first = FIRST | {
        f"{PREFIX}norm.weight": dyadic(3),
        f"{PREFIX}embed.lora_embedding_A": dyadic(2, 7),
        f"{PREFIX}embed.lora_embedding_B": dyadic(HIDDEN, 2, seed=1),
    }
    for form in ("transformers", "per_expert"):
        _, settings = converted(in_memory(first), tmp_path / form, form)
        assert settings["modules_to_save"] == ["norm"]
        found = load_file(tmp_path / form / "adapter_model.safetensors")
        for name in first.keys() - FIRST.keys():
            assert torch.equal(found[name], first[name]), name


def nothing_is_left(directory):
    return not directory.exists() or not any(directory.iterdir())


def test_adapter_that_does_not_fit_writes_nothing(tmp_path):
    with pytest.raises(NameProblems):
        converted(in_memory(FIRST | lora("nowhere", 2, 2)), tmp_path / "new", "transformers")
    assert nothing_is_left(tmp_path / "new")


def test_experts_that_differ_write_nothing(tmp_path):
    adapter = in_memory(FIRST, alpha_pattern={"experts.1.up_proj": 8})
    with pytest.raises(UnsupportedError, match=r"(?s)scale.*mlp.experts"):
        converted(adapter, tmp_path / "new", "transformers")
    assert nothing_is_left(tmp_path / "new")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.safetensors"])
def test_directory_that_holds_weights_is_refused_and_stays(tmp_path, name):
    save_file({"x": torch.zeros(1)}, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(DestinationError, match=re.escape(name)):
        converted(in_memory(FIRST), tmp_path, "transformers")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before


def test_own_directory_is_refused(tmp_path):
    first = write_adapter(tmp_path / "first", FIRST)
    with pytest.raises(DestinationError):
        converted(first, first, "transformers")
    assert load_file(first / "adapter_model.safetensors").keys() == FIRST.keys()


def test_failed_write_leaves_no_adapter(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(system, "sync", fail)
    with pytest.raises(WriteError, match=r"No space left"):
        converted(in_memory(FIRST), tmp_path / "new", "transformers")
    assert not (tmp_path / "new" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "new" / "adapter_config.json").exists()
    monkeypatch.undo()
    converted(in_memory(FIRST), tmp_path / "new", "transformers")


def test_two_modules_with_one_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_names", lambda module: ("A", "B"))
    with pytest.raises(UnsupportedError, match=r"(?s)one name for several modules.*A\n.*B"):
        converted(in_memory(FIRST), tmp_path / "new", "transformers")


@pytest.mark.parametrize("form", ["transformers", "vllm", "per_expert"])
def test_square_and_equal_sizes_lead_back(tmp_path, form):
    hidden, inner = 4, 2  # gate and up together are [4, 4], and every rank is 2
    base = toy_base("transposed", hidden=hidden, inner=inner, count=2)
    first = per_expert((0, 1), hidden=hidden, inner=inner)
    converted(in_memory(first), tmp_path / "there", form, base)
    converted(tmp_path / "there", tmp_path / "back", "per_expert", base)
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == first.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("form", ["transformers", "vllm"])
def test_one_expert_is_a_stack_of_one(tmp_path, form):
    base = toy_base(count=1)
    first = per_expert((0,))
    converted(in_memory(first), tmp_path / "there", form, base)
    assert load_file(tmp_path / "there" / "adapter_model.safetensors")[f"{PREFIX}mlp.experts.lora_A.weight"].shape == (
        2,
        INNER,
    )
    converted(tmp_path / "there", tmp_path / "back", "per_expert", base)
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == first.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in first.items())
