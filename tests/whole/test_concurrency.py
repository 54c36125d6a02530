"""Tests of concurrent loads: in one process and in many, during a conversion, after a fork, and under a hook."""

import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers", reason="uses merging rules of transformers")
if sys.platform != "linux":
    pytest.skip("needs os.fork", allow_module_level=True)

import automodel_conv as amc
from automodel_conv.errors import ConversionError
from automodel_conv.execution.workers import _TorchThreads
from automodel_conv.testing import assert_bytes_equal
from tests.fault_sweep import Model, Sweep, rules
from tests.faults import descriptors, workers
from tests.integrations.support import assert_same_model
from tests.model_zoo import build_model

LOADS = 32
PROCESSES = 8


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return Sweep(tmp_path_factory.mktemp("concurrency"))


def assert_right(model, sweep):
    for name, tensor in model.state_dict().items():
        assert_bytes_equal(tensor, sweep.wanted[name])


def load(sweep, threads):
    model = Model()
    amc.load_model(model, sweep.source, rules=rules(), threads=threads)
    return model


@pytest.mark.parametrize("threads", [1, 2])
def test_loads_at_once_in_one_process_are_right(sweep, threads):
    before = descriptors()
    start = threading.Barrier(LOADS)

    def one(_):
        start.wait()
        return load(sweep, threads)

    with ThreadPoolExecutor(LOADS) as pool:
        models = list(pool.map(one, range(LOADS)))
    for model in models:
        assert_right(model, sweep)
    assert workers() == []
    assert descriptors() == before


def _in_child(sweep, answers, torch_threads):
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch_threads
        assert_right(load(sweep, 2), sweep)
        answers.put(None)
    except BaseException as error:
        answers.put(repr(error))


def test_processes_forked_after_a_load_load_at_once(sweep):
    """Check that state left by a load (pools, locks, caches) does not block its children."""
    load(sweep, 2)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    arguments = (sweep, answers, torch.get_num_threads())
    children = [context.Process(target=_in_child, args=arguments, daemon=True) for _ in range(PROCESSES)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert [answers.get() for _ in children] == [None] * PROCESSES
    assert_right(load(sweep, 2), sweep)


def test_a_process_forked_while_threads_load_can_load(sweep):
    """Check that the child, which has none of these threads, finds none of their locks held."""
    stop = threading.Event()

    def again():
        while not stop.is_set():
            assert_right(load(sweep, 2), sweep)

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    arguments = (sweep, answers, torch.get_num_threads())
    with ThreadPoolExecutor(4) as pool:
        loading = [pool.submit(again) for _ in range(4)]
        try:
            for _ in range(PROCESSES):
                child = context.Process(target=_in_child, args=arguments, daemon=True)
                child.start()
                child.join(60)
                assert child.exitcode == 0
        finally:
            stop.set()
    for one in loading:
        one.result()
    assert [answers.get() for _ in range(PROCESSES)] == [None] * PROCESSES


def test_a_lock_that_is_held_at_a_fork_does_not_stop_the_child(sweep):
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    arguments = (sweep, answers, torch.get_num_threads())
    with _TorchThreads.lock:
        child = context.Process(target=_in_child, args=arguments, daemon=True)
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answers.get() is None


def test_load_during_a_conversion_by_another_process_is_refused_or_right(sweep, tmp_path):
    """Check that the directory is no checkpoint until the index exists, and the whole one afterwards."""
    directory = tmp_path / "made"
    refused, loaded = [], []
    done = threading.Event()

    def loading():
        while True:
            last = done.is_set()
            try:
                loaded.append(amc.load_state_dict(directory, rules=[], threads=1))
            except ConversionError as error:
                refused.append(error)
            if last:
                return

    thread = threading.Thread(target=loading)
    converting = multiprocessing.get_context("fork").Process(target=sweep.convert, args=(directory,))
    converting.start()
    thread.start()
    converting.join()
    done.set()
    thread.join()
    assert converting.exitcode == 0
    assert refused
    assert loaded
    for state in loaded:
        for name, tensor in sweep.wanted.items():
            assert_bytes_equal(state[name], tensor)


def test_concurrent_install_and_uninstall_restore_transformers():
    import transformers.modeling_utils as modeling

    before = dict(vars(modeling)), dict(vars(modeling.PreTrainedModel))
    start = threading.Barrier(16)

    def race(number):
        start.wait()
        for _ in range(50):
            if number % 2:
                amc.install()
                amc.uninstall()
            else:
                with amc.accelerate_transformers():
                    pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(race, range(16)))
    after = dict(vars(modeling)), dict(vars(modeling.PreTrainedModel))
    for was, now in zip(before, after, strict=True):
        assert was.keys() == now.keys()
        assert all(now[name] is value for name, value in was.items())


def test_hook_toggled_during_a_load_changes_nothing(tmp_path):
    stock = build_model("mixtral")
    stock.save_pretrained(tmp_path)
    wanted = type(stock).from_pretrained(tmp_path)
    stop, toggled = threading.Event(), []

    def toggle():
        while not stop.is_set():
            toggled.append(amc.install())
            stop.wait(0.0005 * (len(toggled) % 20))
            amc.uninstall()
            stop.wait(0.0005 * (len(toggled) % 7))

    with ThreadPoolExecutor(1) as pool:
        toggling = pool.submit(toggle)
        try:
            for _ in range(20):
                assert_same_model(type(stock).from_pretrained(tmp_path), wanted)
        finally:
            stop.set()
    amc.uninstall()
    toggling.result()
    assert any(acceleration.loads for acceleration in toggled)


def test_short_soak_does_not_grow(tmp_path):
    """Run a few rounds; ``python -m tests.soak`` does a thousand."""
    from tests.soak import soak

    measured = soak(tmp_path, rounds=40, every=10)
    assert measured[-1].descriptors == measured[0].descriptors
    assert measured[-1].threads == measured[0].threads
    assert measured[-1].mappings <= measured[0].mappings + 8
    assert measured[-1].resident_bytes <= measured[0].resident_bytes + (16 << 20)
    assert sorted(os.listdir(tmp_path)) == ["convert", "save", "source"]
