"""Tests of the number of functions of this package between a public one and the call that moves bytes.

To follow a call down to its bytes, a reader reads one function after the other. These bounds show when one is added.
Lower a bound when you remove a function.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="the rules are for its models")

import automodel_conv as amc

PACKAGE = os.path.dirname(amc.__file__) + os.sep
# Calls that move bytes: those of the system, and copies of torch.
MOVES = {"preadv", "pwritev", "copy_file_range", "copy_", "native_channel_shuffle"}
EXPERTS, SIDE = 4, 32


@pytest.fixture(scope="module")
def rules():
    return amc.get_checkpoint_conversion_mapping("qwen3_moe")


@pytest.fixture(scope="module")
def tensors():
    experts = "model.layers.0.mlp.experts"
    names = [f"{experts}.{e}.{part}_proj.weight" for e in range(EXPERTS) for part in ("gate", "up", "down")]
    return {name: torch.full((SIDE, SIDE), at, dtype=torch.bfloat16) for at, name in enumerate(names)}


@pytest.fixture(scope="module")
def published(tmp_path_factory, tensors):
    directory = tmp_path_factory.mktemp("published")
    save_file(tensors, directory / "model.safetensors")
    return directory


def ways_down(work):
    """Return the longest chain of this package's functions down to each call that moves bytes, by name of the call."""
    longest: dict[str, list[str]] = {}

    def profile(frame, event, argument):
        if event == "c_call" and argument.__name__ in MOVES:
            way = []
            while frame is not None:
                if frame.f_code.co_filename.startswith(PACKAGE):
                    way.append(f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_code.co_name}")
                frame = frame.f_back
            longest[argument.__name__] = max(longest.get(argument.__name__, []), way[::-1], key=len)

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return longest


def refuse_longer(ways, **most):
    """Check the number of frames down to each call, including the public function, against its bound."""
    assert ways.keys() == most.keys()
    for name, way in ways.items():
        shown = "\n  ".join([*way, name])
        assert len(way) <= most[name], f"{len(way)} frames down to {name}, not {most[name]}; call fewer:\n  {shown}"


def load(published, rules, layout):
    plan = amc.compile_plan(published, rules=rules, layout=layout)
    return lambda: amc.load_state_dict(published, plan=plan, threads=1)


def test_frames_from_a_load_to_its_reads(published, rules):
    refuse_longer(ways_down(load(published, rules, None)), preadv=16)


def test_frames_from_a_load_to_its_copies(published, rules):
    refuse_longer(ways_down(load(published, rules, "nemo")), preadv=16, copy_=15)


def test_frames_from_a_conversion_in_memory_to_its_copies(tensors, rules):
    refuse_longer(ways_down(lambda: amc.convert_state_dict(tensors, rules=rules)), copy_=6)
    refuse_longer(ways_down(lambda: amc.convert_state_dict(tensors, rules=rules, layout="nemo")), copy_=7)


def test_frames_from_a_save_to_its_writes(tmp_path, tensors, rules):
    grouped = amc.convert_state_dict(tensors, rules=rules)
    ways = ways_down(lambda: amc.save_checkpoint(grouped, tmp_path / "saved", rules=rules, threads=1))
    refuse_longer(ways, pwritev=9)


def test_frames_from_a_conversion_of_files_to_its_reads_copies_and_writes(tmp_path, published, rules):
    def convert():
        amc.convert_checkpoint(published, tmp_path / "own", rules=rules, layout="nemo", threads=1)

    refuse_longer(ways_down(convert), preadv=14, copy_=12, pwritev=10)


def test_longer_chain_is_reported(published, rules, monkeypatch):
    from automodel_conv.files import system

    with pytest.raises(AssertionError, match=r"16 frames down to preadv, not 15; call fewer:\s+doors.py:called\s"):
        refuse_longer(ways_down(load(published, rules, None)), preadv=15)
    stock = system.preadv
    monkeypatch.setattr(system, "preadv", lambda fd, views, offset: stock(fd, views, offset))
    refuse_longer(ways_down(load(published, rules, None)), preadv=16)  # functions outside of the package do not count
