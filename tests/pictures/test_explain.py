"""Tests of the sentences of a page: they name the elements that upstream or an element-by-element reference moves."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import defaultdict
from math import prod

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import automodel_conv as amc
from automodel_conv import CopyPlan
from automodel_conv.dtypes import itemsize
from automodel_conv.planning.copies import Fallback, SourceTable, Target
from automodel_conv.planning.layouts import LAYOUTS
from automodel_conv.planning.regions import Region
from automodel_conv.planning.sharding import placed
from tests.pictures.explaining import assert_explained, distinct, explanations
from tests.planning.oracles import execute
from tests.planning.parts import moe_plan, random_mesh, random_placements, torch_part
from tests.planning.plans import JOIN, MERGE, padded_plan, plan_of, random_plan, table, targets_of, three_plans
from tests.quantized.producers import PRODUCERS, block_wise
from tests.quantized.test_schemes import weight, write


def sources_of(plan):
    return distinct(dict(zip(plan.sources.names, plan.sources.shapes, strict=True)))


def executed(plan, sources):
    """Return all targets, one element at a time."""
    results = execute(plan, {name: values.ravel().tolist() for name, values in sources.items()})
    return {t.name: numpy.array(results[t.name], dtype=numpy.float32).reshape(t.shape) for t in plan.targets}


@pytest.mark.parametrize("shape", [(3, 4), (4, 4), (1, 1), (1, 5)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_merged_experts(show, count, shape):
    sources = table(**{f"e__{i}__{w}": shape for i in range(count) for w in ("gate", "up")})
    groups = [[f"e.{i}.{w}" for i in range(count)] for w in ("gate", "up")]
    plan = plan_of(sources, targets_of(sources, groups, [MERGE, JOIN], ["gate_up"]))
    values = sources_of(plan)
    merged = [numpy.concatenate([values[f"e.{i}.gate"], values[f"e.{i}.up"]]) for i in range(count)]
    assert_explained(show(plan), values, {"gate_up": numpy.stack(merged)})


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (5, 5), (0,), (3, 0), (2, 3, 4, 5)], ids=str)
def test_a_tensor_under_another_name(show, shape):
    sources = table(a=shape)
    plan = plan_of(sources, targets_of(sources, [["a"]], [], ["b"]))
    values = sources_of(plan)
    assert_explained(show(plan), values, {"b": values["a"]})


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_zeros_that_pad_a_tensor_are_constants(show, rows):
    plan = padded_plan(rows, 5)
    values = sources_of(plan)
    assert_explained(show(plan), values, {"padded": numpy.concatenate([values["head"], numpy.zeros((5 - rows, 4))])})


@pytest.mark.parametrize("seed", range(8))
def test_random_plans(show, seed):
    _, plan = random_plan(seed)
    values = sources_of(plan)
    assert_explained(show(plan), values, executed(plan, values))


def test_composed_plans_and_plans_from_json(show):
    first, second, third = three_plans()
    for plan in (first.then(second).then(third), CopyPlan.from_json(second.then(third).to_json())):
        values = sources_of(plan)
        assert_explained(show(plan), values, executed(plan, values))


def publish_distinct(directory, model_type, sizes):
    """Write a checkpoint as the type is published, with elements that all differ in bfloat16; return its tensors."""
    from tests.doors.layouts_on_disk.support import publish, weights_in  # needs transformers

    publish(model_type, sizes, directory)
    finite = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    values = torch.cat([finite, -finite])
    tensors = {}
    for file in weights_in(directory):
        stored = load_file(directory / file)
        for name, tensor in stored.items():
            stored[name], values = (
                values[: tensor.numel()].reshape(tensor.shape).to(tensor.dtype),
                values[tensor.numel() :],
            )
            assert stored[name].shape == tensor.shape
            tensors[name] = stored[name].float().numpy()
        save_file(stored, directory / file, metadata={"format": "pt"})
    return tensors


def files_of(directory):
    return {name: file.name for file in directory.glob("*.safetensors") for name in load_file(file)}


def loaded_from(directory, **options):
    return {name: tensor.float().numpy() for name, tensor in amc.load_state_dict(directory, **options).items()}


SIZES_FOR = {"vllm_trtllm": (1, 128, 64), "vllm_trtllm_padded": (2, 24, 64)}
"""Experts, intermediate and hidden size for layouts with blocks; other layouts take any size."""


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_checkpoints_in_every_layout(show, tmp_path, layout):
    tensors = publish_distinct(tmp_path, "qwen3_moe", SIZES_FOR.get(layout, (3, 12, 16)))
    plan = amc.compile_plan(tmp_path, layout=layout)
    assert_explained(show(plan), tensors, loaded_from(tmp_path, layout=layout), files_of(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("mixtral", (3, 16, 16)), ("nemotron_h", (1, 12, 16)), ("gpt_oss", (3, 16, 16)), ("qwen3_vl_moe", (1, 12, 16))],
)
def test_checkpoints_of_other_types(show, tmp_path, model_type, sizes):
    tensors = publish_distinct(tmp_path, model_type, sizes)
    assert_explained(show(amc.compile_plan(tmp_path)), tensors, loaded_from(tmp_path), files_of(tmp_path))


def loading_code(tensors):
    """Return tensors that copies from tensors a, b and c fill, through temporary tensors and with constants."""
    a, b, c = (tensors[name] for name in "abc")
    padded = torch.zeros(4, 6)
    padded[:3, 1:5] = a
    overwritten = b.clone()
    overwritten[1] = a[0]
    return {
        "turned": a.t().contiguous(),
        "joined": torch.cat([a[:, ::2], b[:, 1:3]], 1),
        "stacked": torch.stack([a, b], -1),
        "alternating": torch.stack([a, b]).reshape(2, 3, 2, 2).permute(1, 3, 0, 2).reshape(6, 4),
        "padded": padded,
        "overwritten": overwritten,
        "diagonal": a.diagonal().clone(),
        "repeated": c.repeat(2, 2),
        "one element": a[1, 2].clone(),
        "constant": torch.full((2, 2), 0.5),
    }


def test_traced_loading_code(show, tmp_path):
    tensors = distinct({"a": (3, 4), "b": (3, 4), "c": (3,)})
    stored = {name: torch.tensor(values) for name, values in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    plan = amc.trace_loader(loading_code, tmp_path, calls="dict")
    expected = {name: tensor.numpy() for name, tensor in loading_code(stored).items()}
    assert_explained(show(plan), tensors, expected, dict.fromkeys("abc", "model.safetensors"))


HOLDERS = """
(elements) => elements.map((element) => page.plan.holdersOf(page.plan.targets[0], element))
"""


@pytest.mark.parametrize("seed", range(4))
def test_ranks_that_hold_an_element_are_those_of_torch(show, seed):
    rng = random.Random(seed)
    plan = moe_plan(3, 2, 4)
    shape = plan.targets[0].shape
    mesh = random_mesh(rng, 3)
    placements = random_placements(rng, shape, mesh)
    ranks = list(itertools.product(*map(range, mesh)))
    regions = {str(rank): {"grouped": placed(shape, mesh, rank, placements)} for rank in ranks}
    numbered = torch.arange(prod(shape)).reshape(shape)
    parts = [torch_part(numbered, mesh, rank, placements) for rank in ranks]
    found = show(plan, ranks=regions).evaluate(HOLDERS, list(range(prod(shape))))
    for element, holders in enumerate(found):
        expected = [
            [rank, (part == element).nonzero()[0].tolist()] for rank, part in enumerate(parts) if element in part
        ]
        assert holders == expected


@pytest.mark.parametrize("runs", [(((0, 2), (4, 1)), ((1, 3),)), (((4, 1), (0, 2)), ((3, 1), (0, 1)))], ids=str)
def test_a_part_of_several_runs_holds_elements_in_their_order(show, runs):
    sources = table(a=(5, 4))
    plan = plan_of(sources, targets_of(sources, [["a"]], [], ["b"]))
    page = show(plan, ranks={"one": {"b": Region((5, 4), runs)}, "all": {}})
    rows, columns = ([at for start, length in of for at in range(start, start + length)] for of in runs)
    for element, holders in enumerate(page.evaluate(HOLDERS, list(range(20)))):
        row, column = divmod(element, 4)
        holds = row in rows and column in columns
        expected = [[0, [rows.index(row), columns.index(column)]]] if holds else []
        assert holders == [*expected, [1, [row, column]]]


DECODED = re.compile(r"model-\d.safetensors: a\.weight\[.*?\] decoded with (\S+?)(?:\[([\d, ]*)\])?(?: and \S+)* → .*")


CODES = {"a.weight", "a.weight_packed", "a.qweight"}


class Stored:
    """A checkpoint whose bytes are changed, to see which loaded elements depend on them."""

    def __init__(self, directory):
        self.directory = directory
        self.before = self.loaded()

    def loaded(self):
        return amc.load_state_dict(self.directory, rules=[], dtype=torch.float32)["a.weight"].flatten()

    def elements_of(self, name, byte):
        """Return the loaded elements that change with two bits of a byte of a stored tensor."""
        file = next(file for file in self.directory.glob("*.safetensors") if name in load_file(file))
        stored = load_file(file)
        data = stored[name].reshape(-1).view(torch.uint8)
        data[byte] ^= 0x11
        save_file(stored | {name: data.view(stored[name].dtype).view(stored[name].shape)}, file)
        after = self.loaded()
        data[byte] ^= 0x11
        save_file(stored | {name: data.view(stored[name].dtype).view(stored[name].shape)}, file)
        return {*((after != self.before) | after.isnan()).nonzero().flatten().tolist()}


SCALED = (
    *("fp8 32x16", "fp8 per tensor", "mxfp8", "fp4 experts", "int4 g32 with zero points", "int8 per channel"),
    *("gptq v2", "awq", "nvfp4", "fp8 per channel of modelopt", "fp8 blocks of modelopt", "nvfp4 of modelopt"),
)
"""Formats of all shapes of scales, and all orders of codes."""


@pytest.mark.parametrize("name", SCALED)
def test_codes_and_scales_of_an_element_are_those_that_change_it(show, tmp_path, name):
    write(tmp_path, PRODUCERS[name], {"a.weight": weight(32, 128)})
    plan, stored = amc.compile_plan(tmp_path, rules=[]), Stored(tmp_path)
    told = explanations(show(plan), "a.weight", range(len(stored.before)))
    ((_, decode),) = plan.sources.decodes.items()
    scales, shape = plan.sources.names[decode.scales], plan.sources.shapes[decode.scales]
    by_byte, by_scale = defaultdict(set), defaultdict(set)
    for element, (text, source, at) in enumerate(told):
        named, index = DECODED.fullmatch(text).groups()
        assert (source, named) == ("a.weight", scales)
        by_byte[at * decode.bits // 8].add(element)
        by_scale[() if index is None else tuple(map(int, index.split(", ")))].add(element)
    codes = next(name for file in tmp_path.glob("*.safetensors") for name in load_file(file) if name in CODES)
    for byte in random.Random(name).sample(sorted(by_byte), 2):
        assert stored.elements_of(codes, byte) == by_byte[byte]
    if decode.scale_word:  # only the name of the scales is told
        assert by_scale.keys() == {()}
        return
    assert by_scale.keys() == {*itertools.product(*map(range, shape))}
    for place in random.Random(name).sample(sorted(by_scale), min(2, len(by_scale))):
        at = int(numpy.ravel_multi_index(place, shape)) if shape else 0
        affected = stored.elements_of(scales, (at + 1) * itemsize(plan.sources.dtypes[decode.scales]) - 1)
        assert affected
        assert affected <= by_scale[place]
        assert not any(stored.before[element] for element in by_scale[place] - affected)


@pytest.mark.parametrize("block", [(4, 16), (10, 32), (3, 5)], ids=str)
def test_each_matrix_of_a_stack_has_its_own_scales(show, tmp_path, block):
    each = [block_wise(weight(10, 32, seed=seed), block)[0] for seed in range(3)]
    save_file(
        {f"experts.down_proj{suffix}": torch.stack([stored[suffix] for stored in each]) for suffix in each[0]},
        tmp_path / "model.safetensors",
    )
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = show(amc.compile_plan(tmp_path, rules=[], source_layout="transformers"))
    for element, (text, _, _) in enumerate(explanations(page, "experts.down_proj", range(3 * 10 * 32))):
        expert, row, column = (int(i) for i in numpy.unravel_index(element, (3, 10, 32)))
        scale = f"experts.down_proj_scale_inv[{expert}, {row // block[0]}, {column // block[1]}]"
        assert text.startswith(
            f"model.safetensors: experts.down_proj[{expert}, {row}, {column}] decoded with {scale} → "
        )


def test_a_target_that_code_computes_has_no_source(show):
    sources = table(a=(2, 3))
    target = Target("b", "BF16", (2, 3), -1, (0,), (), fallback=Fallback("no copies can do it", dict))
    page = show(CopyPlan(sources, (target,)))
    reason = "is computed by transformers' own code, because no copies can do it"
    assert explanations(page, "b", [4]) == [[f"b[1, 1] {reason}", None, None]]
    page.locator("#targets .row").click()
    assert page.inner_text("#sentence") == f"b[0, 0] {reason}"
    assert page.is_hidden("#source-matrix canvas")
    assert page.is_hidden("#arrow")


@pytest.mark.parametrize("value", [1.5, float("inf"), float("-inf"), float("nan"), True])
def test_constants_are_named(show, value):
    plan = padded_plan(2, 5)
    target = plan.targets[0]
    plan = plan_of(plan.sources, [target._replace(fills=tuple(f._replace(value=value) for f in target.fills))])
    text = {True: "true"}.get(value, str(value))
    assert explanations(show(plan), "padded", [19]) == [[f"the constant {text} → padded[4, 3]", None, None]]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 3)], ids=str)
def test_a_tensor_without_elements_is_told(show, shape):
    sources = table(a=shape)
    page = show(plan_of(sources, targets_of(sources, [["a"]], [], ["b"])))
    page.locator("#targets .row").click()
    assert page.inner_text("#sentence") == "b has no elements"


def test_bytes_that_are_read_as_another_dtype_are_told(show):
    sources = SourceTable(["a"], ["F32"], [(2, 3)]).read_as({0: "U8"})
    page = show(plan_of(sources, targets_of(sources, [["a"]], [], ["b"], "U8")))
    assert explanations(page, "b", [13]) == [["a.view(U8)[1, 1] → b[1, 1]", "a", 13]]
