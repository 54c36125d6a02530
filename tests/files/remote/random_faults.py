"""Loads from a server with random faults: what a schedule is, and what must hold after it."""

from __future__ import annotations

import gc
import os
import random
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.errors import ConversionError
from automodel_conv.files.remote import requests, web_files
from automodel_conv.files.source_options import SourceOptions
from automodel_conv.schedule import requests as schedule
from tests.comparing import assert_same
from tests.loopback_faults import PASSING, WRONG, Fault, Faults
from tests.loopback_store import serve

SECRET = "hidden-credential"
KINDS: dict[str, tuple[Fault, ...]] = {"passing": PASSING, "wrong": WRONG, "both": (*PASSING, *WRONG)}
LONGEST_SECONDS = 60.0
"""Much longer than a load takes; after it, a load hangs."""


@dataclass(frozen=True)
class Schedule:
    """One random choice of faults, of credentials and of the load."""

    seed: int
    kinds: str
    """Name of a tuple in ``KINDS``."""
    probability: float
    threads: int | None
    credentials: str
    opens_first: bool
    """Whether faults begin after the checkpoint has been opened once."""
    dtype: torch.dtype | None
    """Dtype of the targets; a cast reads through scratch."""

    @classmethod
    def of(cls, seed: int) -> Schedule:
        choose = random.Random(f"schedule {seed}")
        kinds = choose.choice(["passing", "passing", "both", "wrong"])
        return cls(
            seed,
            kinds,
            choose.choice([0.05, 0.2, 0.3] if kinds == "passing" else [0.02, 0.1]),
            choose.choice([None, 1, 3, 16]),
            choose.choice(["header", "query", "user", "none"]),
            choose.random() < 0.5,
            choose.choice([None, torch.bfloat16]),
        )


def write_checkpoint(folder: Path) -> None:
    """Write three files: of long, of many short, and of empty and single elements, with an index."""
    folder.mkdir()
    values = torch.Generator().manual_seed(0)
    files = {
        "long.safetensors": {"long": torch.randint(0, 255, (700_001,), generator=values, dtype=torch.uint8)},
        "many.safetensors": {
            f"many.{number}": torch.randn(37, 41, generator=values, dtype=torch.float32) for number in range(60)
        },
        "odd.safetensors": {"empty": torch.empty(0, 3), "one": torch.tensor([7], dtype=torch.uint8)},
    }
    weight_map = {}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    text = ", ".join(f'"{name}": "{file}"' for name, file in weight_map.items())
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{text}}}}}')
    (folder / "config.json").write_text('{"model_type": "none"}')


def make_short(patch: pytest.MonkeyPatch) -> None:
    """Make waits, pieces and requests short, so that a small checkpoint takes many of each."""
    patch.setattr(requests, "FIRST_WAIT_SECONDS", 0.001)
    patch.setattr(requests, "_MOST_WAIT_SECONDS", 0.01)
    patch.setattr(web_files, "_PIECE_BYTES", 20_000)
    patch.setattr(web_files, "SMALL_RANGE_BYTES", 5_000)
    patch.setattr(web_files, "_RECEIVED_BYTES", 15_000)
    patch.setattr(schedule, "SMALL_RANGE_BYTES", 5_000)
    patch.setattr(schedule, "LEAST_REQUEST_BYTES", 60_000)
    patch.setattr(schedule, "MOST_REQUEST_BYTES", 100_000)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return the result of a call, or raise its error; fail if it takes longer."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"the load has not ended after {seconds} seconds"
    if errors:
        raise errors.pop()
    return results[0]


def run_schedule(schedule: Schedule, published: Path, folder: Path, temporary: Path) -> str:
    """Load under a schedule; check bytes or error, and that nothing is left. Return "loaded" or the error.

    Args:
        schedule: the schedule.
        published: the checkpoint.
        folder: folder to make, for a copy of it that faults may change.
        temporary: the folder of temporary files.
    """
    shutil.copytree(published, folder)
    expected = amc.load_state_dict(published, rules=[], dtype=schedule.dtype)
    sockets, threads = open_sockets(), set(threading.enumerate())
    outcome = _load(schedule, folder, expected)
    assert_no_more_sockets(sockets)
    assert not {thread.name for thread in set(threading.enumerate()) - threads}
    assert not os.listdir(temporary)
    return outcome


def _load(schedule: Schedule, folder: Path, expected: dict[str, torch.Tensor]) -> str:
    faults = Faults.random(schedule.seed, schedule.probability, KINDS[schedule.kinds])
    settings: dict[str, Any] = {}
    query = ""
    if schedule.credentials == "header":
        settings["authorization"] = f"Bearer {SECRET}"
    elif schedule.credentials == "query":
        settings["query"] = f"signature={SECRET}"
        query = f"?{settings['query']}"
    user = f"user:{SECRET}@" if schedule.credentials == "user" else ""
    headers = {"Authorization": settings["authorization"]} if "authorization" in settings else {}
    with serve(folder, **settings) as server:
        url = server.url.replace("://", f"://{user}") + query
        options: SourceOptions = {"storage_options": {"headers": headers} if headers else None}
        if schedule.opens_first:
            amc.open_checkpoint(url, **options)
        server.faults = faults
        settings = {"dtype": schedule.dtype, "threads": schedule.threads, **options}
        try:
            loaded = within(LONGEST_SECONDS, partial(amc.load_state_dict, url, rules=[], **settings))
        except ConversionError as error:
            text = "".join(traceback.format_exception(error))
            assert SECRET not in text
            _assert_one_clear_error(schedule, error)
            return str(error)
        assert_same(loaded, expected)
        hosts = {one.host for one in server.requests if SECRET in repr(one.headers) or SECRET in one.query}
        assert hosts <= {"127.0.0.1"} or schedule.credentials == "query"  # a redirect names its own query
        return "loaded"


def _assert_one_clear_error(schedule: Schedule, error: ConversionError) -> None:
    text = str(error)
    assert text.count("where:") >= 1, text
    assert text.count("help:") == 1, text
    if schedule.kinds == "passing":
        assert "in a row failed" in text, text


def assert_no_more_sockets(before: int) -> None:
    """Check that no more sockets are open than before; a server's side may take a moment to close."""
    gc.collect()
    deadline = time.monotonic() + 10
    while open_sockets() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert open_sockets() <= before


def open_sockets() -> int:
    """Return the number of sockets that this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except FileNotFoundError:  # the descriptor that listed the folder
            pass
    return count
