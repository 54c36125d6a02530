"""Tests of repositories of a Hub: the bytes requested from them, and the results."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import automodel_conv as amc
from automodel_conv.errors import CheckpointError, DestinationError, NameProblems, UnsupportedError
from automodel_conv.execution.host import load_to_host
from automodel_conv.files.hub import _REQUIREMENT
from automodel_conv.files.shards import Spec, divide, index_of
from tests.comparing import assert_same
from tests.loopback_hub import Hub, Request, environment, serve, use

huggingface_hub = pytest.importorskip("huggingface_hub")
NAME = "some-org/Some.Model"
TENSORS = {name: np.arange(100, dtype=np.int32) + number for number, name in enumerate(["a", "b", "c", "d"])}


def write_sharded(directory: Path, stem: str = "model", tensors: dict[str, np.ndarray] | None = None) -> None:
    """Write two files and their index."""
    tensors = TENSORS if tensors is None else tensors
    directory.mkdir(exist_ok=True)
    names, weight_map = list(tensors), {}
    for number, part in enumerate([names[: len(names) // 2], names[len(names) // 2 :]], 1):
        file = f"{stem}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_hollow(directory: Path) -> None:
    """Write a sparse checkpoint of 200 MB with Mixtral's names."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_local_experts=8, vocab_size=1000
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if ".experts." not in name}
    shapes = {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): shape for name, shape in shapes.items()}
    for layer in range(4):
        for expert in range(8):
            start = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{start}.w1.weight": (2048, 512), f"{start}.w2.weight": (512, 2048)}
            shapes |= {f"{start}.w3.weight": (2048, 512)}
    shards = divide([Spec(name, "BF16", shape) for name, shape in shapes.items()], 50_000_000)
    for shard in shards:
        with open(directory / shard.name, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    (directory / "model.safetensors.index.json").write_bytes(index_of(shards) or b"")
    with open(directory / "pytorch_model.bin", "wb") as file:
        file.truncate(1_000_000)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_sharded(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve({NAME: repository}) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def of_weights(hub: Hub) -> list[Request]:
    return [request for request in hub.requests if request.path.endswith(".safetensors")]


def cached(tmp_path: Path) -> set[str]:
    """Return the names of the files in the cache."""
    return {path.name for path in (tmp_path / "cache").glob("*/snapshots/*/**/*") if path.is_file()}


def columns(checkpoint: amc.Checkpoint) -> list[Any]:
    return [checkpoint.names, checkpoint.dtypes, checkpoint.shapes, checkpoint.offsets, checkpoint.nbytes]


def test_repository_is_opened_from_its_headers_only(hub, repository, tmp_path):
    checkpoint = amc.open_checkpoint(NAME)
    assert columns(checkpoint) == columns(amc.open_checkpoint(repository))
    assert checkpoint.is_remote
    assert [path.rpartition("/")[2] for path in checkpoint.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [request.method for request in of_weights(hub)] == ["GET", "GET"]
    assert all(request.range is not None for request in of_weights(hub))
    assert cached(tmp_path) == {"model.safetensors.index.json"}


def test_planning_transfers_less_than_a_hundredth_of_a_repository(tmp_path, monkeypatch):
    write_hollow(tmp_path / "repository")
    with serve({NAME: tmp_path / "repository"}) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        plan = amc.compile_plan(NAME)
        assert plan.bytes_read > 100_000_000
        assert 0 < hub.sent < hub.nbytes(NAME) / 1000
        assert len(of_weights(hub)) == len(list((tmp_path / "repository").glob("*.safetensors"))) > 3
        assert not hub.requests_of(".bin")
        assert plan.to_json() == amc.compile_plan(tmp_path / "repository").to_json()
        hub.requests.clear()
        result = subprocess.run(
            [sys.executable, "-m", "automodel_conv", "plan", NAME, "--no-model", "--revision", "main"],
            env=environment(hub, tmp_path / "other cache"),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == amc.compile_plan(tmp_path / "repository", rules=[]).summary().strip()
        assert 0 < hub.sent < hub.nbytes(NAME) / 1000


def test_header_longer_than_expected_needs_a_second_request(hub, repository):
    tensors = {f"a.name.that.is.rather.long.{number:04}": np.zeros(1, np.int8) for number in range(1000)}
    for path in repository.iterdir():
        path.unlink()
    save_file(tensors, repository / "model.safetensors")
    checkpoint = amc.open_checkpoint(NAME)
    assert columns(checkpoint) == columns(amc.open_checkpoint(repository))
    assert len(of_weights(hub)) == 2
    assert sum(request.sent for request in of_weights(hub)) == checkpoint.offsets[0]


def test_file_shorter_than_expected_needs_one_request(hub, repository):
    for path in repository.iterdir():
        path.unlink()
    save_file({"a": np.zeros(0, np.int8)}, repository / "model.safetensors")
    assert amc.open_checkpoint(NAME).shapes == [(0,)]
    assert len(of_weights(hub)) == 1


def test_server_without_ranges_is_refused_before_it_sends_a_file(repository, tmp_path, monkeypatch):
    for path in repository.iterdir():
        path.unlink()
    save_file({"z": np.zeros(100_000_000, np.int8)}, repository / "model.safetensors")
    with serve({NAME: repository}, takes_ranges=False) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        with pytest.raises(CheckpointError, match=r"(?s)model.safetensors.*ignores ranges"):
            amc.open_checkpoint(NAME)
    assert hub.sent < 60_000_000  # buffers of the sockets count as sent


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff\xfe", "too short for a header"),
        (b"\xff" * 8 + b"{}", "the length of a header is impossible"),
        (b"\x02" + bytes(7) + b"[]", "not a JSON object"),
        (b"\x02" + bytes(7) + b"{}tail", "bytes after the last tensor"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc", "a Git-LFS pointer"),
    ],
)
def test_remote_headers_are_checked_like_local_ones(hub, repository, content, text):
    (repository / "model-00002-of-00002.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as remote:
        amc.open_checkpoint(NAME)
    with pytest.raises(CheckpointError, match=text) as local:
        amc.open_checkpoint(repository)
    assert "model-00002-of-00002.safetensors" in str(remote.value)
    assert str(remote.value).splitlines()[2:] == str(local.value).splitlines()[2:]


def test_a_file_that_the_repository_lacks_is_named(hub, repository):
    (repository / "model-00002-of-00002.safetensors").unlink()
    for door in (amc.open_checkpoint, lambda name: amc.load_state_dict(name, rules=[])):
        with pytest.raises(CheckpointError, match=r"(?s)1 of 2 files .* missing.*model-00002-of-00002") as caught:
            door(NAME)
        assert NAME in str(caught.value)
    assert not of_weights(hub)


def test_a_repository_of_other_formats_is_refused_with_advice(hub, repository):
    for path in repository.iterdir():
        path.unlink()
    (repository / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="save_pretrained"):
        amc.open_checkpoint(NAME)


def test_opened_repository_is_read_by_range(hub, repository, tmp_path):
    checkpoint = amc.open_checkpoint(NAME)
    plan = amc.compile_plan(checkpoint, rules=[])
    buffers = {target.name: torch.full(target.shape, -1, dtype=torch.int32) for target in plan.targets}
    load_to_host(plan, checkpoint, buffers)
    assert {name: tensor.tolist() for name, tensor in buffers.items()} == {n: t.tolist() for n, t in TENSORS.items()}
    assert cached(tmp_path) == {"model.safetensors.index.json"}


def test_file_in_the_cache_is_read_from_there(hub, tmp_path):
    huggingface_hub.hf_hub_download(NAME, "model-00001-of-00002.safetensors")
    hub.requests.clear()
    loaded = amc.load_state_dict(NAME, rules=[])
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {n: t.tolist() for n, t in TENSORS.items()}
    assert {request.path.rpartition("/")[2] for request in of_weights(hub)} == {"model-00002-of-00002.safetensors"}


def test_memory_map_downloads_to_the_cache(hub, tmp_path):
    loaded = amc.load_state_dict(NAME, rules=[], memory_map=True)
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {n: t.tolist() for n, t in TENSORS.items()}
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= cached(tmp_path)


def test_load_stores_only_indexes(hub, repository, tmp_path):
    write_sharded(repository, "consolidated", {name: 2 * tensor for name, tensor in TENSORS.items()})
    save_file(TENSORS, repository / "model.fp32.safetensors")
    for name in ("pytorch_model.bin", "tokenizer.json", "original/model.safetensors"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"x")
    loaded = amc.load_state_dict(NAME, rules=[])
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {n: t.tolist() for n, t in TENSORS.items()}
    assert cached(tmp_path) == {"model.safetensors.index.json", "consolidated.safetensors.index.json"}
    assert {request.path.rpartition("/")[2] for request in of_weights(hub)} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_a_repository_with_one_file_needs_no_index(hub, repository, tmp_path):
    for path in repository.iterdir():
        path.unlink()
    save_file(TENSORS, repository / "model.safetensors")
    save_file(TENSORS, repository / "adapter_model.safetensors")
    assert sorted(amc.load_state_dict(NAME, rules=[])) == sorted(TENSORS)
    assert not cached(tmp_path)


def test_cached_repository_needs_no_network(hub, tmp_path, monkeypatch):
    huggingface_hub.snapshot_download(NAME)
    hub.requests.clear()
    assert not amc.open_checkpoint(NAME).is_remote
    assert not of_weights(hub)
    use(hub, tmp_path / "cache", monkeypatch, offline=True)
    hub.requests.clear()
    assert not amc.open_checkpoint(NAME).is_remote
    assert sorted(amc.load_state_dict(NAME, rules=[])) == sorted(TENSORS)
    amc.convert_checkpoint(NAME, tmp_path / "made", rules=[])
    assert not hub.requests


def test_uncached_repository_is_an_error_without_network(hub, tmp_path, monkeypatch):
    use(hub, tmp_path / "cache", monkeypatch, offline=True)
    with pytest.raises(CheckpointError, match=rf"(?s)neither a local path nor a repository.*{NAME}"):
        amc.open_checkpoint(NAME)
    use(hub, tmp_path / "cache", monkeypatch)
    amc.open_checkpoint(NAME)
    use(hub, tmp_path / "cache", monkeypatch, offline=True)
    for door in (amc.open_checkpoint, lambda name: amc.load_state_dict(name, rules=[])):
        with pytest.raises(CheckpointError, match=r"(?s)2 of 2 files.*missing.*model-00001-of-00002"):
            door(NAME)
    use(hub, tmp_path / "cache", monkeypatch)
    with pytest.raises(CheckpointError, match=r"(?s)2 of 2 files.*missing.*model-00001-of-00002"):
        amc.open_checkpoint(NAME, local_files_only=True)


def test_offline_conversion_without_tokenizer_is_an_error(hub, repository, tmp_path, monkeypatch):
    (repository / "tokenizer.json").write_text("{}")
    huggingface_hub.snapshot_download(NAME, allow_patterns="model*")
    use(hub, tmp_path / "cache", monkeypatch, offline=True)
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        amc.convert_checkpoint(NAME, tmp_path / "made", rules=[])
    assert not (tmp_path / "made").exists()


WRONG = {
    "layout": ({"layout": "numo"}, "unknown layout"),
    "source layout": ({"source_layout": "per-expert"}, "unknown layout"),
    "dtype": ({"dtype": torch.int8}, "not a floating dtype"),
    "dtype as text": ({"dtype": "bf16"}, "not a floating dtype"),
}
WRONG_CONVERSIONS = WRONG | {
    "drop": ({"drop": 3}, "not a pattern of names to drop"),
    "one of drop": ({"drop": ["a", 3]}, "not a pattern of names to drop"),
    "size": ({"max_shard_size": "much"}, "not a size"),
}


@pytest.mark.parametrize(("arguments", "text"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_of_a_load_are_found_before_a_download(hub, arguments, text):
    for load in (amc.load_state_dict, lambda path, **options: amc.load_model(torch.nn.Linear(2, 2), path, **options)):
        with pytest.raises(UnsupportedError, match=text):
            load(NAME, **arguments)
    assert not hub.requests


@pytest.mark.parametrize(("arguments", "text"), WRONG_CONVERSIONS.values(), ids=WRONG_CONVERSIONS)
def test_wrong_arguments_of_a_conversion_are_found_before_a_download(hub, tmp_path, arguments, text):
    with pytest.raises(UnsupportedError, match=text):
        amc.convert_checkpoint(NAME, tmp_path / "made", **({"rules": []} | arguments))
    assert not hub.requests
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_an_occupied_destination_is_found_before_a_download(hub, tmp_path, resume):
    (tmp_path / "made").mkdir()
    save_file(TENSORS, tmp_path / "made" / "model.safetensors")
    with pytest.raises(DestinationError, match="holds a checkpoint already"):
        amc.convert_checkpoint(NAME, tmp_path / "made", rules=[], resume=resume, max_shard_size=1000)
    assert not any(request.range is None for request in of_weights(hub))
    assert not cached(tmp_path) & {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_a_finished_conversion_of_a_repository_is_compared_although_the_cache_is_empty(
    hub, repository, tmp_path, monkeypatch
):
    amc.convert_checkpoint(repository, tmp_path / "made", rules=[])
    assert amc.convert_checkpoint(NAME, tmp_path / "made", rules=[]).was_complete
    use(hub, tmp_path / "other cache", monkeypatch)
    with pytest.raises(DestinationError, match="holds a checkpoint already"):
        amc.convert_checkpoint(NAME, tmp_path / "made", rules=[], dtype=torch.float16, drop=iter(["a"]))


def test_private_repository_requires_the_token(repository, tmp_path, monkeypatch):
    with serve({NAME: repository}, token="hf_right") as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        for token in ("hf_wrong", "hf_right"):
            monkeypatch.setenv("HF_TOKEN", token)
            if token == "hf_wrong":
                with pytest.raises(
                    CheckpointError, match=rf"(?s){NAME}.*GatedRepoError.*accept the conditions.*log in"
                ):
                    amc.open_checkpoint(NAME)
            else:
                assert amc.open_checkpoint(NAME).is_remote
                assert sorted(amc.load_state_dict(NAME, rules=[])) == sorted(TENSORS)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (
            {"path": "org/absent"},
            "check the path or the name; if the repository is private, log in with: hf auth login",
        ),
        ({"path": NAME, "revision": "v9"}, "check the revision"),
    ],
    ids=["repository", "revision"],
)
def test_advice_fits_what_the_hub_lacks(hub, arguments, advice):
    with pytest.raises(CheckpointError) as caught:
        amc.open_checkpoint(**arguments)
    text = caught.value.args[0]
    assert text.endswith(f"\n  do:       {advice}")
    assert len(text.splitlines()) == 4, text  # what, where, found, do


def test_missing_revision_is_named(hub):
    with pytest.raises(CheckpointError, match=rf"(?s){NAME}, revision v9.*RevisionNotFound"):
        amc.open_checkpoint(NAME, revision="v9")
    assert columns(amc.open_checkpoint(NAME, revision=hub.commit(NAME))) == columns(amc.open_checkpoint(NAME))


def test_name_of_the_repository_is_in_the_list_of_problems(hub, tmp_path):
    huggingface_hub.snapshot_download(NAME)
    for plan in (lambda: amc.load_state_dict(NAME, torch.nn.Linear(2, 2), rules=[]), lambda: of_a_file(tmp_path)):
        with pytest.raises(NameProblems, match=rf"do not fit together: {NAME} in /.*/snapshots/\w+\n"):
            plan()


def of_a_file(tmp_path):
    """Plan for a model, given the cached files of the repository."""
    [snapshot] = (tmp_path / "cache").glob("*/snapshots/*")
    return amc.compile_plan(snapshot, torch.nn.Linear(2, 2), rules=[])


def test_unreachable_server_is_an_error(repository, tmp_path, monkeypatch):
    with serve({NAME: repository}) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
    with pytest.raises(CheckpointError, match=rf"(?s){NAME}.*check the path, the network"):
        amc.open_checkpoint(NAME)


def old_error_class() -> type:
    """Return a class with the bases that HfHubHTTPError has in versions that use requests."""
    base = type("HTTPError", (OSError,), {"__module__": "requests.exceptions"})
    return type("HfHubHTTPError", (base,), {})


@pytest.mark.parametrize("error", [old_error_class(), type("HfHubHTTPError", (OSError,), {})], ids=["requests", "none"])
def test_old_huggingface_hub_is_an_error_that_names_the_version(hub, monkeypatch, error):
    monkeypatch.setattr("huggingface_hub.errors.HfHubHTTPError", error)
    texts = (
        r"(?s)huggingface_hub>=1\.23 is not installed.*neither httpx nor httpx2.*pip install 'huggingface_hub>=1\.23'"
    )
    with pytest.raises(CheckpointError, match=texts):
        amc.open_checkpoint(NAME)
    assert not hub.requests


def test_version_of_huggingface_hub_in_errors_is_that_of_the_extra():
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert f'hub = ["{_REQUIREMENT}"]' in project.read_text()


def test_a_converted_repository_has_the_tokenizer_and_the_model_of_the_source(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    from tests.model_zoo import build_model, write_checkpoint

    repository = tmp_path / "repository"
    write_checkpoint(build_model("mixtral"), repository)
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "all", "experts", "route"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = {"default": "{{ messages[0].content }} all", "tool_use": "route {{ tools }}"}
    tokenizer.save_pretrained(repository)
    assert (repository / "additional_chat_templates" / "tool_use.jinja").is_file()
    for name in ("LICENSE", "code/modeling_own.py"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("all rights")
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx", ".gitattributes"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"no")
    with serve({NAME: repository}) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        report = amc.convert_checkpoint(NAME, tmp_path / "made", max_shard_size=200_000)
    for ending in (".bin", ".pth", ".onnx", ".gitattributes"):
        assert not hub.requests_of(ending)
    configs = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    templates = {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert set(report.files_copied) == configs | templates | {"LICENSE", "code/modeling_own.py"}
    written = {p.relative_to(tmp_path / "made").as_posix(): p for p in (tmp_path / "made").rglob("*") if p.is_file()}
    assert set(written) == {*report.files, *report.files_copied, "model.safetensors.index.json"}
    for name in report.files_copied:
        assert written[name].read_bytes() == (repository / name).read_bytes()
    one, other = (transformers.AutoTokenizer.from_pretrained(d) for d in (repository, tmp_path / "made"))
    assert other.chat_template == one.chat_template == tokenizer.chat_template
    assert type(other) is type(one)
    assert other.get_vocab() == one.get_vocab()
    assert other("all experts route far").input_ids == one("all experts route far").input_ids == [3, 4, 5, 0]
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(d) for d in (repository, tmp_path / "made"))
    assert other.generation_config.to_dict() == one.generation_config.to_dict()
    assert_same(other.state_dict(), one.state_dict())
