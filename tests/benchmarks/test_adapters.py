"""Tests of benchmarks.adapters: merges by PEFT and by this package are timed, and compared element by element."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

from automodel_conv.upstream.registry import transformers_available
from benchmarks import adapters, measure, memory
from benchmarks.saving import TINY_SHARD, Setting

pytestmark = pytest.mark.skipif(not transformers_available(), reason="benchmarks build transformers models")
SMOKE = ["--smoke", "--repetitions", "1", "--threads", "1", "--memory", "ready"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    adapters.write_files(adapters.SMALL, str(root), rank=4)
    big = Setting(str(root / "big"), 2, TINY_SHARD)
    adapters.merge_with_ours_verified(big)(big.files(adapters.MERGED))
    return root, big


def tensors_in(directory):
    return {name: tensor for file in Path(directory).glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_all_methods_merge_alike(files):
    root, big = files
    adapters.check_merge(big)
    for name, method in adapters.METHODS.items():
        result = adapters.work(name, str(root), 2, TINY_SHARD, memory.READY, 0)
        assert result["seconds"] > 0
        assert (result["anonymous_bytes"] is None) == ("cp" in name)
        if method.merges:
            assert result["wrong"] == []
            assert (result["differing"] > 0) == ("PEFT" in name)
            assert result["differing"] < result["elements"] / 2
        adapters.check({memory.READY: {name: [result]}})
    assert {path.name for path in root.iterdir()} == {"big", "tiny"}


def test_merge_that_changes_no_expert_is_detected(files):
    _, big = files
    base = Setting(big.directory, 1, TINY_SHARD)
    found = adapters.compared(base.files(adapters.BASE), big)
    adapted = {name for name in found.wrong if name.endswith("_proj.weight")}
    assert len(adapted) == len(found.wrong) == 2 * (4 * 3 + 4)
    with pytest.raises(RuntimeError, match="PEFT does not merge as we did"):
        adapters.check({memory.READY: {"PEFT": [found._asdict()]}})


def test_merge_without_a_tensor_or_with_another_dtype_is_detected(files, tmp_path):
    _, big = files
    merged = tensors_in(big.files(adapters.MERGED))
    other = {name: tensor for name, tensor in merged.items() if name != "lm_head.weight"}
    other["model.norm.weight"] = other["model.norm.weight"].to(torch.float16)
    save_file(other, tmp_path / "model.safetensors")
    assert adapters.compared(str(tmp_path), big).wrong == ["lm_head.weight", "model.norm.weight"]


@pytest.mark.parametrize("what", ["an adapted tensor unchanged", "another tensor changed"])
def test_merge_of_other_tensors_than_the_adapters_is_refused(files, tmp_path, what):
    _, big = files
    for part in (adapters.BASE, adapters.ADAPTER):
        (tmp_path / part).symlink_to(big.files(part))
    merged, base = (tensors_in(big.files(part)) for part in (adapters.MERGED, adapters.BASE))
    if what == "another tensor changed":
        name = "model.norm.weight"
        merged[name] = merged[name] + 1
    else:
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        merged[name] = base[name]
    (tmp_path / adapters.MERGED).mkdir()
    save_file(merged, tmp_path / adapters.MERGED / "model.safetensors")
    with pytest.raises(RuntimeError, match=name):
        adapters.check_merge(Setting(str(tmp_path), 1, TINY_SHARD))


def test_bytes_of_ours_that_differ_give_no_result():
    same = {"elements": 9, "differing": 1, "wrong": []}
    adapters.check({memory.READY: {"PEFT": [same]}})
    with pytest.raises(RuntimeError, match="ours, verified does not merge as we did: 1 elements differ"):
        adapters.check({memory.READY: {"ours, verified": [same]}})


@pytest.mark.long
def test_adapters_runs_its_workers_and_prints_a_table_now_and_later(tmp_path, capsys):
    file = tmp_path / "result.json"
    methods = ["--method", "cp, fsync", "--method", "PEFT", "--method", "ours"]
    adapters.main([*SMOKE, *methods, "--json", str(file), "--directory", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "rounded otherwise" in shown
    result = json.loads(file.read_text())
    assert set(result["runs"]["ready"]) == {"cp, fsync", "PEFT", "ours"}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    adapters.main(["--table", str(file)])
    assert capsys.readouterr().out == shown
    adapters.main(["--from", str(file)])
    assert capsys.readouterr().out == adapters.markdown(result)
    assert "\n| **ours** | " in adapters.markdown(result)


def test_worker_that_differs_gives_no_result(tmp_path, capsys, monkeypatch):
    wrong = {"elements": 9, "differing": 9, "wrong": ["a"], "seconds": 1.0}
    monkeypatch.setattr(measure, "run_interleaved", lambda commands, *_: {m: [wrong] for m in commands})
    with pytest.raises(RuntimeError, match="does not merge as we did"):
        adapters.main([*SMOKE, "--method", "PEFT", "--directory", str(tmp_path)])
    assert capsys.readouterr().out == ""
