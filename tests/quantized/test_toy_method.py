"""Tests of adding a quantization method: it is one file and a table entry."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.errors import QuantizationError, UnsupportedError
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import load_to_device
from automodel_conv.planning.code_names import CodeNames, has_codes, packed_dtypes
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.methods.table import METHODS
from automodel_conv.planning.quantization import arranged_plan, quantized_table
from automodel_conv.testing import assert_bytes_equal
from tests.execution.simulated import SimulatedDevice
from tests.kernels.test_code_tables import rounded
from tests.quantized.toy_method import TOY

TILE = 2, 12
CONFIG = {"quant_method": "toy", "style": "plain", "tile": list(TILE)}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, TOY.name, TOY)


def scaled(codes, values, steps):
    """Return float64 values of codes ``[rows, columns]``, one element at a time."""
    numbers = np.empty(codes.shape, np.float64)
    for row, column in np.ndindex(codes.shape):
        step = float(steps[row // TILE[0], column // TILE[1]])
        numbers[row, column] = values[codes[row, column]] * step
    return numbers


def weights(seed=0):
    """Return the tensors of two weights as the toy stores them, and their decoded values."""
    random = np.random.default_rng(seed)
    steps = [random.normal(size=size).astype(np.float32) for size in ((4, 3), (3, 2))]
    nibbles = random.integers(0, 16, (7, 36))
    packed = np.zeros((7, 3, 3), np.uint16)
    for row, column in np.ndindex(nibbles.shape):
        group, place = divmod(column, 12)
        packed[row, group, place // 4] |= np.uint16(nibbles[row, column] << (4 * (place % 4)))
    bytes_ = random.integers(0, 0x7F, (6, 20))  # positive values
    quads = np.zeros((6, 5), np.uint32)
    for row, column in np.ndindex(bytes_.shape):
        quads[row, column // 4] |= np.uint32(bytes_[row, column] << (8 * (column % 4)))
    fp8 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double().tolist()
    tensors = {
        "a.nibbles": torch.from_numpy(packed.view(np.int16)),
        "a.steps": torch.from_numpy(steps[0]),
        "a.note": torch.zeros(1),
        "b.weight_quads": torch.from_numpy(quads.view(np.int32)),
        "b.steps": torch.from_numpy(steps[1]),
        "norm": torch.ones(3, dtype=torch.bfloat16),
    }
    exact = {
        "a.weight": scaled(nibbles, [code - 8 for code in range(16)], steps[0]).T,
        "b.weight": scaled(bytes_, fp8, steps[1]),
        "norm": np.ones(3),
    }
    return tensors, exact


def write(directory, tensors, config=CONFIG):
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    return directory


def assert_decoded(state, exact, dtype):
    assert state.keys() == exact.keys()
    for name, tensor in state.items():
        assert_bytes_equal(tensor.contiguous(), rounded(np.ascontiguousarray(exact[name]), dtype))


@pytest.mark.parametrize("scratch_bytes", [None, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_its_files_are_decoded(tmp_path, dtype, scratch_bytes):
    tensors, exact = weights()
    state = amc.load_state_dict(write(tmp_path, tensors), rules=[], dtype=dtype, threads=1, scratch_bytes=scratch_bytes)
    assert_decoded(state, exact, dtype)


def test_its_files_are_decoded_on_a_device(tmp_path):
    tensors, exact = weights(1)
    checkpoint = amc.open_checkpoint(write(tmp_path, tensors))
    plan = arranged_plan(quantized_table(SourceTable.from_checkpoint(checkpoint), CONFIG))
    buffers = allocate(plan.targets)
    limits = {"threads": 2, "scratch_bytes": 16384, "device_scratch_bytes": 1 << 16}
    load_to_device(plan, checkpoint, buffers, SimulatedDevice(0), backend="torch", **limits)
    assert_decoded(buffers, exact, torch.bfloat16)


def test_its_codes_are_recognized_by_name(tmp_path):
    tensors = {name: tensor for name, tensor in weights()[0].items() if name.startswith("a.")}
    assert has_codes(SourceTable.from_checkpoint(amc.open_checkpoint(write(tmp_path, tensors)))) == "a.nibbles"
    names = CodeNames.of_all_methods()
    assert "a.steps" in names.scale_names("a.nibbles")
    assert "b.steps" in names.scale_names("b.weight_quads")
    assert "I16" in packed_dtypes()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"a.nibbles": torch.zeros(7, 3, 4, dtype=torch.int16)}, "[7, 3, 4], not [..., rows, groups, 3]"),
        ({"a.nibbles": torch.zeros(7, 9, dtype=torch.int16)}, "[7, 9], not [..., rows, groups, 3]"),
        ({"b.weight_quads": torch.zeros(5, dtype=torch.int32)}, "[5], not [..., rows, columns]"),
        ({"a.steps": torch.zeros(4, 2)}, "a.steps of a.weight [36, 7]: expected [4, 3], found [4, 2]"),
        ({"a.steps": None}, "a.nibbles has no scale: no tensor is named a.steps"),
        ({"a.steps": torch.zeros(4, 3, dtype=torch.int32)}, "a.steps is I32; these int4 codes have scales of"),
        ({"a.weight": torch.zeros(36, 7)}, "a.weight is stored in addition to its codes, a.nibbles"),
        ({"a.shuffle": torch.zeros(3)}, "a.weight is in an order of its own: a.shuffle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_its_files_are_named(tmp_path, changed, text):
    tensors = {name: tensor for name, tensor in (weights()[0] | changed).items() if tensor is not None}
    with pytest.raises(QuantizationError) as caught:
        amc.load_state_dict(write(tmp_path, tensors), rules=[])
    assert text in str(caught.value)
    assert "quantization method toy, 1 problems" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"tile": [2]}, QuantizationError, "quantization_config of method toy is malformed"),
        ({"tile": [2, 0]}, QuantizationError, "0 is not the size of a block or group"),
        ({"style": "fancy"}, UnsupportedError, "this quantization scheme is not supported: toy's fancy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_its_config_are_named(tmp_path, config, error, text):
    with pytest.raises(error) as caught:
        amc.load_state_dict(write(tmp_path, weights()[0], CONFIG | config), rules=[])
    assert text in str(caught.value)
