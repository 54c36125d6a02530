"""Tests of ``bench``: the measurements add up, and the advice follows from them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import automodel_conv as amc
from automodel_conv.cli import bench
from automodel_conv.cli.app import app
from automodel_conv.cli.bench import Bench, advice
from automodel_conv.execution.page_policy import PageUse
from automodel_conv.files import system

FOUND = Bench(
    files=4,
    tensors=1000,
    nbytes=4 * 10**9,
    sample_nbytes=2 * 10**9,
    sample_targets=12,
    scratch_nbytes=0,
    open_seconds=0.01,
    plan_seconds=0.02,
    cached=1.0,
    first_seconds=0.4,
    roof_seconds={1: 0.6, 2: 0.4},
    roof_has_huge_pages=True,
    default_threads=2,
    load_seconds={1: 0.7, 2: 0.42},
    pages=PageUse(2 * 10**9, 0, 7.0, 2.0),
    touch_gb_per_s=12.0,
    touch_small_gb_per_s=4.0,
    huge_pages="madvise",
    memory_bytes=64 * 10**9,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    save_file({"a": torch.ones(700_000), "empty": torch.ones(0)}, directory / "first.safetensors")
    save_file({"b": torch.ones(300, 300), "c": torch.ones(7)}, directory / "second.safetensors")
    index = '{"weight_map": {"a": "first.safetensors", "empty": "first.safetensors",'
    index += ' "b": "second.safetensors", "c": "second.safetensors"}}'
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def test_all_bytes_are_timed_with_every_number_of_threads(plain):
    result = bench.bench(plain, rules=[], most_threads=4)
    assert (result.files, result.tensors) == (2, 4)
    assert result.nbytes == result.sample_nbytes == 4 * (700_000 + 300 * 300 + 7)
    assert result.scratch_nbytes == 0
    assert {1, 2, 4, result.default_threads} == result.roof_seconds.keys() == result.load_seconds.keys()
    assert all(seconds > 0 for seconds in (*result.roof_seconds.values(), *result.load_seconds.values()))
    assert result.load_seconds[result.threads] == min(result.load_seconds.values())


def test_cast_bytes_are_counted_separately(plain):
    result = bench.bench(plain, rules=[], dtype=torch.bfloat16, most_threads=1)
    assert result.scratch_nbytes == result.sample_nbytes


def test_most_bytes_limits_the_sample_to_at_least_one_target(plain):
    few = bench.bench(plain, rules=[], most_bytes=1, most_threads=1)
    assert few.sample_targets == 1
    assert 0 < few.sample_nbytes < few.nbytes
    sampled = bench.bench(plain, rules=[], most_bytes=400_000, most_threads=1)
    assert sampled.sample_nbytes < sampled.nbytes


def test_first_read_is_of_uncached_files(plain, monkeypatch):
    order = []
    for name in ("sync", "drop_cache", "is_cached", "preadv"):
        real = getattr(system, name)

        def watched(*arguments, name=name, real=real):
            order.append((name, arguments[0]))
            return real(*arguments)

        monkeypatch.setattr(system, name, watched)
    bench.bench(plain, rules=[], most_threads=1, drop_cache=True)
    names = [name for name, _ in order]
    assert [name for name in names if name in ("sync", "drop_cache")] == ["sync", "drop_cache"] * 2
    data_reads = names[len(names) - 1 - names[::-1].index("drop_cache") :]
    assert data_reads.index("is_cached") < data_reads.index("preadv")


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system does not report cached pages")
def test_files_that_were_read_are_reported_as_cached(plain):
    (plain / "first.safetensors").read_bytes()
    with system.open_readonly(str(plain / "first.safetensors")) as file:
        assert system.is_cached(file.fileno(), 100) in (True, None)


def test_cache_state_is_unknown_without_system_support(plain, monkeypatch):
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert bench.bench(plain, rules=[], most_threads=1, drop_cache=True).cached is None


def test_a_checkpoint_without_bytes_is_refused(tmp_path):
    save_file({"empty": torch.ones(0)}, tmp_path / "model.safetensors")
    with pytest.raises(amc.UnsupportedError, match="nothing to time"):
        bench.bench(tmp_path, rules=[])


def test_descriptors_are_closed(plain):
    before = os.listdir("/proc/self/fd")
    bench.bench(plain, rules=[], most_threads=2, drop_cache=True)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({}, ["The read itself"]),
        ({"cached": 0.1, "first_seconds": 2.0}, ["The disk: it reads 1.00 GB/s; the page cache reads 5.00 GB/s."]),
        ({"cached": 0.1, "first_seconds": 2.0, "memory_bytes": 10**9}, ["The disk", "too large to stay there"]),
        ({"cached": 1.0, "first_seconds": 2.0}, ["The read itself"]),
        ({"huge_pages": "never"}, ["Huge pages are off", "echo madvise"]),
        ({"load_seconds": {1: 0.42, 2: 0.6}}, ["Load with 1."]),
        ({"load_seconds": {1: 2.0, 2: 1.6}, "scratch_nbytes": 10**9}, ["Copies: 50% of the bytes"]),
        ({"plan_seconds": 0.5}, ["Names: opening and planning take 0.51 s for 1000 tensors."]),
    ],
)
def test_advice_follows_from_the_measurements(change, texts):
    result = advice(replace(FOUND, **change))
    assert len(result) == 1
    for text in texts:
        assert text in result[0]


def test_the_command_prints_rates_and_advice(plain):
    result = CliRunner().invoke(app, ["bench", str(plain), "--no-model", "--most", "1MB", "--threads", "2", "--cold"])
    assert result.exit_code == 0, result.output
    for text in ("bytes timed", "of the roof", "huge pages"):
        assert text in result.output
    assert result.output.rstrip().endswith(".")
