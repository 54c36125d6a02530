"""Tests of ``bench`` for files that are not on this machine: what is measured, and what bounds a load."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from safetensors.torch import save_file

from automodel_conv.cli import remote_bench
from automodel_conv.cli.remote_bench import RemoteBench, remote_advice
from automodel_conv.errors import ReadError, UnsupportedError
from automodel_conv.files.source_options import SourceSettings
from tests.cli.support import run, value
from tests.loopback_store import serve

FOUND = RemoteBench(
    files=4,
    tensors=1000,
    nbytes=4 * 10**9,
    open_seconds=0.1,
    plan_seconds=0.02,
    wait_seconds=0.02,
    gb_per_s={1: 0.3, 4: 0.9, 16: 1.0},
    load_bytes=3 * 10**9,
    load_seconds=3.0,
    connections=16,
    retries=0,
)
NBYTES = 4 * (3_000_000 + 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    save_file({"a": torch.ones(3_000_000), "b": torch.ones(7), "empty": torch.ones(0)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("threads", "counts"), [(None, {1, 4, 16}), (2, {1, 2}), (1, {1}), (5, {1, 4, 5}), (20, {1, 4, 16, 20})]
)
def test_ranges_are_read_with_every_number_of_connections(folder, threads, counts):
    with serve(folder) as server:
        result = remote_bench.remote_bench(server.url, SourceSettings(), rules=[], threads=threads, seconds=0.05)
    assert result.gb_per_s.keys() == counts
    assert (result.files, result.tensors, result.nbytes, result.connections) == (1, 3, NBYTES, max(counts))
    assert all(seconds > 0 for seconds in (*result.gb_per_s.values(), result.load_seconds, result.wait_seconds))


def test_load_stops_at_the_bytes_to_time(folder):
    with serve(folder) as server:
        result = remote_bench.remote_bench(server.url, SourceSettings(), rules=[], most_bytes=100, seconds=0.01)
        assert result.load_bytes == 4 * 3_000_000  # at least one target


def test_wait_is_that_of_the_server(folder):
    with serve(folder, latency=0.05) as server:
        result = remote_bench.remote_bench(server.url, SourceSettings(), rules=[], threads=1, seconds=0.01)
    assert 0.05 <= result.wait_seconds < 1


def test_failed_read_is_the_error_of_the_read(folder, tmp_path):
    file = tmp_path / "model.safetensors"
    os.link(folder / "model.safetensors", file)
    with serve(tmp_path) as server:
        checkpoint = remote_bench.open_source(server.url, SourceSettings())
        file.unlink()
        with pytest.raises(ReadError, match="404"):
            remote_bench._rate(checkpoint, cycle(remote_bench._ranges(checkpoint)), 4, 0.1)


def test_checkpoint_without_data_is_refused(tmp_path):
    save_file({"empty": torch.ones(0)}, tmp_path / "model.safetensors")
    with serve(tmp_path) as server, pytest.raises(UnsupportedError, match="nothing to time"):
        remote_bench.remote_bench(server.url, SourceSettings(), rules=[], seconds=0.01)


@pytest.mark.parametrize(
    ("changes", "bound", "words"),
    [
        ({}, "link", ["link", "16 connections", "1.00 GB/s"]),
        ({"gb_per_s": {1: 0.1, 4: 0.4, 16: 1.0}}, "latency", ["20 ms", "--threads 32"]),
        ({"gb_per_s": {1: 0.1, 4: 0.4, 16: 0.3}}, "latency", ["--threads 32"]),  # the load reads faster
        ({"load_seconds": 6.0}, "machine", ["reads 1.00 GB/s", "places 500.00 MB/s"]),
        ({"gb_per_s": {1: 1.0}, "connections": 1}, "link", ["link"]),
        ({"gb_per_s": {1: 1.5, 4: 1.2, 16: 1.1}}, "machine", ["reads 1.50"]),
    ],
)
def test_bound_follows_from_the_rates(changes, bound, words):
    result = replace(FOUND, **changes)
    assert result.bound == bound
    assert all(word in remote_advice(result) for word in words)


def test_command_prints_the_measurements(folder, monkeypatch):
    monkeypatch.setattr(remote_bench, "SECONDS", 0.01)
    with serve(folder, authorization="Bearer x") as server:
        header = 'headers={"Authorization": "Bearer x"}'
        arguments = "bench", server.url, "--no-model", "--storage-option", header, "--threads", "4"
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert value(result.stdout, "files, tensors") == "1, 3"
        assert value(result.stdout, "bytes that a load reads") == "12.0 MB"
        assert result.stdout.splitlines()[-1].startswith(("This machine: ", "Latency: ", "The link, "))
        assert "--cold" in run(*arguments, "--cold").stderr
