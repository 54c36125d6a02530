"""Tests of loads with ``memory_map=True``: the same tensors, on the bytes of the files, which no write changes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.compiling import opening
from automodel_conv.dtypes import BITS, dtype_code, torch_dtype
from automodel_conv.errors import ReadError, UnsupportedError, VerificationError
from automodel_conv.execution.mapping import file_range_of, group_ranges
from automodel_conv.files import system
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.comparing import assert_same
from tests.doors.memory_map.support import hashes, overwrite, total, write, write_by_hand
from tests.faults import descriptors, mapped_files

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux"),
    pytest.mark.filterwarnings("ignore"),
]

DTYPES = [torch_dtype(code) for code in BITS if torch_dtype(code) is not None]


def maps_of(directory: Path) -> int:
    return sum(path.startswith(f"{directory}{os.sep}") for path in mapped_files())


def test_mapped_tensors_of_every_dtype_and_shape_equal_read_ones(tmp_path):
    tensors = {}
    for dtype in DTYPES:
        for shape in ((), (1,), (3, 5), (4, 4), (2, 0, 3), (7, 1, 2)):
            if shape or dtype_code(dtype) != "F4":  # elements of half a byte
                tensors[f"{dtype}.{shape}"] = address_valued(shape, dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    before = hashes(tmp_path)
    mapped = amc.load_state_dict(tmp_path, rules=[], memory_map=True)
    read = amc.load_state_dict(tmp_path, rules=[])
    assert mapped.report.bytes_read == 0
    assert mapped.report.bytes_mapped == read.report.bytes_read == total(tensors)
    assert read.report.bytes_mapped == 0
    assert mapped.report.gb_per_s == 0
    assert mapped.report.peak_extra_bytes == 0
    assert list(mapped) == list(read)
    for name, tensor in tensors.items():
        assert_bytes_equal(mapped[name], tensor, strides=True)
        assert mapped[name].storage_offset() == 0
        assert mapped[name].untyped_storage().nbytes() == tensor.nbytes
        assert mapped[name]._base is None
    overwrite(mapped)
    assert hashes(tmp_path) == before
    assert_same(amc.load_state_dict(tmp_path, rules=[], memory_map=True), tensors)


def test_nothing_is_mapped_by_default(tmp_path):
    write(tmp_path, a=torch.ones(10_000))
    tensors = amc.load_state_dict(tmp_path, rules=[])
    assert (maps_of(tmp_path), tensors.report.bytes_mapped) == (0, 0)


def test_a_file_is_unmapped_with_its_last_tensor_and_holds_no_descriptor(tmp_path):
    write(tmp_path, a=torch.ones(5000), b=torch.ones(3))
    open_files = descriptors()
    tensors = dict(amc.load_state_dict(tmp_path, rules=[], memory_map=True))
    assert descriptors() == open_files
    view = tensors.pop("a")[10:20]
    assert maps_of(tmp_path) == 1
    tensors.clear()
    assert maps_of(tmp_path) == 1
    assert_bytes_equal(view, torch.ones(10))
    del view
    assert maps_of(tmp_path) == 0


@pytest.mark.parametrize("pad", range(5))
def test_unaligned_tensors_are_read(tmp_path, pad):
    """Use a file with an odd header, and a neighbour of an odd size."""
    a, b = torch.arange(10_000.0), torch.arange(77, dtype=torch.int16)
    wanted = {"a": a, "c": torch.ones(3, dtype=torch.int8), "b": b, "d": torch.tensor(2.0)}
    write_by_hand(tmp_path, pad, **wanted)
    loaded = amc.load_state_dict(tmp_path, rules=[], memory_map=True)
    checkpoint = amc.open_checkpoint(tmp_path)
    offsets = {name: checkpoint.offsets[row] for name, row in checkpoint.position.items()}
    odd = {name for name, tensor in wanted.items() if offsets[name] % tensor.element_size()}
    assert "b" in odd or "d" in odd or "a" in odd
    # One call reads all of them, and what is between them.
    ends = [offsets[name] + wanted[name].nbytes for name in odd]
    assert loaded.report.bytes_read == max(ends) - min(offsets[name] for name in odd)
    assert loaded.report.bytes_mapped == sum(wanted[name].nbytes for name in wanted.keys() - odd)
    assert_same(loaded, wanted)


def test_neighbours_share_a_mapping_without_overlaps(tmp_path):
    tensors = {f"{number:03}": torch.full((100,), float(number)) for number in range(30)}
    write_by_hand(tmp_path, 0, **tensors)
    checkpoint = amc.open_checkpoint(tmp_path)
    plan = amc.compile_plan(checkpoint, rules=[])
    places = [file_range_of(target, checkpoint) for target in plan.targets]
    for limit, count in ((400, 30), (1199, 15), (1200, 10), (12_000, 1), (1, 30)):
        spans = list(group_ranges(places[::-1], limit))
        assert len(spans) == count
        assert sorted(place.target.name for span in spans for place in span) == list(tensors)
    twice = list(group_ranges([*places, *places]))
    assert sum(map(len, twice)) == 60
    for span in twice:
        assert all(a.stop_bytes <= b.offset_bytes for a, b in pairwise(span))


def test_many_small_tensors_need_one_mapping(tmp_path):
    tensors = {f"{number:04}": torch.tensor([float(number)]) for number in range(5_000)}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = amc.load_state_dict(tmp_path, rules=[], memory_map=True)
    assert maps_of(tmp_path) == 1
    assert loaded.report.bytes_read == 0
    assert_same(loaded, tensors)


def test_truncated_file_is_one_error_that_names_the_tensor(tmp_path, monkeypatch):
    write(tmp_path, a=torch.ones(5000), b=torch.ones(5000))
    monkeypatch.setattr(system, "map_private", lambda *_: pytest.fail("mapped a file that is too short"))
    opened = opening.load_plan

    def cut(*args, **kwargs):
        os.truncate(tmp_path / "model.safetensors", 8 + 3 * 5000 * 2)
        return opened(*args, **kwargs)

    monkeypatch.setattr(opening, "load_plan", cut)
    open_files = descriptors()
    with pytest.raises(ReadError, match="too short to be mapped") as caught:
        amc.load_state_dict(tmp_path, rules=[], memory_map=True)
    assert "model.safetensors" in str(caught.value)
    assert re.search(r"targets:\n    b\n  do: .*copy or download it again$", caught.value.args[0])
    assert descriptors() == open_files


def test_file_that_cannot_be_mapped_is_one_error_with_advice(tmp_path, monkeypatch):
    write(tmp_path, a=torch.ones(50))

    def fails(*_):
        raise OSError(19, "No such device")

    monkeypatch.setattr(system, "map_private", fails)
    open_files = descriptors()
    with pytest.raises(ReadError, match="cannot be mapped") as caught:
        amc.load_state_dict(tmp_path, rules=[], memory_map=True)
    assert "memory_map=False reads it" in str(caught.value)
    assert descriptors() == open_files


def test_error_quotes_the_reason_of_the_system(tmp_path):
    path = str(write(tmp_path, a=torch.ones(50)) / "model.safetensors")
    with system.open_readonly(path) as file, pytest.raises(OSError, match="Invalid argument"):
        system.map_private(file.fileno(), 1, 10)


def test_all_tensors_are_read_on_other_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "can_map", lambda: False)
    loaded = amc.load_state_dict(write(tmp_path, a=torch.ones(50)), rules=[], memory_map=True)
    assert (loaded.report.bytes_mapped, loaded.report.bytes_read) == (0, 200)


def test_a_file_that_is_removed_or_replaced_stays_as_it_was_mapped(tmp_path):
    values = torch.arange(100_000.0)
    loaded = amc.load_state_dict(write(tmp_path, a=values), rules=[], memory_map=True)
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", a=-values)
    os.replace(tmp_path / "new" / "model.safetensors", tmp_path / "model.safetensors")
    assert_bytes_equal(loaded["a"], values)
    again = amc.load_state_dict(tmp_path, rules=[], memory_map=True)
    (tmp_path / "model.safetensors").unlink()
    assert_bytes_equal(again["a"], -values)
    assert_bytes_equal(loaded["a"], values)


def test_mapped_tensors_are_copied_pickled_and_shared_like_others(tmp_path):
    wanted = {"a": torch.arange(3000.0).reshape(30, 100), "b": torch.ones(500_000)}
    loaded = amc.load_state_dict(write(tmp_path, **wanted), rules=[], memory_map=True)
    a = loaded["a"]
    torch.save(a, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 2 * a.nbytes  # without other mapped tensors
    for other in (copy.deepcopy(a), pickle.loads(pickle.dumps(a)), torch.load(tmp_path / "a.pt"), a.clone()):
        assert_bytes_equal(other, wanted["a"], strides=True)
        other.zero_()
    assert_bytes_equal(a, wanted["a"])
    a.share_memory_()
    assert_bytes_equal(a, wanted["a"])


def test_checksums_of_mapped_tensors_are_verified(tmp_path):
    amc.save_checkpoint({"a": torch.ones(5000)}, tmp_path, rules=[], checksums=True)
    loaded = amc.load_state_dict(tmp_path, rules=[], memory_map=True, verify=True)
    assert loaded.report.bytes_mapped == 20_000
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(VerificationError):
        amc.load_state_dict(tmp_path, rules=[], memory_map=True, verify=True)


def test_a_budget_counts_mapped_targets_as_nothing(tmp_path):
    write(tmp_path, a=torch.ones(500_000))
    report = amc.load_state_dict(tmp_path, rules=[], memory_map=True, memory_budget=4096).report
    assert (report.peak_extra_bytes, report.pages) == (0, None)


def test_another_dtype_is_cast_and_not_mapped(tmp_path):
    write(tmp_path, a=torch.ones(50), b=torch.arange(3))
    loaded = amc.load_state_dict(tmp_path, rules=[], dtype=torch.bfloat16, memory_map=True)
    assert (loaded.report.bytes_mapped, loaded.report.bytes_read) == (24, 200)
    assert_same(loaded, {"a": torch.ones(50, dtype=torch.bfloat16), "b": torch.arange(3)})


def test_dtype_that_torch_lacks_is_refused_as_in_a_read(tmp_path):
    text = b'{"a":{"dtype":"F6_E2M3","shape":[8],"data_offsets":[0,6]}}'
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(6))
    with pytest.raises(UnsupportedError, match="does not support"):
        amc.load_state_dict(tmp_path, rules=[], memory_map=True)


def test_tensors_are_mapped_in_inference_mode_and_under_a_default_device(tmp_path):
    write(tmp_path, a=torch.ones(50))
    with torch.inference_mode():
        assert amc.load_state_dict(tmp_path, rules=[], memory_map=True)["a"].is_inference()
    with torch.device("meta"):
        tensor = amc.load_state_dict(tmp_path, rules=[], memory_map=True)["a"]
    assert_bytes_equal(tensor, torch.ones(50))


_TOUCH = """
import json, os, sys, torch
import automodel_conv as amc
from benchmarks.measure import mapped_pss

directory, children = sys.argv[1], []
touched, asked = os.pipe(), os.pipe()
for _ in range(2):
    if not os.fork():
        tensors = amc.load_state_dict(directory, rules=[], memory_map=True)
        total = int(tensors["a"][::512].sum())
        os.write(touched[1], b".")
        os.read(asked[0], 1)
        os.write(1, json.dumps([total, mapped_pss(directory)]).encode() + b"\\n")
        os.write(touched[1], b".")
        os.read(asked[0], 1)
        os._exit(0)
for _ in range(2):
    for _ in range(2):
        os.read(touched[0], 1)
    os.write(asked[1], b"..")
for _ in range(2):
    assert os.wait()[1] == 0
"""

_AT_EXIT = """
import atexit, os, sys

kept = []
atexit.register(lambda: os.write(1, str(int(kept[0].sum())).encode()))  # the first one is called last
import automodel_conv as amc
kept.append(amc.load_state_dict(sys.argv[1], rules=[], memory_map=True)["a"])
"""


def run(script: str, directory: Path) -> str:
    """Run a script in its own process; return its output."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path[1:]])}
    command = [sys.executable, "-c", script, str(directory)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_mapped_tensors_stay_valid_until_the_process_ends(tmp_path):
    assert run(_AT_EXIT, write(tmp_path, a=torch.ones(5000))) == "5000"


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="no /proc/self/smaps")
def test_two_processes_share_the_pages_of_a_mapped_file(tmp_path):
    values = torch.arange(8 << 20)  # 64 MiB
    write(tmp_path, a=values)
    outputs = [json.loads(line) for line in run(_TOUCH, tmp_path).splitlines()]
    assert len(outputs) == 2
    for total_of_touched, pss in outputs:
        assert total_of_touched == int(values[::512].sum())
        assert 0.45 * values.nbytes < pss < 0.55 * values.nbytes  # each process counts half of each shared page
