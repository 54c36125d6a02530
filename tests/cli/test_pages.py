"""Tests of ``--html``: pages of plans and loads that commands write, and files that cannot be written."""

import base64
import gzip
import json
import re
from pathlib import Path

import pytest

from automodel_conv.upstream.registry import transformers_available
from tests.cli.support import run
from tests.loopback_store import serve

needs_transformers = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")


def data_of(page):
    """Return what a page of a plan shows."""
    [packed] = re.findall(r'const DATA = "([^"]*)";', page.read_text(encoding="utf-8"))
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_page_of_a_plan_has_its_tensors_and_the_path_as_its_title(plain, tmp_path):
    page = tmp_path / "plan.html"
    result = run("plan", plain, "--no-model", "--html", page)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"wrote {page}\n"
    data = data_of(page)
    assert data["title"] == str(plain)
    assert sorted(data["names"]) == ["a.weight", "b"]
    assert data["ranks"] is None


def test_page_of_a_url_has_no_credentials(plain, tmp_path):
    page = tmp_path / "plan.html"
    with serve(plain) as server:
        url = server.url.replace("://", "://someone:password@")
        result = run("plan", f"{url}/model.safetensors?signature=secret", "--no-model", "--html", page)
    assert result.exit_code == 0, result.output
    assert data_of(page)["title"] == f"{server.url}/model.safetensors"
    assert not re.search("someone|password|signature|secret", page.read_text(encoding="utf-8") + str(data_of(page)))


@needs_transformers
def test_page_of_a_mesh_has_its_ranks(moe, tmp_path):
    page = tmp_path / "plan.html"
    result = run("plan", moe, "--mesh", "fsdp=2", "--html", page)
    assert result.exit_code == 0, result.output
    assert data_of(page)["ranks"]["labels"] == ["rank 0: fsdp=0", "rank 1: fsdp=1"]


@needs_transformers
def test_page_of_a_load_has_its_timeline(moe, tmp_path):
    page = tmp_path / "load.html"
    with serve(moe) as server:
        url = server.url.replace("://", "://someone:password@")
        result = run("load", url, "--html", page)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"wrote {page}\n"
    text = page.read_text(encoding="utf-8")
    assert f"<title>{server.url}</title>" in text
    assert "password" not in text
    assert "<svg" in text


@needs_transformers
def test_page_of_a_load_that_cannot_be_written_is_refused_before_the_load(moe, tmp_path):
    (tmp_path / "folder").mkdir()
    for file in ("absent/load.html", "folder"):
        result = run("load", moe, "--html", tmp_path / file)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "--html" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@needs_transformers
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_report_is_printed_if_the_page_of_a_load_does_not_fit(moe):
    result = run("load", moe, "--html", "/dev/full")
    assert result.exit_code == 2
    assert "peak extra memory" in result.stdout
    assert "--html: No space left on device" in result.stderr


def test_page_of_a_plan_that_cannot_be_written_is_a_wrong_option(plain, tmp_path):
    result = run("plan", plain, "--no-model", "--html", tmp_path / "absent" / "plan.html")
    assert result.exit_code == 2
    assert "--html" in result.stderr
