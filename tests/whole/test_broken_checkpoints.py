"""Tests of broken and hostile checkpoints through the loaders: one clear error each, and no parameter changed."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.testing import POISON, assert_bytes_equal

E, I, H = 5, 6, 8  # noqa: E741

transformers = pytest.importorskip("transformers", reason="uses merging rules of transformers")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, I))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.norm = nn.Parameter(torch.empty(H))


class Model(nn.Module):
    """Two layers of experts with transformers' names and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        for tensor in self.state_dict().values():
            tensor.view(torch.uint8).fill_(POISON)


def rules() -> list[object]:
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    return [
        WeightConverter(
            ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
            "experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("experts.*.down_proj.weight", "experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


def tensors(layer: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(layer)
    weights = {f"layers.{layer}.norm": torch.randn(H, generator=generator)}
    for expert in range(E):
        prefix = f"layers.{layer}.experts.{expert}"
        weights[f"{prefix}.gate_proj.weight"] = torch.randn(I, H, generator=generator)
        weights[f"{prefix}.up_proj.weight"] = torch.randn(I, H, generator=generator)
        weights[f"{prefix}.down_proj.weight"] = torch.randn(H, I, generator=generator)
    return weights


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write two shards, one per layer, and an index."""
    weight_map = {}
    for layer in range(2):
        file = f"model-{layer + 1:05}-of-00002.safetensors"
        save_file(tensors(layer), tmp_path / file)
        weight_map |= dict.fromkeys(tensors(layer), file)
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def shard(directory: Path, number: int = 2) -> Path:
    return directory / f"model-{number:05}-of-00002.safetensors"


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the second shard, and the index with it."""
    changed = load_file(shard(directory))
    edit(changed)
    save_file(changed, shard(directory))
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {name: file for name, file in index.items() if file == shard(directory, 1).name}
    write_index(directory, kept | dict.fromkeys(changed, shard(directory).name))


def edit_header(directory: Path, edit: Callable[[str], str]) -> None:
    data = shard(directory).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = edit(data[8 : 8 + size].decode()).encode()
    shard(directory).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])


def truncate(directory: Path) -> None:
    shard(directory).write_bytes(shard(directory).read_bytes()[:-7])


def overlap(directory: Path) -> None:
    def edit(header: str) -> str:
        entries = json.loads(header)
        names = [name for name in entries if name != "__metadata__"]
        entries[names[1]]["data_offsets"] = entries[names[0]]["data_offsets"]
        entries[names[1]]["shape"] = entries[names[0]]["shape"]
        return json.dumps(entries)

    edit_header(directory, edit)


def path_traversal(directory: Path) -> None:
    write_index(directory, {"layers.0.norm": "../outside.safetensors"})


def huge_header(directory: Path) -> None:
    shard(directory).write_bytes(struct.pack("<Q", 2**63) + shard(directory).read_bytes()[8:])


EXPERT = "layers.1.experts.3.up_proj.weight"

BROKEN = {
    "truncated file": (truncate, amc.CheckpointError, [shard(Path()).name]),
    "overlapping tensors": (overlap, amc.CheckpointError, [shard(Path()).name, "overlap"]),
    "missing shard": (lambda d: shard(d).unlink(), amc.CheckpointError, [shard(Path()).name]),
    "missing expert": (
        lambda d: edit_tensors(d, lambda t: t.pop(EXPERT)),
        amc.NameProblems,
        [EXPERT, "layers.1.experts.gate_up_proj"],
    ),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({"layers.1.norm": torch.zeros(H + 1)})),
        amc.NameProblems,
        ["layers.1.norm", "[8]", "[9]"],
    ),
    "expert of another shape": (
        lambda d: edit_tensors(d, lambda t: t.update({EXPERT: torch.zeros(I + 1, H)})),
        amc.NameProblems,
        ["layers.1.experts.gate_up_proj"],
    ),
    "duplicate key": (
        lambda d: edit_header(d, lambda h: h.replace('"layers.1.experts.1.', '"layers.1.experts.0.', 1)),
        amc.CheckpointError,
        ["layers.1.experts.0."],
    ),
    "header of 2^63 bytes": (huge_header, amc.CheckpointError, [shard(Path()).name, str(2**63)]),
    "path out of the directory": (path_traversal, amc.CheckpointError, ["../outside.safetensors"]),
    "unknown dtype": (
        lambda d: edit_header(d, lambda h: h.replace('"F32"', '"Q99"', 1)),
        amc.CheckpointError,
        ["Q99", shard(Path()).name],
    ),
    "unexpected tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"layers.1.extra": torch.zeros(2)})),
        amc.NameProblems,
        ["layers.1.extra"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_one_clear_error_and_writes_nothing(checkpoint, name):
    break_it, error, words = BROKEN[name]
    break_it(checkpoint)
    model, merging = Model(), rules()
    tracemalloc.start()
    with pytest.raises(error) as caught:
        amc.load_model(model, checkpoint, rules=merging)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for word in words:
        assert word in str(caught.value)
    assert peak_bytes < 8 << 20
    for tensor in model.state_dict().values():
        assert (tensor.view(torch.uint8) == POISON).all()


def test_unbroken_checkpoint_loads(checkpoint):
    model = Model()
    amc.load_model(model, checkpoint, rules=rules())
    for layer in range(2):
        source, experts = tensors(layer), model.layers[layer].experts
        for e in range(E):
            prefix = f"layers.{layer}.experts.{e}"
            assert_bytes_equal(experts.gate_up_proj[e, :I].detach(), source[f"{prefix}.gate_proj.weight"])
            assert_bytes_equal(experts.gate_up_proj[e, I:].detach(), source[f"{prefix}.up_proj.weight"])
            assert_bytes_equal(experts.down_proj[e].detach(), source[f"{prefix}.down_proj.weight"])


def test_stray_file_outside_the_index_is_ignored(checkpoint):
    poisoned = {name: torch.full_like(tensor, torch.nan) for name, tensor in (tensors(0) | tensors(1)).items()}
    save_file(poisoned, checkpoint / "consolidated.safetensors")
    model = Model()
    amc.load_model(model, checkpoint, rules=rules())
    assert not any(tensor.isnan().any() for tensor in model.state_dict().values())


def test_all_name_problems_are_in_one_error(checkpoint):
    def edit(changed: dict[str, torch.Tensor]) -> None:
        changed.pop(EXPERT)
        changed.pop("layers.1.norm")
        changed["layers.1.extra"] = torch.zeros(2)

    edit_tensors(checkpoint, edit)
    with pytest.raises(amc.NameProblems) as caught:
        amc.load_model(Model(), checkpoint, rules=rules())
    problems = caught.value
    assert problems.missing == ("layers.1.norm",)
    assert problems.unexpected == ("layers.1.extra",)
    assert problems.incomplete == (("layers.1.experts.gate_up_proj", (EXPERT,)),)


def test_not_strict_loads_what_fits_and_reports_the_rest(checkpoint):
    missing = "layers.1.experts.4.down_proj.weight"
    edit_tensors(checkpoint, lambda changed: changed.pop(missing))
    model = Model()
    report = amc.load_model(model, checkpoint, rules=rules(), strict=False)
    assert report.mismatched_keys == (("layers.1.experts.down_proj", (E - 1, H, I), (E, H, I)),)
    assert (model.layers[1].experts.down_proj.detach().view(torch.uint8) == POISON).all()
    assert_bytes_equal(model.layers[1].norm.detach(), tensors(1)["layers.1.norm"])


def test_not_strict_is_not_advised_for_a_model_without_any_expert(checkpoint):
    for number in (1, 2):
        save_file({f"layers.{number - 1}.norm": torch.ones(H)}, shard(checkpoint, number))
    write_index(checkpoint, {f"layers.{number - 1}.norm": shard(checkpoint, number).name for number in (1, 2)})
    with pytest.raises(amc.NameProblems, match="gate_up_proj") as caught:
        amc.load_model(Model(), checkpoint, rules=rules())
    assert "strict=" not in str(caught.value)
    write_index(checkpoint, {"layers.0.norm": shard(checkpoint, 1).name})
    for name in ("experts.gate_up_proj", "experts.down_proj"):  # one layer has its experts, of all that are missing
        save_file(
            {"layers.0.norm": torch.ones(H), f"layers.0.{name}": Model().state_dict()[f"layers.0.{name}"]},
            shard(checkpoint, 1),
        )
        write_index(checkpoint, dict.fromkeys(["layers.0.norm", f"layers.0.{name}"], shard(checkpoint, 1).name))
        with pytest.raises(amc.NameProblems, match="strict=False loads what fits"):
            amc.load_model(Model(), checkpoint, rules=rules())


def test_not_strict_still_refuses_impossible_conversions(checkpoint):
    edit_tensors(checkpoint, lambda changed: changed.pop(EXPERT))
    model = Model()
    for strict in (True, False):
        with pytest.raises(amc.NameProblems, match=r"incomplete(.|\n)*copy or download the files again") as caught:
            amc.load_model(model, checkpoint, rules=rules(), strict=strict)
        assert "strict=" not in str(caught.value)
    assert (model.layers[1].norm.detach().view(torch.uint8) == POISON).all()
