"""Tests of the notebook: a kernel runs it from top to bottom, and no outputs are committed."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"

# Texts that the outputs contain, in this order. A notebook shows the last value of a cell as HTML.
SHOWN = (
    "model.layers.0.mlp.experts.1.gate_proj.weight",
    "reads 5.0 MB",
    '<iframe srcdoc="',
    "32768",
    "missing",
    '<iframe srcdoc="',
    "all 25 tensors equal those of from_pretrained",
    "are the conversion of the published checkpoint, bit for bit",
    "are the published tensors again, bit for bit",
    "incomplete: parts of a merged parameter are absent (4)",
)
_IN_FRAME = re.compile(r'(?<=srcdoc=")[^"]*')


def test_no_outputs_are_committed():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert [cell["outputs"] for cell in cells if cell["outputs"]] == []
    assert {cell["execution_count"] for cell in cells} == {None}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Return the outputs of all cells, run by a kernel in an empty folder; an error in a cell raises."""
    nbclient = pytest.importorskip("nbclient", reason="`make test-notebook` installs what runs notebooks")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("transformers", reason="the notebook builds a transformers model")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_cells_show_what_the_text_says(outputs):
    text = "".join(map(shown_by, outputs))
    rest = text
    for part in SHOWN:
        assert part in rest, f"{part!r} is not in {_IN_FRAME.sub('', text)}"
        rest = rest.partition(part)[2]


def shown_by(output):
    """Return the text of an output, or its HTML if it has any."""
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    return output.data.get("text/html", output.data.get("text/plain", ""))
