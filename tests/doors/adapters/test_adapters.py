"""Tests of merging adapters into checkpoints on disk, and of converting them: exact bytes, or one error and no file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import automodel_conv as amc
from automodel_conv.converting import ConvertReport
from automodel_conv.errors import CheckpointError, ConversionError, DestinationError, NameProblems, UnsupportedError
from automodel_conv.execution import adding
from automodel_conv.files import system
from automodel_conv.publishing import conversion_files
from tests.comparing import assert_same, contents, tensors_of
from tests.doors.adapters.support import (
    EXPERTS,
    HIDDEN,
    INNER,
    LAYERS,
    MODULES,
    default_adapter,
    factors,
    merged,
    published,
    shapes,
    write_base,
)
from tests.lora.support import PREFIX, dyadic, write_adapter

pytest.importorskip("transformers", reason="builds a transformers model")

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a directory with a base in three files and an adapter."""
    root = tmp_path_factory.mktemp("adapters")
    write_base(root / "base", published(), files=3)
    default_adapter(root / "adapter")
    return root


@pytest.fixture
def base(place):
    return place / "base"


@pytest.fixture
def adapter(place):
    return place / "adapter"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_is_the_sum_rounded_once(tmp_path, dtype, adapter):
    tensors = published(dtype)
    write_base(tmp_path / "base", tensors)
    report = amc.merge_adapter(tmp_path / "base", adapter, tmp_path / "out")
    expected = merged(tensors, factors(*MODULES))
    assert_same(tensors_of(tmp_path / "out"), expected)
    assert isinstance(report, ConvertReport)
    assert sorted(report.adapted) == sorted(f"{module}.weight" for module in MODULES)
    changed = {name for name in tensors if not torch.equal(expected[name], tensors[name])}
    assert changed == set(report.adapted)


def test_result_is_a_checkpoint_with_the_files_beside_the_weights(tmp_path, base, adapter):
    report = amc.merge_adapter(base, adapter, tmp_path / "out", max_shard_size="3KB")
    assert len(report.files) == 3
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert not any("adapter" in path.name for path in (tmp_path / "out").iterdir())
    assert_same(amc.load_state_dict(tmp_path / "out", rules=[]), merged(published(), factors(*MODULES)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scratch_bytes", [1 << 16, 1 << 20])
@pytest.mark.parametrize("chunk", [5, 64])
def test_cuts_do_not_change_the_sum(tmp_path, base, adapter, monkeypatch, threads, scratch_bytes, chunk):
    monkeypatch.setattr(adding, "_CHUNK", chunk)
    for layout in (None, "gpt_oss"):
        out = tmp_path / f"{layout}"
        amc.merge_adapter(base, adapter, out, layout=layout, threads=threads, scratch_bytes=scratch_bytes)
        found = tensors_of(out) if layout is None else amc.load_state_dict(out, rules=[])
        if layout is None:
            assert_same(found, merged(published(), factors(*MODULES)))
        else:
            amc.convert_checkpoint(
                write_base(tmp_path / "b", merged(published(), factors(*MODULES))), tmp_path / "c", layout=layout
            )
            assert_same(found, tensors_of(tmp_path / "c"))


def test_slab_may_begin_inside_a_target(tmp_path, monkeypatch):
    """Slabs have less than 64 KiB here, and the tensor 1.5 MB."""
    rows, columns = 700, 1100
    weight, lora_a, lora_b = torch.randn(rows, columns).bfloat16(), dyadic(2, columns), dyadic(rows, 2, seed=1)
    (tmp_path / "base").mkdir()
    save_file({"other": torch.ones(3), "w.weight": weight}, tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "a", {f"{PREFIX}w.lora_A.weight": lora_a, f"{PREFIX}w.lora_B.weight": lora_b})
    amc.merge_adapter(tmp_path / "base", tmp_path / "a", tmp_path / "out", scratch_bytes=1 << 16, threads=2)
    expected = (weight.double() + 2.0 * (lora_b.double() @ lora_a.double())).float().bfloat16()
    assert_same(tensors_of(tmp_path / "out"), {"other": torch.ones(3), "w.weight": expected})


@pytest.mark.parametrize("layout", ["transformers", "nemo", "vllm", "gpt_oss"])
def test_layout_has_the_merged_weights(tmp_path, base, adapter, layout):
    whole = write_base(tmp_path / "whole", merged(published(), factors(*MODULES)))
    amc.convert_checkpoint(whole, tmp_path / "expected", layout=layout)
    report = amc.merge_adapter(base, adapter, tmp_path / "out", layout=layout)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    before = tmp_path / "before"
    amc.convert_checkpoint(base, before, layout=layout)
    old, new = tensors_of(before), tensors_of(tmp_path / "out")
    assert set(report.adapted) == {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("layout", ["transformers", "nemo", "vllm", "gpt_oss"])
def test_base_may_be_in_any_layout(tmp_path, base, adapter, layout):
    amc.convert_checkpoint(base, tmp_path / "base", layout=layout)
    whole = write_base(tmp_path / "whole", merged(published(), factors(*MODULES)))
    amc.convert_checkpoint(whole, tmp_path / "expected", layout=layout)
    amc.merge_adapter(tmp_path / "base", adapter, tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))


def test_weights_are_cast_before_the_sum(tmp_path, base, adapter):
    amc.merge_adapter(base, adapter, tmp_path / "out", dtype=torch.float32)
    assert_same(tensors_of(tmp_path / "out"), merged(published(), factors(*MODULES), dtype=torch.float32))


def test_several_adapters_add_up_with_their_weights(tmp_path, base, adapter):
    other = factors(MODULES[0], "lm_head", seed=555)
    write_adapter(tmp_path / "other", other)
    amc.merge_adapter(base, [(adapter, 0.5), (tmp_path / "other", -1)], tmp_path / "out", dtype=torch.float32)
    first = merged(published(), factors(*MODULES), 0.5 * 2.0, torch.float32)
    assert_same(tensors_of(tmp_path / "out"), merged(first, other, -1 * 2.0))


@pytest.mark.parametrize("form", ["per_expert", "transformers", "vllm"])
def test_every_form_gives_the_same_bytes(tmp_path, base, adapter, form):
    report = amc.convert_adapter(adapter, tmp_path / "adapter", base=base, layout=form)
    assert report.files == ("adapter_model.safetensors",)
    assert report.bytes_written == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    stacks = {name for name in report.modules if name.endswith(("experts", "experts.base_layer"))}
    assert len(stacks) == (0 if form == "per_expert" else 2 * LAYERS)
    assert len(report.zeros) == len(stacks)
    assert str(report).startswith("files ")
    amc.merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), merged(published(), factors(*MODULES)))


def test_alpha_of_zero_changes_no_value(tmp_path, base):
    write_adapter(tmp_path / "a", factors(*MODULES), lora_alpha=0)
    report = amc.merge_adapter(base, tmp_path / "a", tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), published())
    assert len(report.adapted) == len(MODULES)


def test_rslora_divides_by_the_root_of_the_rank(tmp_path, base):
    tensors = factors(*MODULES, rank=4)
    write_adapter(tmp_path / "a", tensors, r=4, lora_alpha=4, use_rslora=True)
    amc.merge_adapter(base, tmp_path / "a", tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), merged(published(), tensors, 4 / 2))


def test_embeddings_and_whole_tensors_are_merged(tmp_path, base):
    head, norm = dyadic(10, HIDDEN, seed=5), dyadic(HIDDEN, seed=6)
    a, b = dyadic(2, 10), dyadic(HIDDEN, 2, seed=1)
    embedding = {f"{PREFIX}model.embed_tokens.lora_embedding_{part}": t for part, t in (("A", a), ("B", b))}
    whole = {f"{PREFIX}lm_head.weight": head, f"{PREFIX}model.norm.weight": norm}
    write_adapter(tmp_path / "a", embedding | whole)
    report = amc.merge_adapter(base, tmp_path / "a", tmp_path / "out")
    expected = published()
    embed = expected["model.embed_tokens.weight"].double() + 2.0 * (b.double() @ a.double()).T
    expected["model.embed_tokens.weight"] = embed.float().bfloat16()
    expected["lm_head.weight"], expected["model.norm.weight"] = head.bfloat16(), norm.bfloat16()
    assert_same(tensors_of(tmp_path / "out"), expected)
    assert len(report.adapted) == 3


@pytest.mark.parametrize("sizes", [{"num_experts": 1, "num_experts_per_tok": 1}])
def test_one_expert_may_be_merged(tmp_path, sizes):
    tensors = {name: t for name, t in published().items() if ".experts." not in name or ".experts.0." in name}
    tensors = {name: t[:1].clone() if name.endswith("mlp.gate.weight") else t for name, t in tensors.items()}
    base = write_base(tmp_path / "base", tensors, **sizes)
    own = factors(*(module for module in MODULES if ".experts.0." in module))
    write_adapter(tmp_path / "a", own)
    for form in ("transformers", "vllm"):
        amc.convert_adapter(tmp_path / "a", tmp_path / form, base=base, layout=form)
        amc.merge_adapter(base, tmp_path / form, tmp_path / f"{form}-out")
        assert_same(tensors_of(tmp_path / f"{form}-out"), merged(tensors, own))


def test_empty_tensors_are_copied(tmp_path):
    (tmp_path / "base").mkdir()
    tensors = {"empty": torch.empty(0, 4), "w.weight": torch.zeros(2, 3)}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "a", {f"{PREFIX}w.lora_A.weight": dyadic(2, 3), f"{PREFIX}w.lora_B.weight": dyadic(2, 2)})
    amc.merge_adapter(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert tensors_of(tmp_path / "out")["empty"].shape == (0, 4)


def test_matrix_without_elements_is_merged(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"w.weight": torch.empty(0, 3), "x.weight": torch.ones(2, 3)}, tmp_path / "base" / "model.safetensors")
    lora = {f"{PREFIX}w.lora_A.weight": dyadic(2, 3), f"{PREFIX}w.lora_B.weight": torch.empty(0, 2)}
    write_adapter(tmp_path / "a", lora)
    amc.merge_adapter(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), {"w.weight": torch.empty(0, 3), "x.weight": torch.ones(2, 3)})


@pytest.fixture
def tied(tmp_path):
    """Return a base whose output layer has the weight of the embedding."""
    tensors = {name: tensor for name, tensor in published().items() if name != "lm_head.weight"}
    return write_base(tmp_path / "tied", tensors, tie_word_embeddings=True)


def test_tied_weight_that_is_replaced_is_refused(tmp_path, tied):
    names = ("lm_head.weight", "model.embed_tokens.weight")
    write_adapter(tmp_path / "a", {f"{PREFIX}{name}": dyadic(10, HIDDEN, seed=i) for i, name in enumerate(names)})
    with pytest.raises(NameProblems, match=r"(?s)lm_head.weight: .*ties to it.*embed_tokens.weight: .*ties to it"):
        amc.merge_adapter(tied, tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# One error with names, and nothing written.


def fused(name, values, rank=2):
    return {f"{PREFIX}{name}.lora_A.weight": values[0], f"{PREFIX}{name}.lora_B.weight": values[1]}


GATE = MODULES[0]
WRONG = {
    "one misspelt module": (
        factors(*MODULES) | fused(f"{GATE[:-4]}porj", (dyadic(2, HIDDEN), dyadic(INNER, 2))),
        {},
        ["gate_porj"],
    ),
    "names of another model": (
        fused("transformer.h.0.attn.c_attn", (dyadic(2, 4), dyadic(4, 2))),
        {},
        ["c_attn", "1 of 1"],
    ),
    "a layer too much": (
        fused(f"model.layers.{LAYERS}.mlp.gate", (dyadic(2, HIDDEN), dyadic(EXPERTS, 2))),
        {},
        [f"layers.{LAYERS}"],
    ),
    "an expert too much": (
        fused(f"model.layers.0.mlp.experts.{EXPERTS}.up_proj", (dyadic(2, HIDDEN), dyadic(INNER, 2))),
        {},
        ["experts.3"],
    ),
    "A and B swapped": (fused(GATE, (dyadic(INNER, 2), dyadic(2, HIDDEN))), {}, [GATE, "A and B are swapped"]),
    "another size": (fused(GATE, (dyadic(2, HIDDEN + 1), dyadic(INNER, 2))), {}, [GATE, "[2, 17]"]),
    "another rank": (factors(GATE, rank=4), {}, [GATE, "at rank 2"]),
    "a stack of another size": (
        fused("model.layers.0.mlp.experts", (dyadic(4, INNER), dyadic(HIDDEN, 4))),
        {"target_parameters": ["experts.down_proj"]},
        ["model.layers.0.mlp.experts", "[3, 16, 8]"],
    ),
    "a lone matrix": (
        factors(*MODULES) | {f"{PREFIX}lm_head.lora_A.weight": dyadic(2, HIDDEN)},
        {},
        ["lm_head: only lora_A"],
    ),
    "a whole tensor without a place": ({f"{PREFIX}model.nrom.weight": dyadic(HIDDEN)}, {}, ["model.nrom.weight"]),
    "a whole tensor of another size": ({f"{PREFIX}model.norm.weight": dyadic(3)}, {}, ["model.norm.weight", "[3]"]),
    "a magnitude": (
        factors(*MODULES) | {f"{PREFIX}{GATE}.lora_magnitude_vector": dyadic(INNER)},
        {},
        ["magnitude_vector"],
    ),
    "a variant": (factors(*MODULES), {"use_dora": True}, ["use_dora"]),
    "another method": (factors(*MODULES), {"peft_type": "LOHA"}, ["LOHA"]),
    "integers": (
        fused(GATE, (torch.ones(2, HIDDEN, dtype=torch.int32), torch.ones(INNER, 2, dtype=torch.int32))),
        {},
        [GATE, "I32"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_no_module_is_ignored(tmp_path, base, case):
    tensors, settings, names = WRONG[case]
    wrong = write_adapter(tmp_path / "a", tensors, **settings)
    calls = [
        lambda: amc.merge_adapter(base, wrong, tmp_path / "out"),
        lambda: amc.merge_adapter(base, [(wrong, 1.0)], tmp_path / "out", layout="nemo"),
        lambda: amc.convert_adapter(wrong, tmp_path / "out", base=base, layout="transformers"),
        lambda: amc.load_state_dict(base, adapter=wrong),
    ]
    for call in calls:
        with pytest.raises((NameProblems, UnsupportedError)) as caught:
            call()
        assert all(name in str(caught.value) for name in names), str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind", ["no directory", "no config", "no weights", "bin", "config is no JSON", "config is a list", "no r"]
)
def test_broken_adapter_is_named_and_nothing_is_written(tmp_path, base, kind):
    broken = tmp_path / "broken"
    if kind != "no directory":
        write_adapter(broken, factors(GATE))
    config, weights = broken / "adapter_config.json", broken / "adapter_model.safetensors"
    if kind == "no config":
        config.unlink()
    if kind in ("no weights", "bin"):
        weights.unlink()
    if kind == "bin":
        torch.save(factors(GATE), broken / "adapter_model.bin")
    texts = {"config is no JSON": "{", "config is a list": "[]", "no r": '{"peft_type": "LORA", "lora_alpha": 2}'}
    if kind in texts:
        config.write_text(texts[kind])
    for call in (
        lambda: amc.merge_adapter(base, broken, tmp_path / "out"),
        lambda: amc.convert_adapter(broken, tmp_path / "out", base=base, layout="vllm"),
    ):
        with pytest.raises(CheckpointError, match=r"broken"):
            call()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argument", [[], None, 3, ["path"], [("path", "x")]], ids=str)
def test_argument_that_is_no_adapter_is_refused(tmp_path, base, argument):
    with pytest.raises(UnsupportedError, match=r"not an adapter"):
        amc.merge_adapter(base, argument, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("rank_pattern", 4), ("alpha_pattern", 8)])
def test_experts_that_differ_are_merged_and_not_stacked(tmp_path, base, key, value):
    rank = value if key == "rank_pattern" else 2
    tensors = factors(*MODULES) | factors(GATE, rank=rank, seed=777)
    alpha = {"alpha_pattern": {GATE: 8}} | {key: {GATE: value}}
    write_adapter(tmp_path / "a", tensors, **alpha)
    with pytest.raises(
        UnsupportedError, match=rf"(?s)mlp.experts.gate_up_proj.*{key.split('_')[0] if rank == 4 else 'scale'}.*{GATE}"
    ):
        amc.convert_adapter(tmp_path / "a", tmp_path / "out", base=base, layout="transformers")
    assert not (tmp_path / "out").exists()
    amc.merge_adapter(base, tmp_path / "a", tmp_path / "out")
    others = {name: tensor for name, tensor in tensors.items() if GATE not in name}
    own = {name: tensor for name, tensor in tensors.items() if GATE in name}
    assert_same(tensors_of(tmp_path / "out"), merged(merged(published(), others), own, 8 / rank))


def test_unknown_form_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UnsupportedError, match=r"unknown form(.|\n)*write 'per_expert'"):
        amc.convert_adapter(tmp_path / "nothing", tmp_path / "out", base=tmp_path / "nothing", layout="per-expert")


def test_unknown_layout_is_refused(tmp_path, base, adapter):
    with pytest.raises(UnsupportedError, match=r"megablocks"):
        amc.merge_adapter(base, adapter, tmp_path / "out", layout="megablocks")
    assert not (tmp_path / "out").exists()


def test_destination_with_weights_is_refused_and_stays(tmp_path, base, adapter):
    for name in ("model.safetensors", "adapter_model.safetensors"):
        out = tmp_path / name.split("_")[0]
        out.mkdir()
        save_file({"x": torch.zeros(1)}, out / name)
        before = contents(out)
        for call in (
            lambda out=out: amc.merge_adapter(base, adapter, out),
            lambda out=out: amc.convert_adapter(adapter, out, base=base, layout="transformers"),
        ):
            with pytest.raises(DestinationError, match=name):
                call()
            assert contents(out) == before


def test_own_directories_are_refused(place, base, adapter):
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for destination in (base, adapter):
        with pytest.raises(DestinationError):
            amc.merge_adapter(base, adapter, destination)
        with pytest.raises(DestinationError):
            amc.convert_adapter(adapter, destination, base=base, layout="vllm")
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


# Quantized bases.


def quantized(directory):
    """Write a base whose first expert's gate has codes of FP8 with a scale for each block; return its value too."""
    tensors = published()
    name = f"{GATE}.weight"
    codes, scale = (tensors[name].float() / 4).to(torch.float8_e4m3fn), torch.tensor([[0.25]])
    tensors[name] = codes
    tensors[f"{name}_scale_inv"] = scale
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": []}
    return write_base(directory, tensors, quantization_config=config), codes.double() * 0.25


def test_codes_are_refused_without_dequantize(tmp_path, adapter):
    base, _ = quantized(tmp_path / "base")
    with pytest.raises(UnsupportedError, match=rf"(?s)1 tensors that are quantized.*{GATE}.weight.*dequantize=True"):
        amc.merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_codes_that_the_adapter_leaves_alone_are_copied(tmp_path):
    base, _ = quantized(tmp_path / "base")
    own = factors(MODULES[1])
    write_adapter(tmp_path / "a", own)
    amc.merge_adapter(base, tmp_path / "a", tmp_path / "out")
    before = tensors_of(base)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == before.keys()
    for name in before:
        same = torch.equal(found[name].view(torch.uint8), before[name].view(torch.uint8))
        assert same == (name != f"{MODULES[1]}.weight"), name


def test_codes_are_decoded_before_the_sum(tmp_path, adapter):
    base, decoded = quantized(tmp_path / "base")
    amc.merge_adapter(base, adapter, tmp_path / "out", dequantize=True)
    values = published() | {f"{GATE}.weight": decoded.float().bfloat16()}
    assert_same(tensors_of(tmp_path / "out"), merged(values, factors(*MODULES)))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


# Interrupted, repeated and verified.


def merge(base, adapter, out, **options):
    return amc.merge_adapter(base, adapter, out, **{"max_shard_size": "3KB", "threads": 1} | options)


def fail_on_call(monkeypatch, number):
    """Make a call of ``system.sync`` fail, which finishes each file."""
    calls, sync = [], system.sync

    def failing(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise OSError(5, "Input/output error")
        return sync(*arguments)

    monkeypatch.setattr(system, "sync", failing)


@pytest.mark.parametrize("number", [1, 3, 9])
def test_interrupted_merge_continues(tmp_path, base, adapter, monkeypatch, number):
    whole = merge(base, adapter, tmp_path / "whole")
    fail_on_call(monkeypatch, number)
    with pytest.raises(ConversionError, match=r"Input/output error"):
        merge(base, adapter, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(CheckpointError):
        amc.open_checkpoint(tmp_path / "out")
    report = merge(base, adapter, tmp_path / "out")
    assert (report.files_resumed > 0) == (number > 1)
    assert report.files == whole.files
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("changed", ["weights", "config", "weight", "another adapter", "order", "nothing"])
def test_merge_of_another_adapter_does_not_continue(tmp_path, base, monkeypatch, changed):
    adapter, second = default_adapter(tmp_path / "adapter"), write_adapter(tmp_path / "2", factors(*MODULES, seed=400))
    argument = [(adapter, 1.0), (second, 0.5)]
    fail_on_call(monkeypatch, 9)
    with pytest.raises(ConversionError):
        merge(base, argument, tmp_path / "out")
    monkeypatch.undo()
    if changed == "weights":
        write_adapter(adapter, factors(*MODULES, seed=300))
    elif changed == "config":
        default_adapter(adapter, lora_alpha=8)
    elif changed == "weight":
        argument = [(adapter, 0.5), (second, 0.5)]
    elif changed == "another adapter":
        argument = [(default_adapter(tmp_path / "other"), 1.0), (second, 0.5)]
    elif changed == "order":
        argument = [(second, 1.0), (adapter, 0.5)]
    if changed == "nothing":
        report = merge(base, argument, tmp_path / "out")
    else:
        with pytest.raises(DestinationError, match=r"differs from this one"):
            merge(base, argument, tmp_path / "out")
        report = merge(base, argument, tmp_path / "out", resume=False)
    assert (report.files_resumed > 0) == (changed == "nothing")
    merge(base, argument, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("changed", ["weights", "config"])
def test_adapter_that_changes_meanwhile_is_refused(tmp_path, base, monkeypatch, changed):
    adapter = default_adapter(tmp_path / "adapter")
    sync = system.sync

    def change(*arguments):
        if changed == "weights":
            write_adapter(adapter, factors(*MODULES, seed=300))
        else:
            default_adapter(adapter, lora_alpha=8)
        return sync(*arguments)

    monkeypatch.setattr(system, "sync", change)
    with pytest.raises(ConversionError):
        amc.merge_adapter(base, adapter, tmp_path / "out", verify=False)
    with pytest.raises(CheckpointError):
        amc.open_checkpoint(tmp_path / "out")


def test_repeated_merge_is_compared_and_writes_nothing(tmp_path, base, adapter):
    first = merge(base, adapter, tmp_path / "out")
    assert not first.was_complete
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = merge(base, adapter, tmp_path / "out")
    assert again.was_complete
    assert (again.bytes_written, again.adapted) == (0, first.adapted)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def convert(base, adapter, out):
    return amc.convert_checkpoint(base, out, rules=[], max_shard_size="3KB", threads=1)


@pytest.mark.parametrize(("call", "other"), [(merge, {"lora_alpha": 8}), (convert, {})], ids=["another scale", "none"])
def test_complete_merge_of_another_adapter_is_refused(tmp_path, base, adapter, call, other):
    merge(base, adapter, tmp_path / "out")
    before = contents(tmp_path / "out")
    argument = default_adapter(tmp_path / "a", **other)
    with pytest.raises(DestinationError):
        call(base, argument, tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_flipped_bit_in_a_file_is_found(tmp_path, adapter, monkeypatch, name):
    expected = merged(published(), factors(*MODULES))[name].view(torch.uint8).numpy().tobytes()
    compare = conversion_files.compare_file

    def compare_flipped(slabs, file, *arguments):
        path = Path(file.describe())
        data = bytearray(path.read_bytes())
        data[data.index(expected) + 3] ^= 1
        path.write_bytes(data)
        compare(slabs, file, *arguments)

    monkeypatch.setattr(conversion_files, "compare_file", compare_flipped)
    write_base(tmp_path / "base", published())
    with pytest.raises(ConversionError, match=name):
        amc.merge_adapter(tmp_path / "base", adapter, tmp_path / "out", threads=1)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_checksums_are_those_of_the_merged_tensors(tmp_path, base, adapter):
    amc.merge_adapter(base, adapter, tmp_path / "out", checksums=True)
    assert_same(amc.load_state_dict(tmp_path / "out", rules=[], verify=True), merged(published(), factors(*MODULES)))


def test_base_is_not_changed(tmp_path, base, adapter):
    amc.merge_adapter(base, adapter, tmp_path / "out")
    assert_same(tensors_of(base), published())
    assert load_file(adapter / "adapter_model.safetensors").keys() == factors(*MODULES).keys()
    assert shapes().keys() == published().keys()
