"""Tests of what loads share: buffers are checked before anything is read, and errors name the complete targets."""

import threading

import pytest
import torch

from automodel_conv.errors import ConversionError, ReadError, message
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.load import add_filled_targets, prepare_load, run_load
from automodel_conv.execution.stats import LoadStats
from automodel_conv.execution.timeline import Lane
from automodel_conv.execution.workers import Stopped
from automodel_conv.planning.copies import Fallback, Target
from tests.execution.support import columns, plan_of, target, write_checkpoint

STATS = LoadStats(0, 0, 0)


@pytest.fixture
def case(tmp_path):
    """Return two targets by copies, one without elements, and two that code of transformers computes at once."""
    tensors = {"a": torch.arange(4.0), "b": torch.arange(6.0), "none": torch.ones(0, 3), "c": torch.arange(5.0)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    row = sources.names.index("c")
    convert = Fallback("a test", lambda found: {"one": found[row] + 1, "two": found[row] + 2})
    plan = plan_of(
        sources,
        target(sources, "a", "F32", [["a"]]),
        Target("one", "F32", (5,), -1, (row,), (), convert),
        target(sources, "none", "F32", [["none"]]),
        target(sources, "b", "F32", [["b"]]),
        Target("two", "F32", (5,), -1, (row,), (), convert),
    )
    return checkpoint, plan, allocate(plan.targets)


def test_copies_and_calls_are_separated_and_empty_targets_need_neither(case):
    checkpoint, plan, buffers = case
    load = prepare_load(plan, checkpoint, buffers)
    assert [t.name for t in load.targets] == ["a", "b"]
    assert [t.data_ptr() for t in load.tensors] == [buffers["a"].data_ptr(), buffers["b"].data_ptr()]
    assert [[t.name for t in call.targets] for call in load.calls] == [["one", "two"]]
    assert load.whole_bytes == 20


@pytest.mark.parametrize("name", ["a", "b", "one", "two"])
def test_buffer_that_is_missing_or_does_not_fit_is_named(case, name):
    checkpoint, plan, buffers = case
    wrong = buffers | {name: buffers[name][1:]}
    with pytest.raises(ConversionError, match=f"(?s)buffer of {name} does not fit.*expected.*found"):
        prepare_load(plan, checkpoint, wrong)
    del wrong[name]
    with pytest.raises(ConversionError, match=f"no buffer for {name}"):
        prepare_load(plan, checkpoint, wrong)


def test_calls_run_after_the_copies_and_all_bytes_are_counted(case, capsys):
    checkpoint, plan, buffers = case
    load = prepare_load(plan, checkpoint, buffers)
    buffers["one"].fill_(-1)

    def run(advance):
        assert bool((buffers["one"] == -1).all())
        return STATS._replace(threads=3)

    stats = run_load(load, 40, run, set, False, None, Lane("main"))
    assert stats == LoadStats(60, 0, 0, threads=3)
    assert torch.equal(buffers["one"], torch.arange(5.0) + 1)
    assert torch.equal(buffers["two"], torch.arange(5.0) + 2)


def test_error_of_the_copies_names_the_targets_that_are_complete(case):
    checkpoint, plan, buffers = case
    load = prepare_load(plan, checkpoint, buffers)

    def run(advance):
        raise ReadError(message("no disk", do="buy one"))

    with pytest.raises(ReadError) as caught:
        run_load(load, 40, run, lambda: {0}, False, None, Lane("main"))
    assert caught.value.args == ("no disk\n  filled:   1 of 5 targets\n    b\n  do:       buy one",)


def test_error_of_a_call_names_all_copies(case):
    checkpoint, plan, buffers = case
    load = prepare_load(plan, checkpoint, buffers)
    del load.buffers["two"]
    with pytest.raises(ConversionError) as caught:
        run_load(load, 40, lambda advance: STATS, set, False, None, Lane("main"))
    assert "filled:   2 of 5 targets\n    a\n    b" in str(caught.value)


def test_no_call_is_begun_after_a_stop(case):
    checkpoint, plan, buffers = case
    buffers["one"].fill_(-1)
    stop = threading.Event()

    def run(advance):
        stop.set()
        return STATS

    with pytest.raises(Stopped) as caught:
        run_load(prepare_load(plan, checkpoint, buffers), 40, run, set, False, stop, Lane("main"))
    assert bool((buffers["one"] == -1).all())
    assert caught.value.__notes__ == ["  filled:   2 of 5 targets\n    a\n    b"]


def test_notes_to_errors_of_others_add_up():
    error = RuntimeError("of torch")
    add_filled_targets(error, ["a"], 2)
    add_filled_targets(error, [], 3)
    assert str(error) == "of torch"
    assert error.__notes__ == ["  filled:   1 of 2 targets\n    a", "  filled:   0 of 3 targets"]
