"""Tests of benchmarks.choices: every variant loads the same tensors, and the table shows the measured values."""

import json

import pytest

from automodel_conv.execution import copying, page_calls
from automodel_conv.execution import host as host_loads
from automodel_conv.files import system
from automodel_conv.kernels import transpose_torch
from automodel_conv.schedule import host as host_schedule
from automodel_conv.schedule import jobs
from automodel_conv.upstream.registry import transformers_available
from benchmarks import choices, shapes

pytestmark = pytest.mark.skipif(not transformers_available(), reason="benchmarks build transformers models")

CHANGED = (
    (copying, "strided_copy_torch"),
    (jobs.Reads, "calls"),
    (host_schedule, "bytes_per_job"),
    (host_schedule, "_SLAB_BYTES"),
    (host_loads, "NewMemory"),
    (page_calls, "populate_pages"),
    (system, "open_readonly"),
    (transpose_torch, "_MAX_ROWS"),
)


@pytest.fixture
def restored(monkeypatch):
    """Restore after each test everything that the variants replace."""
    for module, name in CHANGED:
        monkeypatch.setattr(module, name, getattr(module, name))
    return {(module, name): getattr(module, name) for module, name in CHANGED}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    shapes.write_checkpoint(shapes.SMALL, str(directory))
    return str(directory)


@pytest.mark.parametrize(
    ("group", "way"), [(group, way) for group in choices.GROUPS for way in choices.GROUPS[group].ways]
)
def test_each_variant_changes_something_and_loads_the_same_tensors(checkpoint, restored, group, way):
    [as_it_is] = choices.load(group, choices.AS_IT_IS, checkpoint, checkpoint, 0)
    [load] = choices.load(group, way, checkpoint, checkpoint, 0)
    assert load["digest"] == as_it_is["digest"] is not None
    changed = [name for (module, name), stock in restored.items() if getattr(module, name) is not stock]
    assert bool(changed) == (way != choices.AS_IT_IS)


def test_table_shows_the_measured_seconds(tmp_path, capsys):
    measured = {"digest": "a", "cpu_seconds": 0.5, "minor_faults": 7, "anonymous_bytes": 200}
    rows = [
        {"group": "cold", "way": way, "runs": [{**measured, "seconds": seconds}] * 3}
        for way, seconds in ((choices.AS_IT_IS, 2.0), ("jobs of at most 1 MiB", 3.0))
    ]
    (tmp_path / "result.json").write_text(json.dumps({"file_bytes": 100, "rows": rows}))
    choices.main(["--from", str(tmp_path / "result.json")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[2] == "| *[E, 2I, H], cold page cache* | | | | | |"
    assert printed[3] == "| as it is | 2.00 (2.00-2.00) | 1.00x | 0.50 | 7 | 2.00x |"
    assert printed[4] == "| jobs of at most 1 MiB | 3.00 (3.00-3.00) | 1.50x | 0.50 | 7 | 2.00x |"
