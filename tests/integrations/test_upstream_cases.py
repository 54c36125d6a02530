"""Cases of transformers' own tests of the converting function, under the hook: the results are the same.

Each case is a small model with experts and other weights. Every test counts the targets that were converted by plan.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("transformers", reason="hooks the loader of transformers")
from safetensors.torch import save_file
from transformers import PreTrainedConfig, core_model_loading, modeling_utils
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)

import automodel_conv as amc
from automodel_conv.integrations.hooked_load import HookedLoad
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.integrations.cases import Case, Small, assert_same_tensors, convert
from tests.integrations.support import assert_same_model

E, INNER, H = 3, 4, 2


def since(name):
    """Skip if the installed transformers lacks a class of later releases."""
    return pytest.mark.skipif(not hasattr(core_model_loading, name), reason=f"this transformers has no {name}")


class Loaded(NamedTuple):
    model: Any
    info: Any
    load: HookedLoad
    file: Path


def load(case: Case, directory: Path) -> Loaded:
    """Load both ways; check the same tensors, report, remembered rules, and reverted tensors."""
    file = directory / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in case.tensors.items()}, file)
    stock, info, rules = convert(case, file)
    with amc.accelerate_transformers() as acceleration:
        hooked, hooked_info, hooked_rules = convert(case, file)
    assert vars(hooked_info) == vars(info)
    assert_same_model(hooked, stock)
    used, expected = (
        [number for number, rule in enumerate(all_) if any(rule is kept for kept in model._weight_conversions)]
        for all_, model in ((hooked_rules, hooked), (rules, stock))
    )
    assert used == expected
    assert_same_tensors(reverted(hooked), reverted(stock))
    return Loaded(hooked, hooked_info, acceleration.loads[0], file)


def reverted(model):
    return revert_weight_conversion(model, model.state_dict())


def assert_fits(loaded: Loaded):
    info = loaded.info
    assert (info.missing_keys, info.unexpected_keys, info.mismatched_keys) == (set(), set(), set())
    assert info.conversion_errors == {}


def tensors_of(shapes):
    return {name: address_valued(shape, torch.float32, 100 * k) for k, (name, shape) in enumerate(shapes.items())}


def experts(path="experts", count=E):
    """Return names and shapes of a checkpoint's experts: gate, up and down."""
    shapes = {"w1": (INNER, H), "w3": (INNER, H), "w2": (H, INNER)}
    return {f"{path}.{e}.{name}.weight": shape for e in range(count) for name, shape in shapes.items()}


def grouped(path="experts", count=E):
    return {f"{path}.gate_up_proj": (count, 2 * INNER, H), f"{path}.down_proj": (count, H, INNER)}


def expert_rules(path="experts", start=""):
    gate, up, down = (f"{start}{path}.*.{name}.weight" for name in ("w1", "w3", "w2"))
    operations = [MergeModulelist(dim=0), Concatenate(dim=1)]
    return [
        WeightConverter([gate, up], f"{path}.gate_up_proj", operations=operations),
        WeightConverter(down, f"{path}.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


def assert_grouped(loaded: Loaded, tensors, *, checkpoint="experts", path="experts", numbers=range(E)):
    """Check that the grouped experts of the model are those of the checkpoint, stacked one by one."""
    state = loaded.model.state_dict()
    for e, number in enumerate(numbers):
        w1, w2, w3 = (tensors[f"{checkpoint}.{number}.{name}.weight"] for name in ("w1", "w2", "w3"))
        assert_bytes_equal(state[f"{path}.gate_up_proj"][e], torch.cat([w1, w3]))
        assert_bytes_equal(state[f"{path}.down_proj"][e], w2)


def qkv(path="self_attn", out=(3, H)):
    return {f"{path}.{name}_proj.weight": out for name in "qkv"}


def qkv_rule(path="self_attn", operations=None):
    return WeightConverter(f"{path}.qkv_proj.weight", list(qkv(path)), operations=operations or [Chunk(dim=0)])


def moe_and_qkv(rule_of_qkv):
    layers = [f"model.layers.{n}" for n in range(2)]
    shapes: dict[str, tuple[int, ...]] = {"mlp.down_proj.weight": (H, H)}
    stored: dict[str, tuple[int, ...]] = {"mlp.w2.weight": (H, H)}
    for layer in layers:
        shapes |= grouped(f"{layer}.experts") | qkv(f"{layer}.self_attn")
        stored |= experts(f"{layer}.experts") | {f"{layer}.self_attn.qkv_proj.weight": (9, H)}
    rules = [*expert_rules(), rule_of_qkv, WeightRenaming("mlp.w2.weight", "mlp.down_proj.weight")]
    return Case(shapes, tensors_of(stored), rules)


def test_experts_and_qkv_are_converted_and_a_layer_without_a_rule_is_reported(tmp_path):
    case = moe_and_qkv(qkv_rule("model.layers.0.self_attn"))
    loaded = load(case, tmp_path)
    assert loaded.info.missing_keys == set(qkv("model.layers.1.self_attn"))
    assert loaded.info.unexpected_keys == {"model.layers.1.self_attn.qkv_proj.weight"}
    assert len(loaded.load.lowered) == 2 * 2 + 3
    for layer in ("model.layers.0", "model.layers.1"):
        assert_grouped(loaded, case.tensors, checkpoint=f"{layer}.experts", path=f"{layer}.experts")
    parts = case.tensors["model.layers.0.self_attn.qkv_proj.weight"].chunk(3)
    for name, part in zip(qkv("model.layers.0.self_attn"), parts, strict=True):
        assert_bytes_equal(loaded.model.state_dict()[name], part)


def test_experts_and_qkv_are_saved_unchanged(tmp_path):
    case = moe_and_qkv(qkv_rule())
    loaded = load(case, tmp_path)
    assert_fits(loaded)
    assert len(loaded.load.lowered) == 2 * (2 + 3)
    assert_same_tensors(reverted(loaded.model), case.tensors)


def test_experts_of_text_and_vision_are_split_and_saved_unchanged(tmp_path):
    fuse = ErnieFuseAndSplitTextVisionExperts
    rules = [
        WeightConverter(
            ["experts.*.w1.weight", "experts.*.w3.weight"],
            ["experts.gate_up_proj", "extra_experts.gate_up_proj"],
            operations=[fuse(stack_dim=0, concat_dim=1)],
        ),
        WeightConverter(
            "experts.*.w2.weight",
            ["experts.down_proj", "extra_experts.down_proj"],
            operations=[fuse(stack_dim=0, concat_dim=1)],
        ),
        qkv_rule(),
    ]
    shapes, stored = qkv("layers.0.self_attn"), {"layers.0.self_attn.qkv_proj.weight": (9, H)}
    for name in ("experts", "extra_experts"):
        shapes |= grouped(f"layers.0.{name}", 2)
    stored |= experts("layers.0.experts", 4)
    case = Case(shapes, tensors_of(stored), rules)
    loaded = load(case, tmp_path)
    assert_fits(loaded)
    assert len(loaded.load.lowered) == 4 + 3
    for name, numbers in (("experts", (0, 1)), ("extra_experts", (2, 3))):
        path = f"layers.0.{name}"
        assert_grouped(loaded, case.tensors, checkpoint="layers.0.experts", path=path, numbers=numbers)
    assert_same_tensors(reverted(loaded.model), case.tensors)


HEADS, HEAD = 2, 8


def permuted(tensor, inverse=False):
    """Permute rows for rotary halves: row ``2 i + k`` of a head becomes row ``k * HEAD / 2 + i``."""
    rows = [head * HEAD + 2 * i + k for head in range(HEADS) for k in range(2) for i in range(HEAD // 2)]
    if inverse:
        rows = [rows.index(row) for row in range(len(rows))]
    return tensor[rows]


VISION = PreTrainedConfig(
    vision_config=PreTrainedConfig(hidden_size=HEADS * HEAD, head_dim=HEAD, num_attention_heads=HEADS)
)


@since("VisionUnfuseAndPermuteForRope")
def test_vision_qkv_is_split_and_permuted_for_rotary_embeddings(tmp_path):
    size = HEADS * HEAD
    unfuse = core_model_loading.VisionUnfuseAndPermuteForRope(dim=0, permute_layer_names=["q_proj", "k_proj"])
    case = Case(
        qkv(out=(size, size)) | grouped(),
        tensors_of({"self_attn.qkv_proj.weight": (3 * size, size)} | experts()),
        [qkv_rule(operations=[unfuse]), *expert_rules()],
        VISION,
    )
    loaded = load(case, tmp_path)
    assert_fits(loaded)
    assert len(loaded.load.lowered) == 3 + 2
    q, k, v = case.tensors["self_attn.qkv_proj.weight"].chunk(3)
    for name, part in zip(qkv(), (permuted(q), permuted(k), v), strict=True):
        assert_bytes_equal(loaded.model.state_dict()[name], part)


@since("VisionFuseAndPermuteForRope")
def test_vision_qkv_is_permuted_back_and_merged(tmp_path):
    size = HEADS * HEAD
    fuse = core_model_loading.VisionFuseAndPermuteForRope(dim=0, permute_layer_names=["q_proj", "k_proj"], inverse=True)
    case = Case(
        {"self_attn.qkv_proj.weight": (3 * size, size)} | grouped(),
        tensors_of(qkv(out=(size, size)) | experts()),
        [WeightConverter(list(qkv()), "self_attn.qkv_proj.weight", operations=[fuse]), *expert_rules()],
        VISION,
    )
    loaded = load(case, tmp_path)
    assert_fits(loaded)
    assert len(loaded.load.lowered) == 1 + 2
    q, k, v = (case.tensors[name] for name in qkv())
    expected = torch.cat([permuted(q, inverse=True), permuted(k, inverse=True), v])
    assert_bytes_equal(loaded.model.state_dict()["self_attn.qkv_proj.weight"], expected)


def scoped(rule, scope, base=None):
    rule.scope_prefix = scope
    if base is not None:
        rule.base_model_prefix = base
    return rule


def test_scoped_renaming_and_converter_apply_only_in_their_scope(tmp_path):
    shapes: dict[str, tuple[int, ...]] = {"q.weight": (1, H)}
    stored: dict[str, tuple[int, ...]] = {"old_q.weight": (1, H)} | experts()
    for tower in ("vision", "text"):
        shapes |= {f"{tower}.q.weight": (1, H)}
        stored |= {f"{tower}.old_q.weight": (1, H)} | experts(f"{tower}.experts")
    rules = [scoped(rule, "vision") for rule in (WeightRenaming("^old_q", "q"), *expert_rules(start="^"))]
    loaded = load(Case(shapes | grouped("vision.experts"), tensors_of(stored), rules, base_model_prefix=""), tmp_path)
    assert set(loaded.load.lowered) == set(grouped("vision.experts"))
    assert loaded.info.missing_keys == {"q.weight", "text.q.weight"}
    assert "old_q.weight" in loaded.info.unexpected_keys
    assert "text.old_q.weight" in loaded.info.unexpected_keys
    shapes |= grouped("text.experts")
    with pytest.raises(amc.UnsupportedError, match=r"(?s)has no rule that groups .*text\.experts\.gate_up_proj"):
        load(Case(shapes | grouped("vision.experts"), tensors_of(stored), rules, base_model_prefix=""), tmp_path)


@pytest.mark.parametrize(
    ("scope", "module", "stored"),
    [("", "model", ""), ("sub", "model.sub", "sub."), ("", "model", "model.")],
    ids=["base prefix left out", "scope below the base prefix", "base prefix present"],
)
def test_a_scope_is_found_with_and_without_the_base_prefix(tmp_path, scope, module, stored):
    rules = [WeightRenaming("^old_q", "q"), WeightRenaming("^old_experts", "experts")]
    case = Case(
        {f"{module}.q.weight": (1, H)} | grouped(f"{module}.experts"),
        tensors_of({f"{stored}old_q.weight": (1, H)} | experts(f"{stored}old_experts")),
        [*(scoped(rule, scope, "model") for rule in rules), *expert_rules()],
    )
    loaded = load(case, tmp_path)
    assert_fits(loaded)
    assert set(loaded.load.lowered) == set(grouped(f"{module}.experts"))
    assert_grouped(loaded, case.tensors, checkpoint=f"{stored}old_experts", path=f"{module}.experts")
    if stored == "model.":
        assert_same_tensors(reverted(loaded.model), case.tensors)


def test_renaming_before_a_converter_is_reverted(tmp_path):
    rules = [WeightRenaming("^decoder", "encoder"), scoped(qkv_rule("attn"), "encoder"), *expert_rules()]
    stored = {"decoder.attn.qkv_proj.weight": (9, H)} | experts("decoder.experts")
    shapes = qkv("encoder.attn") | grouped("encoder.experts")
    case = Case(shapes, tensors_of(stored), rules, base_model_prefix="")
    loaded = load(case, tmp_path)
    assert_fits(loaded)
    assert set(loaded.load.lowered) == set(shapes)
    assert_same_tensors(reverted(loaded.model), case.tensors)


@since("GroupWeightRename")
@pytest.mark.parametrize("shifted", [True, False], ids=["old names", "model names"])
@pytest.mark.parametrize(
    ("one", "two"),
    [("norm", "norm"), ("experts", "experts"), ("experts", "norm"), ("norm", "experts")],
)
def test_group_is_renamed_only_if_its_first_name_is_present(tmp_path, one, two, shifted):
    """Check groups with and without experts as the first name, which transformers must see to rename the others."""
    shapes, stored = grouped("plain"), experts("plain")
    patterns = [f"^a0.{one}", f"^a1.{two}"], [f"a1.{one}", f"a2.{two}"]
    rules = [core_model_loading.GroupWeightRename(*patterns), *expert_rules("plain")]
    for kind, (old, new) in ((one, (0, 1)), (two, (1, 2))):
        source = f"a{old if shifted else new}.{kind}"
        stored |= experts(source) if kind == "experts" else {f"{source}.weight": (H,)}
        shapes |= grouped(f"a{new}.{kind}") if kind == "experts" else {f"a{new}.{kind}.weight": (H,)}
        rules += expert_rules(f"a{new}.experts") if kind == "experts" else []
    case = Case(shapes, tensors_of(stored), rules)
    loaded = load(case, tmp_path)
    assert_fits(loaded)
    if shifted and (one, two) == ("experts", "norm"):
        assert loaded.load.lowered == ()
        assert all("only if transformers sees" in reason for reason in loaded.load.left.values())
    else:
        assert set(loaded.load.lowered) == {name for name in shapes if "experts" in name or "plain" in name}
    if "experts" not in (one, two):  # 5.17 does not revert converted names of a group
        assert_same_tensors(reverted(loaded.model), case.tensors)


@pytest.mark.parametrize("present", [True, False], ids=["names to change", "model names"])
@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({"prefix_to_remove": "odd"}, "odd.model.layers.", "model.layers."),
        ({"prefix_to_add": "model"}, "layers.", "model.layers."),
        ({"prefix_to_remove": "odd", "model_prefix": "model.layers"}, "model.layers.odd.", "model.layers."),
        ({"prefix_to_add": "layers", "model_prefix": "model"}, "model.", "model.layers."),
    ],
    ids=["removed", "added", "removed below", "added below"],
)
def test_prefix_is_changed_if_present_and_reverted(tmp_path, change, old, new, present):
    prefix = old if present else new
    case = Case(
        {f"{new}0.norm.weight": (H,)} | grouped(f"{new}0.experts"),
        tensors_of({f"{prefix}0.norm.weight": (H,)} | experts(f"{prefix}0.experts")),
        [PrefixChange(**change), *expert_rules()],
    )
    loaded = load(case, tmp_path)
    assert_fits(loaded)
    assert set(loaded.load.lowered) == set(grouped(f"{new}0.experts"))
    assert_same_tensors(reverted(loaded.model), case.tensors)


def test_qkv_of_unequal_heads_is_the_same_as_in_transformers(tmp_path):
    shapes = {"self_attn.q_proj.weight": (4, H), "self_attn.k_proj.weight": (2, H), "self_attn.v_proj.weight": (2, H)}
    stored = {"self_attn.qkv_proj.weight": (8, H)} | experts()
    loaded = load(Case(shapes | grouped(), tensors_of(stored), [qkv_rule(), *expert_rules()]), tmp_path)
    assert set(grouped()) <= set(loaded.load.lowered)


def test_duplicate_name_loads_the_tensor_that_transformers_chooses(tmp_path):
    stored = experts("old_experts") | experts() | {"down.weight": (H,)}
    rules = [WeightRenaming("old_experts", "experts"), *expert_rules()]
    extra = grouped("layers.experts") | {"down.weight": (H,)}
    stored |= experts("layers.experts")
    loaded = load(Case(grouped() | extra, tensors_of(stored), rules), tmp_path)
    assert set(loaded.load.lowered) == set(grouped("layers.experts"))
    assert set(loaded.load.left) == set(grouped())


@pytest.mark.skipif(
    "skipped_pp_keys" not in inspect.signature(modeling_utils.LoadStateDictInfo).parameters,
    reason="this transformers has no pipeline stages",
)
def test_experts_of_another_pipeline_stage_are_skipped_and_not_unexpected(tmp_path, monkeypatch):
    stage = SimpleNamespace(pp_rank=0, find_rank_for_key=lambda name, layers, prefix: int(name.split(".")[2]))
    monkeypatch.setattr(Small, "_pp_stage", stage, raising=False)
    shapes = grouped("model.layers.0.experts") | {"model.layers.2.norm.weight": (H,)}
    stored = experts("model.layers.0.experts") | experts("model.layers.1.experts") | {"model.layers.0.odd": (H,)}
    case = Case(shapes, tensors_of(stored), expert_rules())
    loaded = load(case, tmp_path)
    assert set(loaded.load.lowered) == set(grouped("model.layers.0.experts"))
    assert loaded.info.skipped_pp_keys == set(grouped("model.layers.1.experts"))
    assert loaded.info.unexpected_keys == {"model.layers.0.odd"}
    assert loaded.info.missing_keys == {"model.layers.2.norm.weight"}


def test_an_operation_that_raises_is_in_the_report_and_the_rest_is_loaded(tmp_path, monkeypatch):
    def convert(self, *args, **kwargs):
        raise ValueError("no such luck")

    monkeypatch.setattr(MergeModulelist, "convert", convert)
    loaded = load(moe_and_qkv(qkv_rule()), tmp_path)
    assert set(loaded.load.lowered) == {f"model.layers.{n}.{name}" for n in range(2) for name in qkv()}
    assert len(loaded.load.left) == len(loaded.info.conversion_errors) == 4
    assert all("no such luck" in text for text in loaded.info.conversion_errors.values())
