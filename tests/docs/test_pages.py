"""Tests of the pages: the code blocks of each page run and print what the page shows."""

import pytest

pytest.importorskip("transformers", reason="the pages load transformers models")

from tests.docs.blocks import blocks_of
from tests.docs.running import ROOT, run_blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read(page):
    return blocks_of(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))


def on_a_gpu():
    """Return the pages with blocks that need a GPU; pages that cannot be read fail in ``test_page_runs``."""
    return [page for page in PAGES if "<!-- needs a GPU -->" in page.read_text(encoding="utf-8")]


def name(page):
    return page.relative_to(ROOT).with_suffix("").as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page_runs(page, hub, stores, tmp_path):
    done = run_blocks(read(page), page, tmp_path, hub, variables=stores)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.gpu
@pytest.mark.parametrize("page", on_a_gpu(), ids=name)
def test_page_runs_on_a_gpu(page, hub, tmp_path):
    done = run_blocks(read(page), page, tmp_path, hub, has_gpu=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
