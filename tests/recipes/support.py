"""Small checkpoints with the names and formats of published ones, and what every function does with them and a recipe.

The reference is computed element by element from exact float64 values, which the producers of the codes return.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import automodel_conv as amc
from automodel_conv.planning.layouts import LAYOUTS
from automodel_conv.testing import assert_bytes_equal
from tests.kernels.test_code_tables import rounded
from tests.planning.kernel_orders import kernel_tensors
from tests.quantized.producers import Producer
from tests.zoo.ranks import assert_ranks_read_their_parts

PLAIN, FLOAT32, EXPERTS, DENSE = "plain", "float32", "experts", "dense"
"""Kinds of tensors: not quantized (bfloat16 or float32), or quantized by the producer of the experts or of the other
matrices."""


Others = Mapping[str, tuple[tuple[int, ...], str]]


class Family(NamedTuple):
    """A published checkpoint in small: its names, its formats and its recipe."""

    recipe: Callable[[], list[Any]]
    config: Mapping[str, Any]
    modules: Mapping[str, int]
    """Number of experts by name of the module of experts."""
    matrices: tuple[str, str, str]
    """Names of gate, up and down."""
    sizes: tuple[int, int]
    """Intermediate size and hidden size of the experts."""
    others: Others
    """Shape and kind of all other tensors."""
    experts: Producer | None = None
    """Producer of the codes of experts; None if they are not quantized."""
    dense: Producer | None = None
    are_groupable: bool = False
    """Whether codes of experts can be grouped as they are."""


class Published(NamedTuple):
    """The files of a family, and the values in them."""

    path: Path
    family: Family
    exact: Mapping[str, Tensor]
    """Values by name of the weight; those of codes are rounded once, to bfloat16."""

    @property
    def model_type(self) -> str:
        return self.family.config["model_type"]

    def rules(self) -> list[Any]:
        return self.family.recipe()


def write(path: Path, family: Family) -> Published:
    """Write the checkpoint of a family."""
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    producers = {EXPERTS: family.experts, DENSE: family.dense}
    for name, (shape, kind) in tensors_of(family).items():
        weight = torch.randn(shape, generator=generator) * 0.05
        weight = weight if kind == FLOAT32 else weight.to(torch.bfloat16)
        producer = producers.get(kind)
        if producer is None:
            stored[name] = exact[name] = weight
            continue
        parts, values = producer.make(weight)
        exact[name] = rounded(values.numpy(), torch.bfloat16)
        for suffix, part in parts.items():
            stored[name.removesuffix(".weight") + suffix if suffix.startswith(".") else name + suffix] = part
    path.mkdir()
    names = sorted(stored)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, in_file in files.items():
        save_file({name: stored[name].contiguous() for name in in_file}, path / file)
    weight_map = {name: file for file, in_file in files.items() for name in in_file}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(family.config))
    return Published(path, family, exact)


def tensors_of(family: Family) -> Others:
    """Return shape and kind of each weight."""
    inner, hidden = family.sizes
    gate, up, down = family.matrices
    shapes = {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    experts = {
        f"{module}.{expert}.{matrix}.weight": (shape, EXPERTS)
        for module, number in family.modules.items()
        for expert in range(number)
        for matrix, shape in shapes.items()
    }
    return {**family.others, **experts}


def reference(published: Published, layout: str = "transformers") -> dict[str, Tensor]:
    """Return all tensors with grouped experts, each element by its position."""
    family, exact = published.family, dict(published.exact)
    gate, up, down = family.matrices
    grouped: dict[str, Tensor] = {}
    for module, number in family.modules.items():
        parts = {
            matrix: torch.stack([exact.pop(f"{module}.{expert}.{matrix}.weight") for expert in range(number)])
            for matrix in family.matrices
        }
        inner, hidden = family.sizes
        first = torch.empty(number, 2 * inner, hidden, dtype=torch.bfloat16)
        alternate = layout == "gpt_oss"
        for i in range(inner):
            first[:, 2 * i if alternate else i] = parts[gate][:, i]
            first[:, 2 * i + 1 if alternate else inner + i] = parts[up][:, i]
        if layout.startswith("vllm"):
            arranged = kernel_tensors(layout, *(parts[matrix] for matrix in family.matrices))
            grouped[f"{module}.w13_weight"], grouped[f"{module}.w2_weight"] = arranged
            continue
        names = {"nemo": ("gate_and_up_projs", "down_projs")}
        first_name, down_name = names.get(layout, ("gate_up_proj", "down_proj"))
        for name, weight in ((first_name, first), (down_name, parts[down])):
            arranged = weight.transpose(1, 2) if layout in ("nemo", "gpt_oss") else weight
            grouped[f"{module}.{name}"] = arranged.clone(memory_format=torch.contiguous_format)
    return {**exact, **grouped}


def fits(layout: str | None, family: Family) -> bool:
    """Return whether the blocks of a layout divide the sizes of the experts."""
    inner, hidden = family.sizes
    if layout == "vllm_trtllm":
        return inner % 128 == 0 and hidden % 64 == 0
    return layout != "vllm_trtllm_padded" or hidden % 64 == 0


def files_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert_bytes_equal(tensor, expected[name], strides=True)


def loads_in_every_layout(published: Published) -> None:
    for layout in (None, *LAYOUTS):
        if not fits(layout, published.family):
            with pytest.raises(amc.UnsupportedError, match="does not fit the blocks of the layout"):
                amc.load_state_dict(published.path, rules=published.rules(), layout=layout)
            continue
        loaded = amc.load_state_dict(published.path, rules=published.rules(), layout=layout)
        assert all(name.endswith((".weight_shape", ".input_scale")) for name in loaded.report.left_out)
        assert_same(loaded, reference(published, layout or "transformers"))


def converts_to_every_layout_and_back(published: Published) -> None:
    options = {"rules": published.rules(), "dequantize": True}
    in_files = [name for name, layout in LAYOUTS.items() if not layout.is_padded and fits(name, published.family)]
    for layout in in_files:
        there, back = published.path.parent / layout, published.path.parent / f"from-{layout}"
        amc.convert_checkpoint(published.path, there, layout=layout, **options)
        amc.verify_checkpoint(published.path, there, **options)  # in the layout that the files state
        assert_same(files_of(there), reference(published, layout))
        amc.convert_checkpoint(there, back, rules=published.rules(), layout="per_expert")
        assert_same(files_of(back), published.exact)


def keeps_codes_or_advises_to_decode(published: Published) -> None:
    there, back = published.path.parent / "there", published.path.parent / "back"
    if published.family.are_groupable:
        amc.convert_checkpoint(published.path, there, rules=published.rules(), layout="nemo")
        assert_same(amc.load_state_dict(there, rules=published.rules()), reference(published))
        amc.convert_checkpoint(there, back, rules=published.rules(), layout="per_expert")
        assert_same(files_of(back), files_of(published.path))
    elif published.family.experts is not None:
        with pytest.raises(amc.UnsupportedError, match="dequantize=True"):
            amc.convert_checkpoint(published.path, there, rules=published.rules(), layout="nemo")
    copied = published.path.parent / "copied"
    amc.convert_checkpoint(published.path, copied, rules=[])
    assert_same(files_of(copied), files_of(published.path))


def saves_and_reverts(published: Published) -> None:
    saved = published.path.parent / "saved"
    loaded = amc.load_state_dict(published.path, rules=published.rules(), layout="vllm")
    amc.save_checkpoint(loaded, saved, layout="vllm", rules=published.rules())
    assert_same(files_of(saved), published.exact)
    grouped = amc.convert_state_dict(published.exact, rules=published.rules(), layout="nemo")
    assert_same(grouped, reference(published, "nemo"))
    assert_same(amc.revert_state_dict(grouped, rules=published.rules(), layout="nemo"), published.exact)


def ranks_read_their_parts(published: Published) -> None:
    assert_ranks_read_their_parts(published.path, reference(published), rules=published.rules())


def is_named_by_the_error_without_rules(published: Published) -> None:
    recipe = f"pass rules=automodel_conv.recipes.{published.family.recipe.__name__}()"
    calls = [
        lambda: amc.load_state_dict(published.path),
        lambda: amc.compile_plan(published.path),
        lambda: amc.convert_checkpoint(published.path, published.path.parent / "new"),
    ]
    for call in calls:
        with pytest.raises(amc.UnsupportedError) as caught:
            call()
        assert f"has no model type {published.model_type!r}" in str(caught.value)
        assert recipe in str(caught.value)
    assert not (published.path.parent / "new").exists()


def reports_an_expert_that_is_missing(published: Published) -> None:
    module = max(published.family.modules, key=published.family.modules.__getitem__)
    removed = f"{module}.0.{published.family.matrices[-1]}."
    index = published.path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    kept = {name: file for name, file in weight_map.items() if not name.startswith(removed)}
    assert len(kept) < len(weight_map)
    for file in sorted(published.path.glob("*.safetensors")):
        save_file({name: tensor for name, tensor in load_file(file).items() if name in kept}, file)
    index.write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(amc.NameProblems) as caught:
        amc.load_state_dict(published.path, rules=published.rules())
    assert caught.value.incomplete == ((f"{module}.down_proj", (f"{removed}weight",)),)


CHECKS = [
    loads_in_every_layout,
    converts_to_every_layout_and_back,
    keeps_codes_or_advises_to_decode,
    saves_and_reverts,
    ranks_read_their_parts,
    is_named_by_the_error_without_rules,
    reports_an_expert_that_is_missing,
]
"""Checks of every function of the package with a published checkpoint and its recipe."""
