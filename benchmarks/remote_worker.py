"""Loads of ``benchmarks.remote`` in a process of their own."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import automodel_conv as amc
from automodel_conv.planning.sharding import placed
from benchmarks import measure, memory
from benchmarks.peers.worker import variables as peers_variables
from benchmarks.remote_methods import CONNECTIONS, FILES, GROUPED, METHODS, NAMED, TRANSPOSED, Place, as_tensors
from benchmarks.remote_server import counts

RANKS = 4
_POLL_SECONDS = 0.002


def variables(urls: Mapping[str, str], huge_pages: bool, peers: str) -> dict[str, str]:
    """Return the environment variables of a process: where the libraries find the servers and the peers."""
    inherited = peers_variables("cold", huge_pages)
    return inherited | {
        "PYTHONPATH": os.pathsep.join([inherited["PYTHONPATH"], peers]),
        "HF_ENDPOINT": urls["hub"],
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "AWS_ENDPOINT_URL": urls["s3"],
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "RUNAI_STREAMER_OBJ_CONCURRENCY": str(CONNECTIONS),
        "RUNAI_STREAMER_LOG_LEVEL": "ERROR",
        "NO_PROXY": "*",
    }


def load(method: str, urls: Mapping[str, str], root: str, state: str) -> dict[str, Any]:
    """Load the small checkpoint, then the big one, and return the figures of the second load with a digest."""
    with tempfile.TemporaryDirectory(dir=root) as first, tempfile.TemporaryDirectory(dir=root) as second:
        METHODS[method].prepare(Place(urls, "small", os.path.join(root, "served", "small"), first))()
        directory = os.path.join(root, "served", "big")
        run = METHODS[method].prepare(Place(urls, "big", directory, second))
        memory.prepare(state, measure.file_bytes(directory))
        before = counts(urls["counts"])
        with measure.Measured() as measured:
            result = run()
        after = counts(urls["counts"])
        written = sum(
            path.stat().st_size for path in Path(second).rglob("*") if path.is_file() and not path.is_symlink()
        )
        tensors = as_tensors(result)
        nbytes = sum(tensor.nbytes for tensor in tensors.values()) if METHODS[method].allocates else 0
        return {
            **measured.result,
            **{name: after[name] - before[name] for name in after},
            "beyond_bytes": max(0, (measured.result["anonymous_bytes"] or 0) - nbytes),
            "written_bytes": written,
            "digest": measure.digest(tensors),
        }


def first_tensor(urls: Mapping[str, str], root: str) -> float:
    """Return the seconds from the call of ``load_model`` until one tensor of the model is in place."""
    directory = os.path.join(root, "served", "big")
    model = _meta_model(directory)
    loaded = amc.load_state_dict(directory, model)
    expected = {name: tensor for name, tensor in loaded.items() if tensor.nbytes < 1 << 20}
    del loaded
    model.to_empty(device="cpu")
    own = model.state_dict()
    for tensor in own.values():  # touched, so that the seconds are not those of new memory
        tensor.view(torch.uint8).fill_(0xA5)
    seconds: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not seconds and not done.wait(_POLL_SECONDS):
            if any(_equal(own[name], tensor) for name, tensor in expected.items()):
                seconds.append(time.perf_counter() - start)

    watcher = threading.Thread(target=watch)
    start = time.perf_counter()
    watcher.start()
    amc.load_model(model, f"{urls['files']}/big")
    done.set()
    watcher.join()
    return seconds[0] if seconds else time.perf_counter() - start


def _equal(tensor: Tensor, expected: Tensor) -> bool:
    return torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


def load_ranks(urls: Mapping[str, str], root: str) -> list[dict[str, int]]:
    """Load the parts of each rank, and return the bytes that the server sent and those that the rank owns."""
    from torch.distributed.tensor import Replicate, Shard

    url = f"{urls['files']}/big"
    plan = amc.compile_plan(url, _meta_model(os.path.join(root, "served", "big")))
    placements = {t.name: [Shard(0) if ".experts." in t.name else Replicate()] for t in plan.targets}
    results = []
    for rank in range(RANKS):
        own = {t.name: placed(t.shape, (RANKS,), (rank,), placements[t.name]) for t in plan.targets}
        before = counts(urls["counts"])
        tensors = amc.load_state_dict(url, plan=plan.shard(own))
        sent = counts(urls["counts"])["sent"] - before["sent"]
        results.append({"sent": sent, "owned_bytes": sum(tensor.nbytes for tensor in tensors.values())})
    return results


def expected_digests(directory: str) -> dict[str, str]:
    """Return the digests of what transformers and safetensors load from the files, by what methods end with."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    files = sorted(Path(directory).glob("*.safetensors"))
    grouped = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    turned = {_nemo_name(n): t.transpose(1, 2) if ".experts." in n else t for n, t in grouped.items()}
    named = {name: tensor for path in files for name, tensor in load_file(path).items()}
    whole = {path.name: torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8) for path in files}
    tensors = {GROUPED: grouped, TRANSPOSED: turned, NAMED: named, FILES: whole}
    return {kind: measure.digest(of) for kind, of in tensors.items()}


def _nemo_name(name: str) -> str:
    return name.replace("gate_up_proj", "gate_and_up_projs").replace("down_proj", "down_projs")


def _meta_model(directory: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
