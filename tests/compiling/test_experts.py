"""Tests of the number of experts, by the config, the module or the router, and of tensors that lack some of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_conv.compiling.experts import refuse_missing_experts
from automodel_conv.errors import CoverageError

ROUTERS = ["gate.weight", "router.weight", "router.gate.weight", "gate.wg.weight"]
GROUPED = {
    "gate_up_proj": (4, 6, 5),
    "down_proj": (4, 5, 3),
    "gate_and_up_projs": (4, 5, 6),
    "w13_weight": (4, 6, 5),
    "gate_up_proj_bias": (4, 6),
    "gate_up_proj_scale_inv": (4, 1, 1),
}


def zoo(name):
    model_zoo = pytest.importorskip("tests.model_zoo", reason="the models are those of transformers")
    if name not in model_zoo.zoo_names():
        pytest.skip(f"this transformers has no {name}")
    model = model_zoo.build_model(name)
    return model, {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def halved(shapes):
    return {k: (s[0] // 2, *s[1:]) if k.rpartition(".")[0].endswith("experts") else s for k, s in shapes.items()}


# One model for each way in which a config gives the number. LongCat's router and Inkling's have rows for more experts
# than there are, gpt_oss has biases, and Dots' vision tower has another number in each layer.
@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "deepseek_v3", "ernie4_5_moe", "longcat_flash", "inkling_mm_model", "gpt_oss", "Dots3NoteTextModel"],
)
def test_all_experts_of_a_model_are_enough_and_half_of_them_are_not(name):
    model, shapes = zoo(name)
    refuse_missing_experts(shapes, model)
    refuse_missing_experts(shapes, None)
    with pytest.raises(CoverageError, match=r"12 experts, as \w+Config\.\w+ says\n.*found: +[68] experts"):
        refuse_missing_experts(halved(shapes), model)


def test_every_tensor_that_lacks_experts_is_named():
    model, shapes = zoo("mixtral")
    with pytest.raises(CoverageError) as caught:
        refuse_missing_experts(halved(shapes), model)
    for name in shapes:
        assert (name in str(caught.value)) == (".experts." in name)


@pytest.mark.parametrize("leaf", GROUPED)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("share", [0, 1, 2, 4], ids=lambda share: f"{share} of 4")
def test_without_a_model_the_router_gives_the_number_of_experts(leaf, router, share):
    shapes = {f"a.{router}": (4, 5), f"a.experts.{leaf}": (share, *GROUPED[leaf][1:])}
    if share == 4:
        refuse_missing_experts(shapes, None)
        return
    with pytest.raises(CoverageError, match=rf"a\.experts\.{leaf} does not hold all experts") as caught:
        refuse_missing_experts(shapes, None)
    assert f"4 experts, as a.{router} says" in str(caught.value)
    assert f"found:    {share} experts" in str(caught.value)


@pytest.mark.parametrize(("rows", "share"), [(60, 8), (60, 4), (5, 3), (5, 2), (3, 2), (1, 0), (256, 128)])
def test_share_that_does_not_divide_the_router_rows_is_refused(rows, share):
    shapes = {"a.gate.weight": (rows, 5), "a.experts.gate_up_proj": (share, 6, 5)}
    with pytest.raises(CoverageError, match=f"{rows} experts, as a.gate.weight says\n.*found: +{share} experts"):
        refuse_missing_experts(shapes, None)


@pytest.mark.parametrize(
    "shapes",
    [
        {"a.gate.weight": (768, 5), "a.experts.gate_up_proj": (512, 6, 5)},  # LongCat has more that compute nothing
        {"a.gate.weight": (258, 5), "a.experts.gate_up_proj": (256, 6, 5)},  # two more are shared
        {"a.gate.weight": (4, 5), "a.shared_experts.gate_up_proj": (2, 6, 5)},
        {"a.gate.weight": (4, 5), "b.experts.gate_up_proj": (2, 6, 5)},
        {"a.gate.weight": (1, 5), "a.experts.gate_up_proj": (1, 6, 5)},
        {"a.experts.gate_up_proj": (2, 6, 5)},
        {"a.gate.weight": (), "a.experts.gate_up_proj": (2, 6, 5)},
    ],
)
def test_unrelated_shapes_refuse_nothing(shapes):
    refuse_missing_experts(shapes, None)


class Grouped(nn.Module):
    def __init__(self, held: int):
        super().__init__()
        self.num_experts = 4
        self.weight = nn.Parameter(torch.zeros(held, 3, 2))


class Listed(nn.Module):
    def __init__(self, held: int):
        super().__init__()
        self.num_experts = 4
        self.router = nn.Linear(2, 4)
        self.experts = nn.ModuleList(nn.Linear(2, 3) for _ in range(held))
        self.config = type("Config", (), {"num_experts": 4})()


@pytest.mark.parametrize("kind", [Grouped, Listed])
def test_modules_give_their_number_of_experts(kind):
    for held in (4, 5):
        refuse_missing_experts({name: t.shape for name, t in kind(held).state_dict().items()}, kind(held))
    short = kind(3)
    error = r"expected: 4 experts, as (Config\.)?num_experts says\n.*found: +3 experts"
    with pytest.raises(CoverageError, match=error):
        refuse_missing_experts({name: tensor.shape for name, tensor in short.state_dict().items()}, short)
