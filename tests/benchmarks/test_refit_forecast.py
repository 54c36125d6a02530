"""Tests of benchmarks.refit_forecast: its table is that of the documentation, and its forecasts add up."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="builds transformers models")

from benchmarks import refit_forecast
from benchmarks.refit_forecast import LARGE, SIZES, markdown
from benchmarks.shapes import SMALL, meta_model

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "refit-forecast.json").read_text(encoding="utf-8"))


def test_table_is_printed_from_its_data(tmp_path, capsys):
    file = tmp_path / "result.json"
    refit_forecast.main(["--size", "small", "--json", str(file)])
    table = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [(row["trainer"], row["engine"]) for row in rows] == [*SIZES["small"][1]]
    refit_forecast.main(["--from", str(file)])
    assert capsys.readouterr().out == table == markdown(rows)
    model = meta_model(SMALL)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    others = sum(p.nbytes for p in model.parameters()) - experts
    # The experts are divided, and all other tensors are on each rank of the engine.
    assert [row["bytes_sent"] for row in rows] == [experts + 2 * others, experts + 4 * others]
    assert [row["most_bytes_received"] for row in rows] == [experts // 2 + others, experts // 4 + others]


def test_documentation_has_the_table_of_the_kept_data():
    assert [(row["model"], row["trainer"], row["engine"]) for row in RESULT["rows"]] == [
        (shape.name, *meshes) for shape in SIZES["full"][0] for meshes in LARGE
    ]
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert markdown(RESULT["rows"]) in page


@pytest.mark.long
def test_kept_data_is_what_the_code_computes():
    for kept, row in zip(RESULT["rows"], refit_forecast.run("full"), strict=True):
        assert {**kept, "seconds": 0} == {**row, "seconds": 0}
