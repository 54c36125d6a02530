"""Tests of failed, short and interrupted reads to the host: one clear error, and no open file."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, ReadError
from automodel_conv.execution import host as cpu
from automodel_conv.execution import workers
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.planning.copies import Fallback, Target
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.execution.host_loads import check_load, outputs
from tests.execution.support import LAYOUTS, TRANSPOSE, columns, moe, naive, plan_of, target, write_checkpoint


@pytest.mark.parametrize(
    ("buffer", "text"),
    [
        (None, "no buffer for down"),
        (torch.empty(3, 5, 4), "does not fit"),
        (torch.empty(3, 4, 5, dtype=torch.float64), "does not fit"),
        (torch.empty(1, 4, 5).expand(3, 4, 5), "share memory"),
    ],
)
def test_buffer_that_does_not_fit_is_named_before_anything_is_read(tmp_path, calls, buffer, text):
    _, checkpoint, plan = moe(tmp_path, dtype=torch.float32, shape=(3, 5, 4))
    buffers: dict[str, Tensor] = allocate(plan.targets)
    del buffers["down"]
    if buffer is not None:
        buffers["down"] = buffer
    reads = calls.reads
    with pytest.raises(ConversionError, match=text) as error:
        load_to_host(plan, checkpoint, buffers)
    assert "down" in str(error.value)
    assert calls.reads == reads


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": "2"}, {"threads": 1.5}, {"scratch_bytes": 100}])
def test_impossible_options_are_refused(tmp_path, options):
    _, checkpoint, plan = moe(tmp_path)
    with pytest.raises(ConversionError, match="scratch_bytes"):
        load_to_host(plan, checkpoint, allocate(plan.targets), **options)


@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_any_read_that_fails_is_one_error_and_leaves_no_file_open(tmp_path, calls, layout):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(3, 8, 20))
    expected = naive(plan, tensors)
    calls.reads = 0
    load_to_host(plan, checkpoint, allocate(plan.targets), threads=2)
    total = calls.reads
    assert total > 4
    complete = []
    for number in range(1, total + 1):
        calls.reads, calls.fail_read = 0, number
        buffers = {n: g.tensor for n, g in outputs(plan).items()}
        with pytest.raises(ReadError, match="Input/output error") as error:
            load_to_host(plan, checkpoint, buffers, threads=2)
        assert not calls.open
        text = str(error.value)
        assert ".safetensors" in text
        assert "experts." in text or "norm.weight" in text
        written = [line.strip() for line in text.partition("filled:")[2].splitlines()[1:] if line.startswith("    ")]
        assert f"{len(written)} of 3 targets" in text
        for name in written:
            assert_bytes_equal(buffers[name], expected[name])
        complete.append(len(written))
    assert max(complete) > min(complete)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("short_bytes", [1, 7, 300])
def test_short_reads_are_continued(tmp_path, calls, layout, short_bytes):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(2, 5, 8))
    calls.short_bytes = short_bytes
    check_load(plan, checkpoint, naive(plan, tensors))


@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_file_cut_after_it_was_opened_names_file_and_tensor(tmp_path, calls, layout):
    _, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout])
    row = checkpoint.position["experts.4.gate"]
    path = Path(checkpoint.files[checkpoint.file_ids[row]])
    path.write_bytes(path.read_bytes()[: checkpoint.offsets[row] + 3])
    with pytest.raises(ReadError, match="ends too early") as error:
        load_to_host(plan, checkpoint, allocate(plan.targets), threads=1)
    assert str(path) in str(error.value)
    assert "experts.4.gate" in str(error.value)
    assert "one of" not in str(error.value)
    assert error.value.args[0].splitlines()[-1] == "  do:       the file is truncated: copy or download it again"
    assert not calls.open


def test_missing_file_is_named(tmp_path, calls):
    _, checkpoint, plan = moe(tmp_path)
    Path(checkpoint.files[1]).unlink()
    with pytest.raises(ReadError, match=r"b\.safetensors"):
        load_to_host(plan, checkpoint, allocate(plan.targets))
    assert not calls.open


def test_ctrl_c_propagates_and_closes_files(tmp_path, calls, monkeypatch):
    _, checkpoint, plan = moe(tmp_path)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_to_host(plan, checkpoint, allocate(plan.targets), threads=2)
    assert not calls.open
    assert not [t for t in threading.enumerate() if t.name.startswith("automodel_conv")]


@pytest.mark.parametrize("number", [1, 2])
def test_each_load_thread_uses_one_torch_thread_and_restores_the_number(tmp_path, monkeypatch, number):
    within = []
    real = cpu.copy_equal
    monkeypatch.setattr(cpu, "copy_equal", lambda batches: [within.append(torch.get_num_threads()), real(batches)])
    _, checkpoint, plan = moe(tmp_path, TRANSPOSE)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        load_to_host(plan, checkpoint, allocate(plan.targets), threads=number)
        assert set(within) == {1}
        seen = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_progress_counts_all_bytes_and_is_off_by_default(tmp_path, capsys):
    _, checkpoint, plan = moe(tmp_path)
    load_to_host(plan, checkpoint, allocate(plan.targets))
    assert capsys.readouterr() == ("", "")
    load_to_host(plan, checkpoint, allocate(plan.targets), progress=True)
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "B/s" in shown


def fallback_plan(tmp_path: Path, convert):
    tensors = {
        "a": address_valued((3, 4), torch.float32),
        "b": address_valued((5,), torch.bfloat16),
    }
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    fallback = Fallback("for a test", convert)
    plan = plan_of(
        sources,
        Target("sum", "F64", (3, 4), -1, (0,), (), fallback),
        Target("flat", "F32", (12,), -1, (0,), (), fallback),
        target(sources, "b", "BF16", [["b"]]),
    )
    return tensors, checkpoint, plan


def test_modes_of_the_calling_thread_change_nothing(tmp_path):
    tensors, checkpoint, plan = fallback_plan(tmp_path / "upstream", lambda sources: fallback_results(sources[0]))
    with torch.inference_mode(), torch.device("meta"):
        buffers = allocate(plan.targets)
        load_to_host(plan, checkpoint, buffers)
    for name, tensor in {**fallback_results(tensors["a"]), "b": tensors["b"]}.items():
        assert_bytes_equal(buffers[name], tensor.to(buffers[name].dtype))
    tensors, checkpoint, plan = moe(tmp_path / "copies", *LAYOUTS["transposed"])
    with torch.inference_mode(), torch.device("meta"):
        buffers = allocate(plan.targets)
        load_to_host(plan, checkpoint, buffers)
    for name, tensor in naive(plan, tensors).items():
        assert_bytes_equal(buffers[name], tensor)


def fallback_results(a):
    return {"sum": a * 2, "flat": a.flatten()}


def test_transformers_code_runs_once_for_all_its_targets(tmp_path):
    seen = []

    def convert(sources):
        seen.append({row: t.clone() for row, t in sources.items()})
        return {"sum": sources[0] * 2, "flat": sources[0].flatten()}

    tensors, checkpoint, plan = fallback_plan(tmp_path, convert)
    a = tensors["a"]
    expected = {"sum": (a * 2).to(torch.float64), "flat": a.flatten(), "b": tensors["b"]}
    check_load(plan, checkpoint, expected)
    assert len(seen) == 1
    assert seen[0].keys() == {0}
    assert_bytes_equal(seen[0][0], a)


@pytest.mark.parametrize(
    ("made_by_upstream", "text"),
    [
        ({"sum": torch.zeros(3, 4)}, "did not return flat"),
        ({"sum": torch.zeros(4, 3), "flat": torch.zeros(12)}, "returned sum with a wrong shape or dtype"),
        (
            {"sum": torch.zeros(3, 4), "flat": torch.zeros(12, dtype=torch.int32)},
            "returned flat with a wrong shape or dtype",
        ),
    ],
)
def test_wrong_result_of_transformers_code_is_an_error(tmp_path, made_by_upstream, text):
    _, checkpoint, plan = fallback_plan(tmp_path, lambda sources: made_by_upstream)
    with pytest.raises(ConversionError, match=rf"{text}[\s\S]*do: .*from_pretrained"):
        load_to_host(plan, checkpoint, allocate(plan.targets))
