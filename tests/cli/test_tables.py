"""Tests of the tables of commands: their rows and values."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from automodel_conv.cli import tables
from automodel_conv.cli.bench import Bench
from automodel_conv.cli.demo import DemoLoad, DemoResult
from automodel_conv.cli.engine_mesh import Division
from automodel_conv.cli.forecast import Forecast, RankCost
from automodel_conv.cli.refit_plan import Divided
from automodel_conv.cli.tables import (
    adapter_table,
    converted_table,
    demo_table,
    divisions_table,
    mesh_table,
    report_table,
    two_columns,
)
from automodel_conv.execution.page_policy import PageUse
from automodel_conv.execution.report import LoadReport
from automodel_conv.lora.inspecting import AdapterRow, AdapterSummary
from automodel_conv.publishing.convert_report import ConvertReport


def rows(table):
    """Return the cells of each row by its first cell."""
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(table)
    found = {}
    for line in console.export_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"[│┃]", line)[1:-1]]
        if cells:
            found[cells[0]] = cells[1:]
    return found


def caption(table):
    return str(table.caption)


def test_the_second_column_is_to_the_right_and_there_is_no_heading():
    table = two_columns("text")
    assert [column.justify for column in table.columns] == ["left", "right"]
    assert not table.show_header
    assert table.caption == "text"


@pytest.mark.parametrize("verified", [False, True])
def test_a_conversion_counts_files_bytes_and_names(verified):
    report = ConvertReport(
        files=("a", "b", "c"),
        bytes_written=3_000_000_000,
        files_resumed=1,
        carried=("x",),
        left_out=("y", "z"),
        unindexed=(),
        files_copied=("config.json",),
        seconds=2.0,
        peak_extra_bytes=3 << 20,
    )
    table = converted_table(report, verified)
    assert list(rows(table).values()) == [
        ["3"],
        ["1"],
        ["3.0 GB"],
        ["1.50 GB/s"],
        ["2.000"],
        ["3.1 MB"],
        ["1"],
        ["2"],
        ["1 file"],
    ]
    assert ("read back and compared" in caption(table)) == verified
    assert str(report).count("\n") == 8 + 3  # the same rows, and a line for each name
    assert str(report).endswith("y\n    z\nother files copied           1 file")


def report(**changes):
    fields = {
        "missing_keys": ("m",),
        "unexpected_keys": ("u", "v"),
        "mismatched_keys": (),
        "duplicated_keys": (),
        "fallbacks": ("f",),
        "bytes_read": 10**9,
        "seconds": {"open": 0.5, "plan": 0.25, "read": 2.0},
        "peak_extra_bytes": 1 << 20,
        "threads": 4,
    }
    return LoadReport(**(fields | changes))


def test_a_load_has_a_row_for_each_phase_and_each_kind_of_problem():
    found = rows(report_table(report(), 7))
    assert found["tensors"] == ["7"]
    assert found["speed"] == ["500.00 MB/s"]
    phases = [found[f"seconds: {phase}"] for phase in ("open", "plan, with imports", "read")]
    assert [*phases, found["seconds"]] == [["0.500"], ["0.250"], ["2.000"], ["2.750"]]
    assert [found[name] for name in ("missing", "unexpected", "wrong shape", "left out")] == [
        ["1"],
        ["2"],
        ["0"],
        ["0"],
    ]


def test_rows_of_device_and_new_memory_appear_only_if_not_empty():
    assert (
        not {"copies on the device by kernels", "new memory", "no kernels, because"}
        & rows(report_table(report(), 7)).keys()
    )
    full = report(copied_by_torch=3, without_kernels="no compiler", pages=PageUse())
    found = rows(report_table(full, 7))
    assert found["copies on the device by kernels"] == ["0"]
    assert found["copies on the device by torch"] == ["3"]
    assert found["no kernels, because"] == ["no compiler"]
    assert found["new memory"] == [str(PageUse())]


def test_a_mesh_shows_the_least_the_median_and_the_most_of_its_ranks():
    ranks = tuple(RankCost((n,), held * 10**6, 2 * held * 10**6, 10 * held, held) for n, held in enumerate((1, 2, 6)))
    table = mesh_table(Forecast(ranks, 3))
    assert list(rows(table).values())[1:] == [
        ["1.0 MB", "2.0 MB", "6.0 MB"],
        ["2.0 MB", "4.0 MB", "12.0 MB"],
        ["2.000", "2.000", "2.000"],
        ["10", "20", "60"],
        ["1", "2", "6"],
        ["10.0", "10.0", "10.0"],
    ]
    assert caption(table).startswith("a summary over 3 ranks;")
    assert caption(table).endswith("gaps of at most 64 KiB between the bytes that it needs")
    assert "2.000 of the mean" in caption(table)  # 6 of 3


def test_divisions_show_modules_and_the_most_that_a_rank_holds():
    parts = [
        Divided(Division.EXPERTS, ("experts",), 4 * 10**9, 10**9),
        Divided(Division.UNKNOWN, ("conv1d", "in_proj"), 10**6, 10**6),
    ]
    table = divisions_table(parts)
    assert list(rows(table).items())[1:] == [
        ("experts over ep", ["experts", "4.0 GB", "1.0 GB"]),
        ("not known here, so counted as whole on each rank", ["conv1d, in_proj", "1.0 MB", "1.0 MB"]),
    ]


def test_empty_ranks_do_not_divide_by_zero_and_samples_are_marked():
    table = mesh_table(Forecast((RankCost((0,), 0, 0, 0, 0),), 8))
    assert "8 ranks, 1 of them sampled" in caption(table)
    assert rows(table)["bytes read per byte held"] == ["0.000"] * 3


def demo(**loads):
    return DemoResult({name: "1.0" for name in loads}, 4 * 10**9, loads, ())


def test_demo_shows_speed_and_exactness_of_each_way():
    load = DemoLoad(seconds=2.0, anonymous_bytes=10**9, resident_bytes=None, digests={})
    result = demo(transformers=load, ours=load)
    assert rows(demo_table(result))["ours 1.0"] == ["2.00", "2.00 GB/s", "1.0 GB", "-", "all"]
    assert rows(demo_table(result))["transformers 1.0"][-1] == ""
    different = replace(result, different=("a",))
    assert rows(demo_table(different))["ours 1.0"][-1] == "no"


def measured(**changes):
    bench = Bench(
        files=2,
        tensors=9,
        nbytes=4 * 10**9,
        sample_nbytes=2 * 10**9,
        sample_targets=5,
        scratch_nbytes=5 * 10**8,
        open_seconds=0.5,
        plan_seconds=0.25,
        cached=None,
        first_seconds=4.0,
        roof_seconds={1: 1.0, 2: 0.5},
        roof_has_huge_pages=True,
        default_threads=2,
        load_seconds={1: 2.0, 2: 0.625},
        pages=PageUse(),
        touch_gb_per_s=3.0,
        touch_small_gb_per_s=1.0,
        huge_pages=None,
        memory_bytes=1 << 34,
    )
    return replace(bench, **changes)


@pytest.mark.parametrize(
    ("cached", "dropped", "state", "first"),
    [
        (1.0, False, "100%", "500.00 MB/s from the page cache"),
        (0.5, False, "50%", "500.00 MB/s from both"),
        (0.0, False, "0%", "500.00 MB/s from the disk"),
        (0.0, True, "0%, dropped", "500.00 MB/s from the disk"),
        (1.0, True, "100%, though the system was asked to drop it", "500.00 MB/s from the page cache"),
        (None, True, "unknown: this system does not report it", "500.00 MB/s"),
    ],
)
def test_bench_shows_whether_the_first_read_was_from_the_disk(cached, dropped, state, first):
    counts, speeds = tables.bench_tables(measured(cached=cached, dropped=dropped))
    assert rows(counts)["in the page cache before the first read"] == [state]
    assert rows(counts)["first read"] == [first]
    assert caption(speeds).startswith("after the first read, so from the page cache")


def test_bench_shows_each_number_of_threads_with_its_roof():
    counts, speeds = tables.bench_tables(measured())
    found = rows(counts)
    assert found["files, tensors"] == ["2, 9"]
    assert found["transposed, interleaved, cast or decoded"] == ["25%"]
    assert found["first read"] == ["500.00 MB/s"]
    assert found["in the page cache before the first read"] == ["unknown: this system does not report it"]
    assert found["setting for huge pages"] == ["unknown"]
    assert rows(speeds)["1"] == ["2.00 GB/s", "1.00 GB/s", "2.000", "0.50"]
    assert rows(speeds)["2 (default)"] == ["4.00 GB/s", "3.20 GB/s", "0.625", "0.80"]
    assert "mostly huge" in caption(speeds)


def adapter_row(**values):
    row = AdapterRow("a.*.b.weight", (0,), (), 4, 0, 2, 1.5, None)
    return rows(adapter_table(AdapterSummary("adapter", "base", "vllm", 7, (), None, (replace(row, **values),))))


@pytest.mark.parametrize(
    ("numbers", "of", "text"),
    [
        ((), 0, "-"),
        ((3,), 4, "3 of 4"),
        ((0, 1, 2, 3), 4, "all 4"),
        ((0,), 1, "0 of 1"),
        ((0, 1, 2, 5, 7, 8), 16, "0-2, 5, 7-8 of 16"),
        ((0, 1), 0, "0-1"),
    ],
)
def test_layers_and_experts_of_an_adapter_are_ranges(numbers, of, text):
    assert adapter_row(layers=numbers, base_layers=of)["a.*.b"] == [text, "-", "2", "1.5", "yes"]
    assert adapter_row(experts=numbers, base_experts=of)["a.*.b"] == ["0 of 4", text, "2", "1.5", "yes"]


def test_weights_that_an_adapter_replaces_have_no_rank():
    assert adapter_row(rank=None, scale=None)["a.*.b"] == ["0 of 4", "-", "-", "replaces", "yes"]


def test_part_of_an_adapter_without_effect_has_its_reason():
    assert adapter_row(problem="not in the base")["a.*.b"][-1] == "not in the base"
    assert adapter_row(name="[b]x")["[b]x"] == ["0 of 4", "-", "2", "1.5", "yes"]


def test_table_of_an_adapter_states_its_form():
    table = adapter_table(AdapterSummary("adapter", "base", "vllm", 7, (), None, ()))
    assert caption(table).startswith("7 modules, form vllm;")
