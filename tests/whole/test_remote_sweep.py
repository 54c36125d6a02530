"""Tests of loads from storage that is not on this machine: every model type, format and kind has the bytes of files."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="compares with from_pretrained of transformers")

import automodel_conv as amc
from tests.comparing import assert_same, assert_same_in_order, tensors_of
from tests.loopback_kinds import KINDS, placed
from tests.loopback_store import serve
from tests.model_zoo import EXCLUDED, build_model, write_checkpoint, zoo_names
from tests.zoo.published import PUBLISHED
from tests.zoo.writing import is_known, write

pytestmark = pytest.mark.sweep
QUICK = ("mixtral", "qwen3_moe", "deepseek_v3", "jamba", "llava")
"""Model types that are tested by default."""
QUICK_FORMATS = ("Qwen/Qwen3-30B-A3B-FP8", "nvidia/Qwen3.5-122B-A10B-NVFP4", "openai/gpt-oss-20b")
"""Published checkpoints that are tested by default: FP8 in blocks, NVFP4 and MXFP4."""
NAMES = [name for name in zoo_names() if name not in EXCLUDED]
LAYOUTS = ("nemo", "gpt_oss", "vllm", "per_expert")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in NAMES],
)
def case(request, tmp_path_factory):
    """Write a checkpoint in several files, and serve it; return folder, URL and transformers' load."""
    model = build_model(request.param)
    directory = tmp_path_factory.mktemp(request.param.replace("/", "_"))
    write_checkpoint(model, directory)
    upstream = type(model).from_pretrained(directory)
    with serve(directory) as server:
        yield directory, server.url, upstream


def test_state_dict_over_http_equals_from_pretrained(case):
    _, url, upstream = case
    loaded = amc.load_state_dict(url)
    assert_same_in_order(loaded, upstream.state_dict())
    assert not loaded.report.fallbacks


def test_model_on_meta_over_http_equals_that_of_the_files(case):
    directory, url, upstream = case
    states = []
    for path in (directory, url):
        with torch.device("meta"):
            model = type(upstream)._from_config(upstream.config)
        amc.load_model(model, path, strict=False)
        states.append({name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta})
    assert_same_in_order(states[1], states[0])


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, *({"layout": layout} for layout in LAYOUTS)], ids=str)
def test_casts_and_layouts_over_http_are_those_of_the_files(case, options):
    directory, url, _ = case
    try:
        local = amc.load_state_dict(directory, **options)
    except amc.ConversionError as error:
        with pytest.raises(type(error)):
            amc.load_state_dict(url, **options)
        return
    assert_same_in_order(amc.load_state_dict(url, **options), local)


def test_conversion_over_http_writes_the_bytes_of_a_local_one(case, tmp_path):
    directory, url, _ = case
    for source, folder in ((directory, tmp_path / "local"), (url, tmp_path / "remote")):
        amc.convert_checkpoint(source, folder, layout="per_expert")
    assert_same(tensors_of(tmp_path / "remote"), tensors_of(tmp_path / "local"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir() if path.suffix == ".json"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "remote").iterdir() if path.name in files} == files
    amc.verify_checkpoint(url, tmp_path / "remote", layout="per_expert")


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(one, id=one.name, marks=[] if one.name in QUICK_FORMATS else [pytest.mark.long])
        for one in PUBLISHED
        if is_known(one)
    ],
)
def test_quantized_formats_over_http_equal_the_twin_and_the_files(record, tmp_path):
    written = write(record, tmp_path)
    options = {} if record.recipe is None else {"rules": getattr(amc.recipes, record.recipe)()}
    decode = {"dequantize": True} if record.formats else {}
    with serve(written.directory) as server:
        upstream = written.model_class.from_pretrained(written.twin, dtype="auto")
        assert_same(amc.load_state_dict(server.url, **options), upstream.state_dict())
        nemo = amc.load_state_dict(written.directory, layout="nemo", **options)
        for threads in (None, 1):
            assert_same(amc.load_state_dict(server.url, layout="nemo", threads=threads, **options), nemo)
        kept = amc.load_state_dict(server.url, rules=[], dequantize=False)
        assert_same(kept, written.stored)
        amc.convert_checkpoint(server.url, tmp_path / "there", layout="nemo", **decode, **options)
        amc.verify_checkpoint(written.directory, tmp_path / "there", layout="nemo", **decode, **options)
        amc.verify_checkpoint(server.url, tmp_path / "there", layout="nemo", **decode, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK[0] else [pytest.mark.long]) for name in QUICK]
)
def test_every_kind_of_storage_has_the_bytes_of_the_files(name, kind, tmp_path, monkeypatch):
    model = build_model(name)
    directory = tmp_path / "published"
    directory.mkdir()
    write_checkpoint(model, directory)
    local = amc.load_state_dict(directory)
    layout = "nemo" if any(".experts." in name for name in local) else None
    with placed(kind, directory, monkeypatch, tmp_path / "cache") as place:
        assert_same_in_order(amc.load_state_dict(place.path, **place.options), local)
        transposed = amc.load_state_dict(place.path, layout=layout, threads=2, **place.options)
        assert_same_in_order(transposed, amc.load_state_dict(directory, layout=layout))
        amc.convert_checkpoint(place.path, tmp_path / "converted", layout=layout, **place.options)
        amc.verify_checkpoint(directory, tmp_path / "converted", layout=layout)
        amc.verify_checkpoint(place.path, tmp_path / "converted", layout=layout, **place.options)
        with torch.device("meta"):
            other = type(model)._from_config(model.config)
        amc.load_model(other, place.path, strict=False, **place.options)
        assert_same(other.state_dict(), amc.load_state_dict(directory))
