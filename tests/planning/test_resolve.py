"""Tests of names resolved by template, over the whole registry, against the installed transformers for every key."""

import random
import zlib
from copy import deepcopy

import pytest

from tests.planning import oracles

pytest.importorskip("transformers", reason="the oracle is transformers' own renaming")

from transformers import core_model_loading as core
from transformers.core_model_loading import (
    Chunk,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from automodel_conv.planning.resolve import resolve
from automodel_conv.upstream.rules import RuleSet

REGISTRY = oracles.registry()
NUMBERS = (0, 1, 2, 9, 10, 11, 12)
DECOYS = (
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.3.mlp.gate.weight",
    "model.layers.3.mlp.gate_proj.weight",
    "model.layers.10.mlp.experts.w1",
    "model.layers.3.self_attn.q_proj.weight",
    "0.weight",
    "10.bias",
    "w",
    "model.layers.3.mlp.experts.gate_up_proj",
    "model.layers.3.mlp.shared_experts.gate_proj.weight",
    "blocks_2.norm1.weight",
    "blocks_10.norm1.weight",
)


def branches(rule):
    """Return the regular expressions that a rule searches for, one by one."""
    parts = rule.compiled_sources.pattern.removeprefix("(?P<").split("|(?P<")
    return [part.split(">", 1)[1].removesuffix(")") for part in parts]


def checkpoint_names(rules, seed=0):
    """Return shuffled names that the rules match, at several layers and experts, some matching two, and decoys."""
    rng = random.Random(seed)
    patterns = [pattern for rule in rules for pattern in branches(rule)]
    names = dict.fromkeys(DECOYS)
    for pattern in patterns:
        for n in (0, 2, 9, 10, 12):
            inner = oracles.example(pattern, n)
            layer = rng.choice(NUMBERS)
            others = [oracles.example(rng.choice(patterns), rng.choice(NUMBERS)) for _ in range(2)]
            bare = inner.strip(".")
            names[f"{inner}.bias" if inner[-1:].isdigit() else inner or "bias"] = None
            names[f"{bare}.{others[0].strip('.')}.w"] = None
            if not pattern.startswith("^"):
                names[f"model.layers.{layer}.{bare}.bias"] = None
                names[f"model.layers.{(layer + 1) % 4}.{bare}.weight"] = None
                names[f"{layer}.{others[1].strip('.')}.{bare}.w"] = None
    shuffled = list(names)
    rng.shuffle(shuffled)
    return shuffled


def ours(names, rules, targets, prefix=None):
    rule_set = RuleSet(rules)
    rule_set.base_model_prefix = prefix
    resolution = resolve(names, rule_set, targets)
    assigned = {}
    for target, rule, slots in resolution.assignments:
        sources = {pattern: [names[row] for row in rows] for pattern, rows in slots.items()}
        assigned[target] = (None, next(iter(sources.values()))[0]) if rule < 0 else (rule, sources)
    return assigned, set(resolution.unexpected)


def theirs(names, rules, targets, prefix=None):
    mapped, unexpected = oracles.upstream_mapping(names, rules, targets, prefix)
    assigned = {
        target: (None, next(iter(slots.values()))[0]) if rule is None else (rule, slots)
        for target, (rule, slots, _) in mapped.items()
    }
    return assigned, unexpected


def assert_agree(names, rules, targets=None, prefix=None):
    mine, expected = ours(names, rules, targets, prefix), theirs(names, rules, targets, prefix)
    wrong = {
        key: (mine[0].get(key), expected[0].get(key))
        for key in mine[0].keys() | expected[0].keys()
        if mine[0].get(key) != expected[0].get(key)
    }
    assert not wrong
    assert mine[1] == expected[1]


def some_targets(names, rules, prefix):
    """Return most of the targets of the rules, some names that are already right, some with or without a prefix."""
    targets = {}
    for name in [*theirs(names, rules, None)[0], *names]:
        kind = zlib.crc32(name.encode()) % 9
        if kind < 5 or (kind == 5 and name in names):
            targets[name] = True
        elif kind == 6:
            targets[f"{prefix}.{name}"] = True
        elif kind == 7 and name.startswith(f"{prefix}."):
            targets[name.removeprefix(f"{prefix}.")] = True
    return targets


@pytest.mark.parametrize("entry", REGISTRY)
def test_templates_equal_keys_one_by_one_over_the_registry(entry):
    rules = REGISTRY[entry]
    names = checkpoint_names(rules)
    assert_agree(names, rules)
    with_legacy = [*rules, *REGISTRY["legacy"]]  # as for every model
    assert_agree(names, with_legacy, some_targets(names, with_legacy, "model"), "model")


@pytest.mark.parametrize("entry", list(REGISTRY)[::6])
@pytest.mark.parametrize("scope", ["tower", "towers.1", ""])
def test_scoped_rules_equal_keys_one_by_one(entry, scope):
    rules = deepcopy(REGISTRY[entry])
    if not hasattr(rules[0], "scope_prefix"):
        pytest.skip("rules of this transformers have no scope")
    for rule in rules:
        rule.scope_prefix, rule.base_model_prefix = scope, "model"
    plain = checkpoint_names(rules, seed=1)[:60]
    names = [*plain]
    for lead in ("tower.", "model.tower.", "towers.1.", "towers.10.", "model.towers.1.", "towers.2."):
        names += [lead + name for name in plain]
    assert_agree(names, rules)


def test_registry_is_not_empty():
    assert len(REGISTRY) > 100
    names = checkpoint_names(REGISTRY["mixtral"])
    assigned = theirs(names, REGISTRY["mixtral"], None)[0]
    assert any(rule is not None and len(slots) > 1 for rule, slots in assigned.values())
    assert any(len(rows) > 2 for rule, slots in assigned.values() if rule is not None for rows in slots.values())


def merging(pattern="experts.*.w1.weight", target="experts.gate_up_proj"):
    return WeightConverter(pattern, target, operations=[MergeModulelist(dim=0)])


def test_parts_are_sorted_by_number():
    names = [f"layers.{n}.experts.{e}.w1.weight" for n in (10, 2, 0) for e in range(12, -1, -1)]
    assigned, _ = ours(names, [merging()], None)
    assert_agree(names, [merging()])
    for n in (10, 2, 0):
        (_, slots) = assigned[f"layers.{n}.experts.gate_up_proj"]
        assert list(slots.values()) == [[f"layers.{n}.experts.{e}.w1.weight" for e in range(13)]]


def test_two_numbers_can_be_merged_away():
    rules = [merging(r"banks.*.experts.*.w", "experts")]
    names = [f"h.{n}.banks.{b}.experts.{e}.w" for b in (11, 2, 0) for n in (3, 12) for e in (10, 9)]
    assert_agree(names, rules)
    assert len(ours(names, rules, None)[0]) == 2


def test_numbers_at_both_ends_and_by_themselves_survive():
    names = ["0", "10", "3.weight", "03.weight", "weight.7", "1.2.3", "1.2.03", "a.-1.b", "a.1e5.b", "٣.w"]
    assert_agree(names, [merging(), WeightRenaming("weight", "kernel")])


def test_number_can_move_repeat_or_vanish():
    rules = [
        WeightRenaming(r"blocks\.(\d+)\.attn", r"attn.blocks.\1"),
        WeightRenaming(r"drop\.\d+\.w", "drop.w"),
    ]
    names = [f"blocks.{n}.attn.{m}.q" for n in NUMBERS for m in (3, 11)]
    names += [f"drop.{n}.w" for n in (12, 3, 7)]
    assert_agree(names, rules)


LOOKING_AT_DIGITS = [
    r"layers\.0\.a",
    r"layers\.(?!0\.)(\d+)\.a",
    r"layers\.[02]\.a",
    r"layers\.1\d\.a",
    r"layers\.\d\.a",
    r"layers\.\d{2}\.a",
    r"layers\.(0|11)\.a",
    r"layers\.(?:[1-9]\d*)\.a",
    r"^layers\.1",
    r"layers.1.a",
    r"layers\.(?<!x)2\.a",
    r"layers\.\S{2}\.a",
    r"0\.a",
    r"layers\.\d*2\.a",
    # A single character, or a bounded number of them, can match a number of one digit.
    r"[a-z]{6}\.0\.a",
    r"layers\.[^.]\.a",
    r"layers\.\w\.a",
    r"layers\.\w1\.a",
    r"layers...a",
]


@pytest.mark.parametrize("pattern", LOOKING_AT_DIGITS)
def test_rules_that_read_digits_are_resolved_per_key(pattern):
    try:
        rules = [WeightRenaming("zzz", "layers"), WeightRenaming(pattern, "special"), merging(r"a.*.w", "a.made")]
    except ValueError:
        pytest.skip("this transformers does not take this pattern")
    names = [f"{lead}.{n}.a.{e}.w" for lead in ("layers", "zzz") for n in (*NUMBERS, 20, 21, 100) for e in (0, 11)]
    names += [f"layers.{n}.b" for n in NUMBERS]
    assert_agree(names, rules)


def test_number_split_by_a_rule_is_resolved_per_key():
    rules = [WeightRenaming(r"patch.(\d+).", r"stages.\1.patch.")]
    assert_agree([f"patch.{n}" for n in NUMBERS] + [f"patch.{n}.w" for n in NUMBERS], rules)


class EvenLayers(WeightRenaming):
    def rename_source_key(self, source_key):
        head, _, tail = source_key.partition(".")
        if head.isdigit() and int(head) % 2 == 0:
            return f"even.{head}.{tail}", self.source_patterns[0]
        return source_key, None


def test_subclass_that_reads_digits_is_resolved_per_key():
    names = [f"{n}.experts.{e}.w1.weight" for n in NUMBERS for e in (0, 10, 9)]
    rules = [EvenLayers("unused", "unused"), merging()]
    assert_agree(names, rules)
    assert any(target.startswith("even.10.") for target in ours(names, rules, None)[0])


def test_index_offset_is_applied_per_key():
    offset = getattr(core, "Inkling2IndexOffsetWeightRename", None)
    if offset is None:
        pytest.skip("this transformers has no index offset")
    rules = [offset(r"queries\.(\d+)", r"layers.\1.query", offset=1), merging()]
    names = [f"queries.{n}.weight" for n in NUMBERS]
    assert_agree(names, rules)
    assert ours(names, rules, None)[0]["layers.13.query.weight"] == (None, "queries.12.weight")


@pytest.mark.parametrize("guarded", [True, False], ids=["original", "already converted"])
def test_grouped_renames_wait_for_their_guard(guarded):
    group = getattr(core, "GroupWeightRename", None)
    if group is None:
        pytest.skip("this transformers has no grouped renames")
    rules = [
        group([r"blocks.(\d+).norm0", r"blocks.(\d+).norm1"], [r"blocks.\1.norm1", r"blocks.\1.norm2"]),
        WeightRenaming("blocks", "layers"),
    ]
    parts = ("norm0", "norm1") if guarded else ("norm1", "norm2")
    names = [f"blocks.{n}.{part}.weight" for part in parts for n in (12, 3, 0)]
    assert_agree(names, rules)
    assert set(ours(names, rules, None)[0]) == {
        f"layers.{n}.{part}.weight" for part in ("norm1", "norm2") for n in (12, 3, 0)
    }


def test_correct_name_is_left_unchanged():
    rules = [WeightRenaming("block", "layer"), merging()]
    names = ["block.3.w", "block.10.w", "layer.experts.gate_up_proj", "experts.4.w1.weight"]
    targets = {"block.3.w": 1, "layer.10.w": 1, "layer.experts.gate_up_proj": 1, "experts.4.w1.weight": 1}
    assert_agree(names, rules, targets, "model")
    assert set(ours(names, rules, targets)[0]) == set(targets)


def test_base_prefix_is_added_and_removed_where_that_helps():
    names = ["model.layers.0.w", "layers.11.w", "head.w", "model.experts.10.w1.weight", "experts.9.w1.weight"]
    targets = {"layers.0.w": 1, "model.layers.11.w": 1, "head.w": 1, "experts.gate_up_proj": 1}
    assert_agree(names, [merging()], targets, "model")
    assigned, unexpected = ours(names, [merging()], targets, "model")
    assert set(assigned) == set(targets)
    assert not unexpected


def test_first_source_in_natural_order_wins_a_target():
    rules = [WeightRenaming("old", "new"), WeightRenaming("b_new", "new")]
    names = ["b_new.w", "old.w", "new.w", "layers.10.old", "layers.10.new"]
    assert_agree(names, rules)
    resolution = resolve(names, RuleSet(rules), None)
    assert dict(resolution.duplicated) == {
        "new.w": ("b_new.w", "new.w", "old.w"),
        "layers.10.new": ("layers.10.new", "layers.10.old"),
    }


def test_sources_that_map_to_one_target_are_named():
    rules = [WeightRenaming(r"drop\.\d+\.w", "drop.w")]
    names = ["drop.3.w", "drop.10.w"]
    assert resolve(names, RuleSet(rules), None).duplicated == [("drop.w", ("drop.3.w", "drop.10.w"))]


def test_unexpected_name_counts_for_all_targets_of_its_rule():
    rules = [WeightConverter("qkv", ["q", "k", "v"], operations=[Chunk(dim=0)]), WeightRenaming("a", "b")]
    names = ["m.10.qkv.weight", "m.2.qkv.weight", "a.3"]
    targets = {"m.2.q.weight": 1, "m.2.k.weight": 1, "m.2.v.weight": 1}
    assert_agree(names, rules, targets)
    assert ours(names, rules, targets)[1] == {"b.3", *(f"m.10.{p}.weight" for p in "qkv")}


def test_name_with_a_nul_character_is_a_name():
    assert_agree(["a\0b.3.w", "c.w"], [merging()])


def test_no_names_resolve_to_nothing():
    resolution = resolve([], RuleSet([merging()]), {"a": 1})
    assert (resolution.assignments, resolution.unexpected, resolution.duplicated) == ([], [], [])


def state(rule):
    names = [n for cls in type(rule).__mro__ for n in getattr(cls, "__slots__", ())]
    names += list(getattr(rule, "__dict__", ()))
    return {
        name: repr([vars(op) for op in value]) if name == "operations" else repr(value)
        for name in names
        for value in [getattr(rule, name, None)]
    }


@pytest.mark.parametrize("entry", ["mixtral", "kimi_k25", "ernie4_5_vl_moe"])
@pytest.mark.parametrize("reverse", [False, True])
def test_rules_of_the_caller_are_never_changed(entry, reverse):
    if entry not in REGISTRY:
        pytest.skip(f"no rules for {entry} in this transformers")
    rules = deepcopy(REGISTRY[entry])
    before = [state(rule) for rule in rules]
    names = checkpoint_names(rules)
    resolve(names, RuleSet(rules, reverse=reverse), None)
    assert [state(rule) for rule in rules] == before


def test_names_that_contain_the_number_placeholder_are_kept():
    names = ["w9700000", "layers9700000.0.w", "layers9700000.1.w", "a.9700001.b9700000"]
    assert sorted(assignment.target for assignment in resolve(names, RuleSet([]), None).assignments) == sorted(names)


def test_names_with_line_ends_are_kept():
    names = ["a\n.1.w", "a.1.w", "a.1\n", "\n"]
    assert sorted(assignment.target for assignment in resolve(names, RuleSet([]), None).assignments) == sorted(names)
