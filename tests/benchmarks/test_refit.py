"""Tests of benchmarks.refit: all ways move the same weights between real ranks, and wrong bytes give no figure."""

import json
import subprocess
import sys

import pytest
import torch

from automodel_conv.testing import POISON, assert_bytes_equal
from automodel_conv.upstream.registry import transformers_available
from benchmarks import measure, refit, refit_engine, refit_worker, shapes

pytestmark = pytest.mark.skipif(not transformers_available(), reason="benchmarks build transformers models")
FILLING = [name for name, move in refit_worker.METHODS.items() if move.fills]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("refit")
    for name in ("big", "small"):
        shapes.write_checkpoint(shapes.SMALL, str(directory / name))
    return directory


def loaded(directory, rank, ranks=2):
    engine = refit_engine.Engine(shapes.SMALL, rank, ranks)
    for parameter in engine.parameters():
        parameter.data.view(torch.uint8).fill_(POISON)
    engine.load_weights(refit_engine.tensors_in(str(directory / "big")))
    return engine


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_loader_fills_the_parameters_of_a_rank_with_those_of_transformers(directory, rank, ranks):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(directory / "big", dtype=torch.bfloat16).state_dict()
    engine = loaded(directory, rank, ranks)
    own = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    for name, parameter in engine.named_parameters():
        path = name.rpartition(".")[0]
        if name.endswith("w13_weight"):
            expected = whole[f"{path}.gate_up_proj"][own]
        elif name.endswith("w2_weight"):
            expected = whole[f"{path}.down_proj"][own]
        elif name.endswith("qkv_proj.weight"):
            expected = torch.cat([whole[name.replace("qkv_proj", f"{part}_proj")] for part in "qkv"])
        else:
            expected = whole[name]
        assert_bytes_equal(parameter.data, expected)


def test_engine_has_the_bytes_of_the_checkpoint_with_the_sign_that_is_asked_for(directory):
    engine, path = loaded(directory, 1), str(directory / "big")
    assert refit_engine.wrong(engine, path, flipped=False) == []
    assert len(refit_engine.wrong(engine, path, flipped=True)) == 2 * (2 * 3 + 9) + 3
    for parameter in engine.parameters():
        parameter.data.view(torch.int16).bitwise_xor_(torch.iinfo(torch.int16).min)
    assert refit_engine.wrong(engine, path, flipped=True) == []


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.1.mlp.experts.w13_weight", "model.layers.1.mlp.experts.3.up_proj.weight"),
        ("model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.self_attn.v_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_changed_bit_is_named(directory, name, tensor):
    engine = loaded(directory, 1)
    parameter = dict(engine.named_parameters())[name]
    parameter.data.view(-1).view(torch.int16)[-1] ^= 1
    assert refit_engine.wrong(engine, str(directory / "big"), flipped=False) == [tensor]


def test_parameter_that_the_checkpoint_does_not_fill_is_noticed(directory):
    engine = loaded(directory, 0)
    engine.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match="does not fill all of the engine"):
        refit_engine.wrong(engine, str(directory / "big"), flipped=False)


ALL_METHODS = """
import json, sys
from benchmarks import refit_worker, shapes, sharded

def job():
    small = shapes.SMALL
    refit_worker.METHODS |= {"nothing": refit_worker.Move(lambda side: lambda: None)}
    return {m: refit_worker.work(m, small, small, sys.argv[1], 40_000, 2) for m in refit_worker.METHODS}

print(json.dumps(sharded.divided(job, refit_worker.RANKS)))
"""


def test_every_method_fills_the_engine_and_counts_what_it_sends(directory):
    done = subprocess.run(
        [sys.executable, "-c", ALL_METHODS, str(directory)], cwd=measure.REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ranks = json.loads(done.stdout.splitlines()[-1])
    whole = sum(p.nbytes for p in shapes.meta_model(shapes.SMALL).state_dict().values())
    experts = 2 * 3 * 4 * 64 * 48 * 2
    engine = whole - experts // 2
    assert all(
        name in rank["nothing"]["wrong"] for rank in ranks[2:] for name in ("lm_head.weight", "model.norm.weight")
    )
    for method in refit_worker.METHODS:
        results = [rank[method] for rank in ranks]
        assert [rank["wrong"] for rank in results] == [[]] * 4
        assert [rank["owned_bytes"] for rank in results] == [whole // 2, whole // 2, engine, engine]
        assert all(len(rank["seconds"]) == 2 and min(rank["seconds"]) > 0 for rank in results)
        first, second, *receivers = (rank["sent_bytes"][1] for rank in results)
        if method in ("ours", "plain send"):
            assert first + second >= 2 * engine
        elif method == "gather alone":
            assert first + second >= whole
            assert max(first, second) < whole
        else:  # half of the model to the other rank of the trainer; the first one also broadcasts
            assert first - second >= 2 * whole
            assert second >= whole // 2
        assert max(receivers) < whole // 4
        reported = [rank["reported_bytes"] for rank in results]
        if method == "ours":
            assert [sum(sent) for sent in zip(*reported, strict=True)] == [2 * engine] * 2
        else:
            assert reported == [[]] * 4


def test_engine_without_the_weights_gives_no_result():
    right, wrong = {"ranks": [{"wrong": []}] * 4}, {"ranks": [*[{"wrong": []}] * 3, {"wrong": ["model.norm.weight"]}]}
    refit.check({"ours": [right, right]})
    with pytest.raises(RuntimeError, match=r"ours: the engine does not have the bytes of model\.norm\.weight"):
        refit.check({"plain send": [right], "ours": [right, wrong]})


def run_of(seconds, sent=7):
    ranks = [
        {"seconds": [9.0, seconds], "cpu_seconds": [1.0, 1.0], "sent_bytes": [0, sent * 10**6], "anonymous_bytes": n}
        for n in (1e6, 2e6, 3e6, 4e6)
    ]
    return {"ranks": ranks}


def test_rows_compare_later_calls_of_the_slowest_rank():
    runs = {"plain send": [run_of(1.0)], FILLING[0]: [run_of(6.0)], "ours": [run_of(2.0)]}
    rows = refit._rows({"runs": runs})
    assert rows["ours"] == {
        "seconds": "2.00 (2.00-2.00)",
        "first call": "9.00",
        "ours is": "1.00x",
        "of the roof": "0.50",
        "s of CPU": "4.00",
        "sent by all MB": "28",
        "sent by one MB": "7",
        "trainer MB": "2",
        "engine MB": "4",
    }
    assert rows[FILLING[0]]["ours is"] == "3.00x"
    assert rows["plain send"]["ours is"] == ""


@pytest.mark.long
def test_refit_runs_its_workers_and_prints_a_table_now_and_later(tmp_path, capsys):
    file = tmp_path / "result.json"
    methods = [word for name in ("plain send", "ours") for word in ("--method", name)]
    refit.main(["--smoke", "--repetitions", "1", *methods, "--json", str(file), "--directory", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "of the roof" in shown
    result = json.loads(file.read_text())
    assert set(result["runs"]) == {"plain send", "ours"}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    refit.main(["--table", str(file)])
    assert capsys.readouterr().out == shown
    refit.main(["--from", str(file)])
    assert capsys.readouterr().out == refit.markdown(result)
    assert "\n| **ours** | " in refit.markdown(result)
