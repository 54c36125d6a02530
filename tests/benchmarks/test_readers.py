"""Tests of benchmarks.readers: readers return the bytes of the files, and wrong bytes give no figure."""

import json

import pytest
import torch

from automodel_conv.testing import assert_bytes_equal
from automodel_conv.upstream.registry import transformers_available
from benchmarks import measure, readers, shapes

pytestmark = pytest.mark.skipif(not transformers_available(), reason="benchmarks build transformers models")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("readers")
    shapes.write_checkpoint(shapes.SMALL, str(directory))
    return directory


@pytest.mark.parametrize("method", ["preadv", "O_DIRECT, 2 threads", "O_DIRECT, 16 threads"])
@pytest.mark.parametrize("run_bytes", [4096, 8 << 20])
def test_reader_returns_the_bytes_of_each_file(directory, method, run_bytes, monkeypatch):
    monkeypatch.setattr(readers, "_DIRECT_BYTES", run_bytes)
    read = readers.READERS[method].prepare(str(directory))()
    files = sorted(directory.glob("*.safetensors"))
    assert list(read) == [path.name for path in files]
    for path in files:
        assert_bytes_equal(read[path.name], torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8))


def run_of(seconds, **more):
    return {"seconds": seconds, "cpu_seconds": 0.5, "anonymous_bytes": 10**9, "disk_bytes": 2 * 10**9, **more}


def test_rows_compare_with_ours():
    runs = {"preadv": [run_of(1.0)], "ours": [run_of(2.0), run_of(2.0)]}
    assert readers._rows({"runs": runs, "file_bytes": 2e9})["preadv"] == {
        "seconds": "1.00 (1.00-1.00)",
        "GB/s": "2.00",
        "ours is": "0.50x",
        "s of CPU": "0.50",
        "memory of the files": "0.50x",
        "read from the disk": "1.00x",
    }


def test_other_bytes_give_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(readers.overlay, "install", lambda pins, folder: folder)
    wrong = {"ours": [run_of(1.0, digest="0")]}
    monkeypatch.setattr(readers.measure, "run_interleaved", lambda *arguments: wrong)
    with pytest.raises(RuntimeError, match="ours: the bytes are not those of the files"):
        readers.run(shapes.SMALL, ["ours"], 1, str(tmp_path))


@pytest.mark.long
def test_readers_run_their_workers_and_print_a_table_now_and_later(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(readers.overlay, "install", lambda pins, folder: folder)
    file = tmp_path / "result.json"
    methods = [word for name in ("preadv", "ours") for word in ("--method", name)]
    readers.main(["--smoke", "--repetitions", "1", *methods, "--json", str(file), "--directory", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "GB/s" in shown
    result = measure.read_json(str(file))
    assert set(result["runs"]) == set(json.loads(file.read_text())["runs"]) == {"preadv", "ours"}
    readers.main(["--table", str(file)])
    assert capsys.readouterr().out == shown
    readers.main(["--from", str(file)])
    assert capsys.readouterr().out == readers.markdown(result)
