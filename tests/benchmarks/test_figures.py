"""Tests of the tables in docs: they equal the tables of the committed data; links lead to files."""

import re

import pytest

from automodel_conv.upstream.registry import transformers_available
from benchmarks import adapters, choices, mapping, measure, refit, remote, vllm
from benchmarks.peers import tables

pytestmark = pytest.mark.skipif(not transformers_available(), reason="benchmarks build transformers models")

_LINK = re.compile(r"(?:\]\(|src=\"|srcset=\"|^\[[^]]+\]: )([^)\" \n]+)", re.MULTILINE)
_REPOSITORY = re.compile("https://github.com/automodel-conv/automodel_conv/(?:blob|tree)/main/")


@pytest.mark.parametrize(
    ("page", "make", "data"),
    [
        ("docs/comparison.md", tables.markdown, "peers-2-cores.json"),
        ("docs/performance.md", tables.markdown, "peers-as-found-2-cores.json"),
        ("docs/performance.md", tables.markdown, "machines-2-cores.json"),
        ("docs/performance.md", tables.markdown, "peers-cold-2-cores.json"),
        ("docs/performance.md", choices.markdown, "choices-concatenated-2-cores.json"),
        ("docs/performance.md", choices.markdown, "choices-transposed-2-cores.json"),
        ("docs/performance.md", choices.markdown, "choices-cold-2-cores.json"),
        ("docs/performance.md", mapping.markdown, "mapping-2-cores.json"),
        ("docs/performance.md", vllm.markdown, "vllm-2-cores.json"),
        ("docs/performance.md", adapters.markdown, "adapters-2-cores.json"),
        ("docs/performance.md", refit.markdown, "refit-2-cores.json"),
        ("docs/performance.md", remote.markdown, "remote-2-cores.json"),
    ],
)
def test_table_equals_its_data(page, make, data):
    table = make(measure.read_json(str(measure.RESULTS / data)))
    assert table.strip() in (measure.REPOSITORY / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/comparison.md", "docs/how-it-works.md", "docs/performance.md", "docs/reliability.md"],
)
def test_files_linked_from_a_page_exist(page):
    path = measure.REPOSITORY / page
    links = _LINK.findall(path.read_text(encoding="utf-8"))
    files = [file for link in links if (file := _file_of(link.split("#")[0], path.parent))]
    assert files
    for file in files:
        assert file.exists(), file


def _file_of(link, folder):
    """Return the file of the repository that a link leads to; None for other sites and for places of the same page."""
    if _REPOSITORY.match(link):
        return measure.REPOSITORY / _REPOSITORY.sub("", link)
    return folder / link if link and "://" not in link else None
