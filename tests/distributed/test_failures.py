"""Tests of one failing rank: if it dies, cannot read or write, or passes different arguments, all ranks end in time."""

from __future__ import annotations

import os
import signal

import pytest

pytest.importorskip("transformers", reason="needs models of transformers")

import automodel_conv as amc
from tests.distributed.failures import TIMEOUT_S
from tests.distributed.models import assert_same_tensors, read_all
from tests.distributed.starting import run_suite

# Scenario and how the model is sharded -> the error of rank 1, or None if it is gone.
OF_TWO = {
    "killed in a load, fsdp": None,
    "gone in a load, experts": None,
    "cannot read, fsdp": "ReadError",
    "cannot read in place, experts": "ReadError",
    "cannot open, fsdp": "CheckpointError",
    "has other names, fsdp": "NameProblems",
    "has no checkpoint, experts": "CheckpointError",
    "has too little memory, fsdp": "ConversionError",
    "has no such device, fsdp": "UnsupportedError",
    "finds two values of one parameter, ": "ConversionError",
    "cannot compare, model": "ConversionError",
    "cannot compare, state dict": "ConversionError",
    "names no directory, fsdp": "UnsupportedError",
    "killed in a save, fsdp": None,
    "leader killed in a save, experts": "RankError",
    "cannot write, fsdp": "WriteError",
    "cannot write by dcp, fsdp": "RankError",
    "leader cannot begin, fsdp": "RankError",
    "leader cannot end, fsdp": "RankError",
    "holds other tensors, fsdp": "RankError",
    "holds other dtypes, experts": "RankError",
    "holds no part, ": "CoverageError",
}
OF_FOUR = {
    "killed in a load, fsdp over tensor": None,
    "killed before it sends, hsdp": None,
    "cannot read in place, hsdp": "ReadError",
    "cannot read, experts x fsdp": "ReadError",
    "cannot write, fsdp over tensor": "WriteError",
}
# Errors of rank 0 if it is the one that fails.
OF_LEADER = {
    "finds two values of one parameter": "ConversionError",
    "leader killed in a save": None,
    "leader cannot begin": "DestinationError",
    "leader cannot end": "WriteError",
    "holds other tensors": "RankError",
    "holds other dtypes": "RankError",
    "holds no part": "CoverageError",
}


@pytest.mark.parametrize(("world", "errors"), [(2, OF_TWO), (4, OF_FOUR)], ids=["2", "4"])
def test_all_ranks_end_with_an_error_in_time_and_unfinished_output_does_not_load(world, errors, tmp_path):
    wrong = []
    for variant, ended in run_suite("failures", world, tmp_path, list(errors)).items():
        try:
            check(variant, errors[variant], ended)
            if "save" in variant or "write" in variant or "leader" in variant:
                check_directory(variant, tmp_path)
        except AssertionError as error:
            wrong.append(f"{variant}: {error}\n" + "\n".join(f"rank {n}: {end}" for n, end in enumerate(ended)))
    assert not wrong, "\n\n".join(wrong)


def check(variant, of_rank_1, ended):
    scenario = variant.partition(", ")[0]
    wanted = {1: of_rank_1, 0: OF_LEADER.get(scenario, "RankError")}
    for number, end in enumerate(ended):
        error = wanted.get(number, "RankError")
        if error is None:
            assert end.code in (-signal.SIGKILL, 7)
            assert not end.results
            continue
        assert end.code == 0, "a rank did not exit with 0"
        assert end.results[0]["error"][0] == error
        assert "ConversionError" in end.results[0]["error"]
        text = end.results[0]["text"]
        if error == "RankError" and of_rank_1 not in (None, "RankError"):
            assert f"rank 1: {of_rank_1}" in text
            assert "failed on 1 of the participating ranks" in text
        if error == "RankError" and scenario.startswith("leader cannot"):
            assert f"rank 0: {wanted[0]}" in text
        if scenario.startswith("holds other"):
            assert "differ from rank to rank" in text
        if scenario == "holds no part":
            assert text.startswith("the ranks do not hold all of a, or divide it in different ways\n")
            assert "expected: 12 elements" in text
            assert "rank 0: 6 elements\n    rank 1: 12 elements" in text
        if scenario == "cannot read in place" and number == 1:
            assert "filled:" in text
        assert end.results[-1]["seconds"] < TIMEOUT_S


def check_directory(variant, tmp_path):
    """Check that no loader accepts the directory, and that the next save into it is whole."""
    directory = tmp_path / variant / "saved"
    scenario = variant.partition(", ")[0]
    if scenario.startswith("cannot write"):  # the scenario saved again
        assert_same_tensors(read_all(directory), read_all(tmp_path / "mixtral saved"))
        return
    files = [name for name in os.listdir(directory) if name.endswith((".safetensors", ".json"))]
    if scenario == "leader cannot begin":
        assert files == ["model.safetensors"]
        assert (directory / "model.safetensors").read_bytes() == b"somebody's"
        return
    assert files == []
    with pytest.raises(amc.CheckpointError):
        amc.open_checkpoint(directory)
    tensors = read_all(tmp_path / "mixtral saved")
    amc.save_checkpoint(tensors, directory, rules=[])
    assert_same_tensors(read_all(directory), tensors)
