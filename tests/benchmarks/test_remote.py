"""Tests of benchmarks.remote: every method ends with the bytes of the files, and wrong bytes give no figure."""

import json
import os
import subprocess
import sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

from automodel_conv.testing import assert_bytes_equal
from automodel_conv.upstream.registry import transformers_available
from benchmarks import measure, remote, remote_methods, remote_server, remote_worker, shapes

pytestmark = pytest.mark.skipif(not transformers_available(), reason="benchmarks build transformers models")
INSTALLED = [
    name for name in remote_methods.METHODS if not name.startswith(("hf_transfer", "Run:ai", "obstore", "ours, s3"))
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    for name in ("big", "small"):
        shapes.write_checkpoint(shapes.SMALL, str(root / "served" / name))
    return root


@pytest.fixture(scope="module")
def urls(root):
    with remote_server.serve_elsewhere(str(root / "served"), 0, 0) as urls:
        yield urls


def run_here(what, urls, root):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.remote", "--worker", what, json.dumps([urls, str(root), "as-found"])],
        cwd=measure.REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, **remote_worker.variables(urls, False, "")},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_servers_serve_the_same_file_by_range_and_count_it(root, urls):
    expected = (root / "served" / "small" / "config.json").read_bytes()
    before = remote_server.counts(urls["counts"])
    for url in (
        f"{urls['files']}/small/config.json",
        f"{urls['hub']}/{remote_server.OWNER}/small/resolve/main/config.json",
    ):
        with urlopen(Request(url, headers={"Range": "bytes=5-9"})) as answer:
            assert answer.status == 206
            assert answer.read() == expected[5:10]
    after = remote_server.counts(urls["counts"])
    assert {name: after[name] - before[name] for name in after} == {"requests": 2, "sent": 10, "connections": 2}


def test_hub_refuses_what_it_does_not_have(urls):
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{urls['hub']}/{remote_server.OWNER}/small/resolve/main/none.json")


@pytest.mark.parametrize("method", ["ours", "ours, transposed"])
def test_ours_ends_with_the_bytes_of_transformers(root, urls, method):
    result = run_here(method, urls, root)
    expected = remote_worker.expected_digests(str(root / "served" / "big"))
    assert result["digest"] == expected[remote_methods.METHODS[method].ends_with]
    assert result["sent"] >= measure.file_bytes(str(root / "served" / "big"))
    assert result["requests"] >= 3
    assert result["written_bytes"] == 0


@pytest.mark.parametrize("name", ["bare ranged reads, memory touched before", "bare ranged reads, new memory"])
def test_roof_reads_whole_files_in_ranges(root, urls, name, monkeypatch, tmp_path):
    monkeypatch.setattr(remote_methods, "RANGE_BYTES", 1000)
    directory = root / "served" / "big"
    place = remote_methods.Place(urls, "big", str(directory), str(tmp_path))
    read = remote_methods.METHODS[name].prepare(place)()
    files = sorted(directory.glob("*.safetensors"))
    assert list(read) == [path.name for path in files]
    for path in files:
        assert_bytes_equal(read[path.name], torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8))


@pytest.mark.long
@pytest.mark.parametrize("method", INSTALLED)
def test_every_method_that_is_installed_ends_with_the_bytes_of_the_files(root, urls, method):
    expected = remote_worker.expected_digests(str(root / "served" / "big"))
    result = run_here(method, urls, root)
    assert result["digest"] == expected[remote_methods.METHODS[method].ends_with]
    weights = sum(path.stat().st_size for path in (root / "served" / "big").glob("*.safetensors"))
    assert (result["written_bytes"] >= weights) == method.startswith("snapshot")  # hf:// keeps the index


def test_digests_tell_the_ways_to_end_apart(root):
    digests = remote_worker.expected_digests(str(root / "served" / "big"))
    assert len(set(digests.values())) == len(digests) == 4


def test_ranks_own_a_quarter_of_the_experts_and_all_else(root, urls):
    ranks = run_here("ranks", urls, root)["ranks"]
    whole = sum(p.nbytes for p in shapes.meta_model(shapes.SMALL).state_dict().values())
    experts = 2 * 3 * 4 * 64 * 48 * 2
    assert [rank["owned_bytes"] for rank in ranks] == [whole - experts // 4 * 3] * 4
    assert all(rank["sent"] >= rank["owned_bytes"] for rank in ranks)


def test_first_tensor_is_in_place_before_the_load_ends(root, urls):
    assert run_here("first", urls, root)["seconds"] > 0


def test_other_bytes_give_no_result():
    digests = {"grouped": "a", "files": "b"}
    remote.check({"ours": [{"digest": "a"}], "fsspec cat_ranges": [{"digest": "b"}]}, digests)
    with pytest.raises(RuntimeError, match="ours: the tensors are not those of the files"):
        remote.check({"ours": [{"digest": "a"}, {"digest": "b"}]}, digests)


def run_of(seconds, beyond=0):
    counted = {"requests": 7, "sent": 3 * 10**9, "connections": 16, "written_bytes": 0}
    return {"seconds": seconds, "cpu_seconds": 0.5, "beyond_bytes": beyond, **counted}


def test_rows_compare_with_ours_and_the_roof():
    runs = {
        "bare ranged reads, new memory": [run_of(2.0)],
        "fsspec cat_ranges": [run_of(6.0), run_of(9.0), run_of(7.0)],
        "ours": [run_of(2.5, 3e6), run_of(2.5, 64e6)],
    }
    rows = remote._rows({"runs": runs, "file_bytes": 5e9})
    assert rows["ours"] == {
        "seconds": "2.50 (2.50-2.50)",
        "GB/s": "2.00",
        "ours is": "1.00x",
        "of the roof": "0.80",
        "s of CPU": "0.50",
        "requests": "7",
        "sent MB": "3000",
        "connections": "16",
        "memory MB": "64",
        "on disk MB": "0",
    }
    assert rows["fsspec cat_ranges"]["ours is"] == "2.80x"


def test_sentence_has_the_worst_rank_and_the_round_trips():
    text = remote.ranks_text(
        {
            "ranks": [{"sent": 100, "owned_bytes": 100}, {"sent": 103, "owned_bytes": 100}],
            "first_latency": 0.5,
            "first_seconds": [1.6, 1.5, 9.0],
        }
    )
    assert "at most 1.0300 of the bytes" in text
    assert "after 1.60 s, 3.2 round trips" in text


@pytest.mark.long
def test_remote_runs_its_workers_and_prints_a_table_now_and_later(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remote.overlay, "install", lambda pins, folder: folder)
    file = tmp_path / "result.json"
    methods = [word for name in ("bare ranged reads, new memory", "ours") for word in ("--method", name)]
    remote.main(["--smoke", "--repetitions", "1", *methods, "--json", str(file), "--directory", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "of the roof" in shown
    assert "round trips" in shown
    result = json.loads(file.read_text())
    assert set(result["runs"]) == {"bare ranged reads, new memory", "ours"}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    remote.main(["--table", str(file)])
    assert capsys.readouterr().out == shown
    remote.main(["--from", str(file)])
    assert capsys.readouterr().out == remote.markdown(result)
    assert "\n| **ours** | " in remote.markdown(result)
