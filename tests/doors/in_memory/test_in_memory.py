"""State dict in, state dict out: layouts, explicit rules, buffers of the caller, and what upstream's own code makes."""

import importlib.util
import itertools
from unittest import mock

import pytest
import torch
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import ConversionError, NameProblems, UnsupportedError
from automodel_conv.testing import address_valued, assert_bytes_equal, assert_written, guarded
from tests.comparing import assert_same

try:
    from transformers import core_model_loading as core
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        Transpose,
        WeightConverter,
        WeightRenaming,
    )

    from tests.planning import oracles
except ModuleNotFoundError:
    core = None

needs_transformers = pytest.mark.skipif(core is None, reason="transformers is not installed")
LAYOUTS = ("transformers", "nemo", "gpt_oss", "vllm")
PATH = "model.layers.3.mlp.experts"
E, I, H = 3, 5, 7  # noqa: E741


def distinct(shapes, dtype=torch.bfloat16):
    tensors, start = {}, 0
    for name, shape in shapes.items():
        tensors[name] = address_valued(shape, dtype, start)
        start += tensors[name].numel()
    return tensors


def grouped(gated=True, dtype=torch.bfloat16):
    """Experts with biases as transformers lays them out, and a tensor that is none."""
    first, rows = ("gate_up_proj", 2 * I) if gated else ("up_proj", I)
    return distinct(
        {
            f"{PATH}.{first}": (E, rows, H),
            f"{PATH}.{first}_bias": (E, rows),
            f"{PATH}.down_proj": (E, H, I),
            f"{PATH}.down_proj_bias": (E, H),
            "model.norm.weight": (H,),
        },
        dtype,
    )


def ungated_rules():
    return [WeightConverter("experts.*.up_proj.weight", "experts.up_proj", operations=[MergeModulelist(dim=0)])]


def projections(layers=2, dtype=torch.float32):
    """A checkpoint with one tensor per expert, in no good order."""
    return distinct(
        {
            f"layers.{n}.experts.{e}.{w}.weight": (H, I) if w == "w2" else (I, H)
            for e in (2, 0, 1)
            for n in range(layers)
            for w in ("w3", "w1", "w2")
        }
        | {"norm": (H,)},
        dtype,
    )


def merging():
    return [
        WeightConverter(
            ["experts.*.w1.weight", "experts.*.w3.weight"],
            "experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("experts.*.w2.weight", "experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


def merged(tensors, layers=2):
    def all_of(n, w):
        return torch.stack([tensors[f"layers.{n}.experts.{e}.{w}.weight"] for e in range(E)])

    made = {"norm": tensors["norm"]}
    for n in range(layers):
        made[f"layers.{n}.experts.gate_up_proj"] = torch.cat([all_of(n, "w1"), all_of(n, "w3")], 1)
        made[f"layers.{n}.experts.down_proj"] = all_of(n, "w2")
    return made


class Experts(nn.Module):
    def __init__(self, dtype, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.layers:
            layer.experts = nn.Module()
            layer.experts.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H, dtype=dtype, device="meta"))
            layer.experts.down_proj = nn.Parameter(torch.empty(E, H, I, dtype=dtype, device="meta"))
        self.norm = nn.Parameter(torch.empty(H, device="meta"))
        self.config = None


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts_go_there_and_back(source, target, dtype):
    start = amc.convert_state_dict(grouped(dtype=dtype), layout=source)
    made = amc.convert_state_dict(start, layout=target, source_layout=source)
    assert_same(made, amc.convert_state_dict(grouped(dtype=dtype), layout=target))
    assert_same(amc.convert_state_dict(made, layout=source, source_layout=target), start)
    assert_same(amc.revert_state_dict(made, layout=target), grouped(dtype=dtype))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_kernels_lay_experts_out_as_torch_does(source, target, dtype):
    start = amc.convert_state_dict(grouped(dtype=dtype), layout=source)
    made = {
        backend: amc.convert_state_dict(start, layout=target, source_layout=source, backend=backend)
        for backend in ("torch", "triton")
    }
    assert_same(made["triton"], made["torch"])
    back = {name: torch.full_like(tensor, 3) for name, tensor in start.items()}
    amc.convert_state_dict(made["triton"], layout=source, source_layout=target, out=back, backend="triton")
    assert_same(back, start)
    assert_same(amc.revert_state_dict(made["triton"], layout=target, backend="triton"), grouped(dtype=dtype))


@needs_transformers
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_kernels_merge_projections_as_torch_does_and_take_them_apart(layout):
    tensors = projections(dtype=torch.bfloat16)
    made = {
        backend: amc.convert_state_dict(tensors, rules=merging(), layout=layout, backend=backend)
        for backend in ("torch", "triton")
    }
    assert_same(made["triton"], made["torch"])
    assert_same(amc.revert_state_dict(made["triton"], rules=merging(), layout=layout, backend="triton"), tensors)


@needs_transformers
@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts_of_experts_without_a_gate_go_there_and_back(source, target):
    of_transformers = {"rules": ungated_rules(), "source_layout": "transformers"}
    start = amc.convert_state_dict(grouped(gated=False), layout=source, **of_transformers)
    assert sum(name.endswith(("up_proj", "up_projs", "w13_weight")) for name in start) == 1
    made = amc.convert_state_dict(start, layout=target, source_layout=source, rules=ungated_rules())
    back = amc.convert_state_dict(made, layout=source, source_layout=target, rules=ungated_rules())
    assert_same(back, start)
    first = made[next(name for name in made if name.endswith(("up_proj", "up_projs", "w13_weight")))]
    swapped = grouped(gated=False)[f"{PATH}.up_proj"]
    assert_bytes_equal(first, swapped.mT.contiguous() if target in ("nemo", "gpt_oss") else swapped)


def test_layouts_are_what_they_are_called():
    start = grouped()
    gate_up, down = start[f"{PATH}.gate_up_proj"], start[f"{PATH}.down_proj"]
    alternating = torch.stack([gate_up[:, :I], gate_up[:, I:]], 2).reshape(E, 2 * I, H)
    bias = start[f"{PATH}.gate_up_proj_bias"]
    nemo = amc.convert_state_dict(start, layout="nemo")
    assert_bytes_equal(nemo[f"{PATH}.gate_and_up_projs"], gate_up.mT.contiguous())
    assert_bytes_equal(nemo[f"{PATH}.down_projs"], down.mT.contiguous())
    vllm = amc.convert_state_dict(start, layout="vllm")
    assert vllm[f"{PATH}.w13_weight"] is gate_up
    assert vllm[f"{PATH}.w2_weight"] is down
    gpt_oss = amc.convert_state_dict(start, layout="gpt_oss")
    assert_bytes_equal(gpt_oss[f"{PATH}.gate_up_proj"], alternating.mT.contiguous())
    expected = torch.stack([bias[:, :I], bias[:, I:]], 2).reshape(E, 2 * I)
    assert_bytes_equal(gpt_oss[f"{PATH}.gate_up_proj_bias"], expected)


# --- rules ----------------------------------------------------------------------------------------


@needs_transformers
def test_explicit_rules_merge_experts_whatever_the_order_of_the_state_dict():
    tensors = projections()
    expected = merged(tensors)
    assert_same(amc.convert_state_dict(tensors, rules=merging()), expected)
    backwards = dict(reversed(tensors.items()))
    assert_same(amc.convert_state_dict(backwards, rules=merging()), expected)
    assert_same(amc.revert_state_dict(expected, rules=merging()), tensors)


@needs_transformers
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rules_and_a_layout_make_one_step(layout):
    tensors = projections()
    made = amc.convert_state_dict(tensors, rules=merging(), layout=layout)
    assert_same(made, amc.convert_state_dict(merged(tensors), layout=layout))
    assert_same(amc.revert_state_dict(made, rules=merging(), layout=layout), tensors)


@needs_transformers
def test_a_model_gives_dtypes_and_its_own_order():
    tensors = projections()
    model = Experts(torch.bfloat16)
    made = amc.convert_state_dict(tensors, model, rules=merging())
    assert list(made) == list(model.state_dict())
    expected = merged(tensors)
    for name, tensor in made.items():
        assert_bytes_equal(tensor, expected[name].to(torch.float32 if name == "norm" else torch.bfloat16))


@needs_transformers
def test_strided_sources_and_parameters_are_read_as_they_lie():
    tensors = projections()
    strided = {name: nn.Parameter(t.t().contiguous().t()) if t.dim() == 2 else t for name, t in tensors.items()}
    made = amc.convert_state_dict(strided, rules=merging())
    assert_same(made, merged(tensors))
    assert not any(t.requires_grad for t in made.values())


@needs_transformers
def test_a_missing_expert_is_named():
    tensors = projections()
    del tensors["layers.1.experts.1.w3.weight"]
    with pytest.raises(NameProblems, match=r"layers\.1\.experts\.1\.w3\.weight"):
        amc.convert_state_dict(tensors, Experts(torch.float32), rules=merging())
    with pytest.raises(NameProblems, match=r"layers\.1\.experts\.1\.w3\.weight"):
        amc.convert_state_dict(tensors, rules=merging())


@needs_transformers
def test_parts_of_different_dtypes_are_not_mixed_without_a_model():
    tensors = projections()
    name = "layers.0.experts.2.w2.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.experts\.down_proj have different dtypes"):
        amc.convert_state_dict(tensors, rules=merging())


@needs_transformers
def test_a_reference_restores_its_names_and_boundaries(tmp_path):
    from safetensors.torch import save_file

    tensors = projections()
    save_file(tensors, tmp_path / "model.safetensors")
    made = amc.convert_state_dict(tensors, rules=merging(), layout="nemo")
    back = amc.revert_state_dict(made, rules=merging(), layout="nemo", reference=tmp_path)
    assert_same(back, tensors)


# --- by reference, into buffers -------------------------------------------------------------------


@needs_transformers
def test_what_nothing_converts_is_returned_by_reference():
    tensors = projections()
    made = amc.convert_state_dict(tensors, rules=[*merging(), WeightRenaming("norm", "renamed")])
    assert made["renamed"] is tensors["norm"]
    memory = {t.untyped_storage().data_ptr() for t in tensors.values()}
    assert made["layers.0.experts.down_proj"].untyped_storage().data_ptr() not in memory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["contiguous", "backwards"])
def test_buffers_of_the_caller_are_fully_written_and_nothing_around_them(layout, order):
    start = grouped()
    expected = amc.convert_state_dict(start, layout=layout)
    buffers = {}
    for name, tensor in expected.items():
        strides = None
        if order == "backwards":  # the first dimension walks fastest
            strides = [1]
            for size in tensor.shape[:-1]:
                strides.append(strides[-1] * size)
        buffers[name] = guarded(tensor.shape, tensor.dtype, strides=strides)
    out = {name: buffer.tensor for name, buffer in buffers.items()}
    made = amc.convert_state_dict(start, layout=layout, out=out)
    assert all(made[name] is out[name] for name in out)
    for buffer in buffers.values():
        buffer.check()
        assert_written(buffer.tensor)
    assert_same(made, expected)
    assert_same(start, grouped())


def test_every_target_needs_a_buffer_that_fits():
    start = grouped()
    out = {name: torch.empty_like(t) for name, t in amc.convert_state_dict(start, layout="nemo").items()}
    less = {name: t for name, t in out.items() if not name.endswith("down_projs")}
    with pytest.raises(ConversionError, match=r"no buffer for .*down_projs"):
        amc.convert_state_dict(start, layout="nemo", out=less)
    wrong = out | {f"{PATH}.down_projs": torch.empty(E, H, I, dtype=torch.bfloat16)}
    with pytest.raises(ConversionError, match=r"down_projs does not fit"):
        amc.convert_state_dict(start, layout="nemo", out=wrong)
    wrong = out | {f"{PATH}.down_projs": torch.empty(E, I, H)}
    with pytest.raises(ConversionError, match=r"down_projs does not fit"):
        amc.convert_state_dict(start, layout="nemo", out=wrong)


def test_a_buffer_in_the_memory_of_a_source_is_refused_before_anything_is_written():
    start = grouped()
    out = {name: torch.empty_like(t) for name, t in amc.convert_state_dict(start, layout="nemo").items()}
    out[f"{PATH}.down_projs"] = start[f"{PATH}.down_proj"].view(E, I, H)
    with pytest.raises(ConversionError, match="lies in the memory of the source"):
        amc.convert_state_dict(start, layout="nemo", out=out)
    assert_same(start, grouped())


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("front_door", [amc.convert_state_dict, amc.revert_state_dict])
def test_a_bare_state_dict_says_nothing_about_its_conversion(front_door):
    with pytest.raises(UnsupportedError, match="pass model=, rules= or a layout"):
        front_door(grouped())


@pytest.mark.parametrize("argument", ["layout", "source_layout"])
def test_a_layout_that_no_tensor_has_is_refused(argument):
    per_expert = {"experts.0.gate_proj.weight": torch.ones(2, 3)}
    with pytest.raises(UnsupportedError, match="no tensor is in the layout"):
        amc.convert_state_dict(per_expert, **{argument: "nemo"})


def sized(intermediate, hidden, layout="transformers"):
    """Grouped experts of other sizes, in a layout."""
    shapes = {f"{PATH}.gate_up_proj": (E, 2 * intermediate, hidden), f"{PATH}.down_proj": (E, hidden, intermediate)}
    return amc.convert_state_dict(distinct(shapes), source_layout="transformers", layout=layout)


@pytest.mark.parametrize(("intermediate", "hidden"), [(5, 7), (4, 8), (6, 6), (1, 1), (1, 2)])
def test_grouped_experts_without_a_word_are_what_their_two_shapes_say_or_an_error(intermediate, hidden):
    plain = sized(intermediate, hidden)
    assert_same(amc.convert_state_dict(plain, layout="nemo"), sized(intermediate, hidden, "nemo"))
    with pytest.raises(UnsupportedError, match="source_layout="):
        amc.convert_state_dict(sized(intermediate, hidden, "gpt_oss"), layout="nemo")
    for name, tensor in plain.items():
        if "gate_up" in name and hidden % 2:  # along which gate and up cannot lie
            made = amc.convert_state_dict({name: tensor}, layout="nemo")
            assert_bytes_equal(made[f"{PATH}.gate_and_up_projs"], tensor.mT.contiguous())
            continue
        with pytest.raises(UnsupportedError, match=f"(?s){name}.*source_layout="):
            amc.convert_state_dict({name: tensor}, layout="nemo")


@needs_transformers
def test_ungated_experts_without_a_word_are_an_error():
    tensors = grouped(gated=False)
    with pytest.raises(UnsupportedError, match=r"(?s)up_proj.*source_layout="):
        amc.convert_state_dict(tensors, layout="nemo", rules=ungated_rules())


@needs_transformers
@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm"])
@pytest.mark.parametrize(("intermediate", "hidden"), [(5, 7), (4, 8), (6, 6)])
def test_experts_in_another_layout_are_not_taken_apart_without_a_word(intermediate, hidden, layout):
    made = sized(intermediate, hidden, layout)
    with pytest.raises(UnsupportedError, match=r"(?s)experts.* layout="):
        amc.revert_state_dict(made, rules=merging())
    apart = amc.revert_state_dict(made, rules=merging(), layout=layout)
    assert_same(apart, amc.revert_state_dict(sized(intermediate, hidden), rules=merging()))


@needs_transformers
def test_a_part_of_a_model_is_taken_apart_by_itself():
    tensors = sized(4, 8)
    for name, tensor in tensors.items():
        whole = amc.revert_state_dict(tensors, rules=merging())
        part = amc.revert_state_dict({name: tensor}, rules=merging())
        assert_same(part, {each: whole[each] for each in part})
        assert len(part) == (2 * E if "gate_up" in name else E)


def test_what_is_no_tensor_is_named():
    with pytest.raises(UnsupportedError, match=r"a\._extra_state is not a tensor"):
        amc.convert_state_dict({"a._extra_state": None}, rules=[])


@pytest.mark.parametrize("argument", ["layout", "source_layout"])
def test_an_unknown_layout_is_named(argument):
    with pytest.raises(UnsupportedError, match="unknown layout 'grouped'"):
        amc.convert_state_dict(grouped(), **{argument: "grouped"})


@pytest.mark.parametrize("front_door", [amc.convert_state_dict, amc.revert_state_dict])
def test_backends_are_never_exchanged_silently(front_door):
    with (
        mock.patch("automodel_conv.execution.copy_batch.why_not", return_value="the interpreter is off"),
        pytest.raises(UnsupportedError, match="the interpreter is off"),
    ):
        front_door(grouped(), layout="nemo", backend="triton")
    with pytest.raises(UnsupportedError, match="unknown backend 'cuda'"):
        front_door(grouped(), layout="transformers", backend="cuda")
    assert_same(front_door(grouped(), layout="transformers", backend="torch"), grouped())


def test_nothing_converts_to_nothing():
    assert amc.convert_state_dict({}, layout="nemo") == {}
    assert amc.revert_state_dict({}, layout="nemo") == {}


# --- upstream's own code --------------------------------------------------------------------------


if core is not None:

    class BackToFront(MergeModulelist):
        """An operation of a user: the experts in the other order."""

        def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
            turned = {pattern: tensors[::-1] for pattern, tensors in input_dict.items()}
            return super().convert(turned, source_patterns, target_patterns, **kwargs)


def with_user_operation():
    rules = merging()
    down = WeightConverter("experts.*.w2.weight", "experts.down_proj", operations=[BackToFront(dim=0)])
    return [rules[0], down]


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_operation_of_a_user_is_run_as_upstream_runs_it(dtype):
    tensors, model = projections(), Experts(dtype)
    made = amc.convert_state_dict(tensors, model, rules=with_user_operation())
    expected = oracles.upstream_values(with_user_operation(), tensors, model, model.state_dict())
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(made[name], tensor.to(torch.float32 if name == "norm" else dtype))
    down = made["layers.0.experts.down_proj"]
    assert_bytes_equal(down[0], tensors["layers.0.experts.2.w2.weight"].to(dtype))


@needs_transformers
def test_an_operation_of_a_user_without_a_model_is_refused():
    with pytest.raises(NameProblems, match=r"BackToFront(.|\n)*only a model knows"):
        amc.convert_state_dict(projections(), rules=with_user_operation())


@needs_transformers
def test_an_operation_of_a_user_under_the_same_name_is_not_skipped():
    model = nn.Module()
    model.a = nn.Parameter(torch.empty(3, 3, device="meta"))
    model.config = None

    class Turn(Transpose):
        pass

    tensors = {"a": address_valued((3, 3), torch.float32)}
    rules = [WeightConverter("a", "a", operations=[Turn(0, 1)])]
    assert_bytes_equal(amc.convert_state_dict(tensors, model, rules=rules)["a"], tensors["a"].t().contiguous())
    for arguments in ({"source_layout": "nemo"}, {"layout": "nemo"}):
        try:
            made = amc.convert_state_dict(tensors, model, rules=rules, **arguments)
        except UnsupportedError:
            continue
        assert_bytes_equal(made["a"], tensors["a"].t().contiguous())


@pytest.fixture
def mixtral(tmp_path):
    """A small model and its checkpoint in the published format."""
    if core is None:
        pytest.skip("transformers is not installed")
    from tests.model_zoo import build_model, write_checkpoint

    model = build_model("mixtral")
    write_checkpoint(model, tmp_path)
    return model, tmp_path


def assert_loads_as_upstream(model, directory, some_fallbacks):
    upstream = type(model).from_pretrained(directory)
    loaded = amc.load_state_dict(directory)
    assert_same(loaded, upstream.state_dict())
    assert (len(loaded.report.fallbacks) > 0) == some_fallbacks
    assert all("experts" in name for name in loaded.report.fallbacks)
    plan = amc.compile_plan(amc.open_checkpoint(directory))
    assert plan.fallbacks == tuple(name for name in plan_names(plan) if name in loaded.report.fallbacks)
    assert ("upstream" in plan.summary().partition("reads")[0]) == some_fallbacks


def plan_names(plan):
    return [target.name for target in plan.targets]


@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm"])
def test_experts_that_do_not_lie_as_the_model_has_them_are_an_error(mixtral, layout):
    mixtral, _ = mixtral
    made = amc.convert_state_dict(mixtral.state_dict(), mixtral, layout=layout)
    with pytest.raises(UnsupportedError, match="source_layout="):
        amc.convert_state_dict(made, mixtral)
    with pytest.raises(UnsupportedError, match=r"(?s)experts.* layout="):
        amc.revert_state_dict(made, mixtral)
    assert_same(amc.convert_state_dict(made, mixtral, source_layout=layout), mixtral.state_dict())


def test_a_patched_convert_is_run_as_upstream_runs_it(mixtral, monkeypatch):
    assert_loads_as_upstream(*mixtral, some_fallbacks=False)
    stock = MergeModulelist.convert

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        made = stock(self, input_dict, source_patterns, target_patterns, **kwargs)
        return {pattern: tensor.flip(0) for pattern, tensor in made.items()}

    monkeypatch.setattr(MergeModulelist, "convert", convert)
    assert_loads_as_upstream(*mixtral, some_fallbacks=True)


def test_a_converter_that_a_user_registered_is_run_as_upstream_runs_it(mixtral, monkeypatch):
    from copy import deepcopy

    from transformers import conversion_mapping as registry

    rules = deepcopy(registry.get_checkpoint_conversion_mapping("mixtral"))
    down = next(rule for rule in rules if "w2" in str(rule.source_patterns))
    mine = WeightConverter(
        list(down._original_source_patterns) if hasattr(down, "_original_source_patterns") else down.source_patterns,
        list(down._original_target_patterns) if hasattr(down, "_original_target_patterns") else down.target_patterns,
        operations=[BackToFront(dim=0)],
    )
    rules[rules.index(down)] = mine
    from tests.model_zoo import isolate_registry

    isolate_registry(monkeypatch)
    registry.register_checkpoint_conversion_mapping("mixtral", rules, overwrite=True)
    assert_loads_as_upstream(*mixtral, some_fallbacks=True)
