"""Tests of the default number of threads and of pinned memory: the ranks of a node share them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automodel_conv.execution import cores, filling
from automodel_conv.execution import host as cpu
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.cores import default_reader_threads, rank_on_this_node, ranks_on_this_node, share_of_cores
from automodel_conv.execution.device import ring_of
from automodel_conv.execution.filling import Limits, limits_in_budget
from automodel_conv.execution.host import load_to_host
from tests.execution.simulated import SimulatedDevice
from tests.execution.support import TRANSPOSE, moe


@pytest.fixture
def node(monkeypatch):
    """Simulate a machine with a number of cores, of which a process may use some, and a number of ranks."""

    def simulate(machine, usable, ranks):
        monkeypatch.setattr(os, "cpu_count", lambda: machine)
        monkeypatch.setattr(cores, "cores", lambda: usable)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))

    return simulate


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("1", 1), ("8", 8), ("08", 8), ("72", 72),
        ("0", 1), ("-8", 1), ("", 1), ("8.0", 1), ("eight", 1), (" 8", 1),
        ("8\n", 1), ("1e3", 1), ("9" * 5000, 1), ("٨", 1),
    ],
)  # fmt: skip
def test_number_of_ranks_is_read_from_the_launcher(monkeypatch, text, ranks):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    assert ranks_on_this_node() == ranks


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks_on_this_node() == 1


@pytest.mark.parametrize(
    ("usable", "machine", "ranks", "share"),
    [
        (16, 16, 1, 16),  # one rank
        (4, 16, 1, 4),  # one rank in a container
        (16, 16, 8, 2),  # all ranks on all cores
        (2, 16, 8, 2),  # each rank pinned to its own
        (1, 16, 8, 1),  # pinned to less
        (3, 16, 8, 1),  # more than an equal share, so ranks are not pinned apart
        (64, 128, 8, 8),  # a container of half a machine
        (2, 2, 8, 1),  # more ranks than cores
        (1, 1, 1, 1),
    ],
)
def test_cores_are_shared_unless_the_launcher_shared_them(usable, machine, ranks, share):
    assert share_of_cores(usable, machine, ranks) == share


@given(st.integers(1, 512), st.integers(1, 512), st.integers(1, 64))
def test_share_is_between_one_core_and_all(usable, machine, ranks):
    share = share_of_cores(min(usable, machine), machine, ranks)
    assert 1 <= share <= min(usable, machine)
    assert share * ranks <= machine or share == 1


def test_eight_ranks_run_no_more_threads_than_cores(node):
    node(16, 16, 8)
    assert default_reader_threads(8) == 2
    assert cpu.default_threads() == 2
    node(16, 16, 1)
    assert (default_reader_threads(8), cpu.default_threads()) == (8, 16)
    node(4, 4, 8)
    assert default_reader_threads(8) == 1


@pytest.mark.parametrize(("given_threads", "wanted"), [(None, 2), (5, 5)])
def test_loads_use_their_share_by_default(tmp_path, node, monkeypatch, given_threads, wanted):
    node(16, 16, 8)
    _, checkpoint, plan = moe(tmp_path, TRANSPOSE)
    seen, stock = [], cpu.schedule

    def noting(*arguments, threads, slot_bytes):
        seen.append(threads)
        return stock(*arguments, threads=threads, slot_bytes=slot_bytes)

    monkeypatch.setattr(cpu, "schedule", noting)
    monkeypatch.setattr(cpu, "_BYTES_PER_THREAD", 1)
    load_to_host(plan, checkpoint, allocate(plan.targets), threads=given_threads)
    assert seen == [wanted]


def test_few_bytes_are_loaded_by_few_threads(node):
    node(16, 16, 1)
    sizes = (0, 1, (16 << 20) - 1, 16 << 20, 100 << 20, 1 << 40)
    assert [cpu.default_threads(nbytes) for nbytes in sizes] == [1, 1, 1, 2, 12, 16]
    node(4, 4, 1)
    assert cpu.default_threads(100 << 20) == 4


@pytest.mark.parametrize(("text", "ranks", "rank"), [("3", 8, 3), ("8", 8, 0), ("-1", 8, 0), ("", 8, 0), ("1", 1, 0)])
def test_rank_is_read_from_the_launcher_if_possible(monkeypatch, text, ranks, rank):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", text)
    assert rank_on_this_node() == rank


def test_ring_has_whole_slots_for_the_threads_of_its_rank(node):
    node(16, 16, 8)
    assert ring_of(None, None) == (2, 8 << 20)
    node(16, 16, 1)
    assert ring_of(None, None) == (8, 8 << 20)


def test_budget_does_not_make_a_ring_larger_than_a_ranks_share(tmp_path, node, monkeypatch):
    node(16, 16, 8)
    monkeypatch.setattr(filling, "transfer_device", lambda device: SimulatedDevice())
    _, _, plan = moe(tmp_path)
    assert limits_in_budget(1 << 40, Limits(), plan, allocate(plan.targets)).scratch_bytes == 32 << 20
