"""Tests of packed rows that end in padding, and of groups that do not divide them: only true columns are loaded."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs transformers, as compressed-tensors does")

from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch.distributed.tensor import Shard
from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import load_to_device
from automodel_conv.execution.host import load_to_host
from automodel_conv.planning.sharding import placed
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import tensors_of
from tests.execution.simulated import SimulatedDevice
from tests.kernels.test_code_tables import rounded
from tests.loopback_hub import serve, use
from tests.quantized.producers import INT4, compressed

BF16 = torch.bfloat16
# Rows, columns, and columns of a group; None: one scale covers a row.
SHAPES = [(16, 100, None), (3, 97, 32), (5, 101, 32), (2, 7, 8), (4, 1, None), (1, 33, 64), (8, 40, 32), (6, 9, 16)]


def settings(group, symmetric=True):
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return {"quantization_config": compressed("pack-quantized", **INT4, **strategy, symmetric=symmetric).config}


def packed(rows, columns, group, symmetric=True, seed=0):
    """Return the parts of a weight, packed by compressed-tensors, and its values in float64, element by element."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    groups = 1 if group is None else -(-columns // group)
    scales = torch.rand(rows, groups, generator=generator).to(BF16)
    zeros = torch.zeros(rows, groups, dtype=torch.int8)
    if not symmetric:
        zeros = torch.randint(-8, 8, (rows, groups), generator=generator, dtype=torch.int8)
    exact = np.empty((rows, columns))
    for row, column in np.ndindex(rows, columns):
        at = row, 0 if group is None else column // group
        exact[row, column] = (int(codes[row, column]) - int(zeros[at])) * float(scales[at])
    parts = {"_packed": pack_to_int32(codes, 4), "_scale": scales, "_shape": torch.tensor([rows, columns])}
    if not symmetric:
        parts["_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0)
    return parts, exact


def write(directory, config, **weights):
    directory.mkdir(exist_ok=True)
    tensors = {f"{name}.weight{suffix}": part for name, parts in weights.items() for suffix, part in parts.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("scratch_bytes", [None, 4096], ids=["default scratch", "little scratch"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES, ids=str)
def test_only_true_columns_are_decoded(tmp_path, rows, columns, group, symmetric, scratch_bytes):
    parts, exact = packed(rows, columns, group, symmetric)
    write(tmp_path, settings(group, symmetric), a=parts)
    for dtype in (BF16, torch.float32):
        loaded = amc.load_state_dict(tmp_path, rules=[], dtype=dtype, threads=1, scratch_bytes=scratch_bytes)
        assert_bytes_equal(loaded["a.weight"], rounded(exact, dtype))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(columns, rows, bias=False, dtype=BF16)})
    amc.load_model(model, tmp_path, rules=[])
    assert_bytes_equal(model["a"].weight.data, rounded(exact, BF16))


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES, ids=str)
def test_only_true_columns_are_decoded_on_a_device(tmp_path, rows, columns, group):
    parts, exact = packed(rows, columns, group)
    checkpoint = amc.open_checkpoint(write(tmp_path, settings(group), a=parts))
    plan = amc.compile_plan(checkpoint, rules=[])
    buffers = allocate(plan.targets)
    limits = {"threads": 2, "scratch_bytes": 16384, "device_scratch_bytes": 1 << 16}
    load_to_device(plan, checkpoint, buffers, SimulatedDevice(0), backend="torch", **limits)
    assert_bytes_equal(buffers["a.weight"], rounded(exact, BF16))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_merged_and_sharded_without_padding(tmp_path, transposed):
    each = [packed(6, 101, 32, seed=seed) for seed in range(4)]
    write(tmp_path, settings(32), **{f"experts.{expert}": parts for expert, (parts, _) in enumerate(each)})
    operations = [MergeModulelist(dim=0), *([Transpose(1, 2)] if transposed else [])]
    rules = [WeightConverter(["experts.*.weight"], ["experts.all"], operations)]
    expected = torch.stack([rounded(exact, BF16) for _, exact in each])
    expected = expected.transpose(1, 2).contiguous() if transposed else expected
    model = torch.nn.ModuleDict({"experts": torch.nn.Module()})
    model["experts"].all = torch.nn.Parameter(torch.empty_like(expected))
    amc.load_model(model, tmp_path, rules=rules)
    assert_bytes_equal(model["experts"].all.data, expected)
    checkpoint, plan = amc.open_checkpoint(tmp_path), amc.compile_plan(tmp_path, model, rules=rules)
    for coordinate in itertools.product(range(2), range(3)):
        region = placed(expected.shape, (2, 3), coordinate, (Shard(0), Shard(2)))
        mine = plan.shard({"experts.all": region})
        buffers = allocate(mine.targets)
        load_to_host(mine, checkpoint, buffers, threads=1, scratch_bytes=None)
        part = expected
        for dim, runs in enumerate(region.runs):
            index = [at for start, length in runs for at in range(start, start + length)]
            part = part.index_select(dim, torch.tensor(index))
        assert_bytes_equal(buffers["experts.all"], part)


def test_conversions_write_true_columns_or_the_codes_as_they_are(tmp_path):
    parts, exact = packed(5, 101, 32)
    write(tmp_path / "source", settings(32), a=parts)
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "values", rules=[], dequantize=True)
    assert_bytes_equal(tensors_of(tmp_path / "values")["a.weight"], rounded(exact, BF16))
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "codes", rules=[])
    for name, tensor in load_file(tmp_path / "source" / "model.safetensors").items():
        assert_bytes_equal(tensors_of(tmp_path / "codes")[name], tensor)


def test_downloaded_files_tell_what_headers_do_not(tmp_path):
    parts, exact = packed(16, 100, None)
    source = write(tmp_path / "source", settings(None), a=parts)
    with serve({"org/name": source}) as hub, pytest.MonkeyPatch.context() as patch:
        use(hub, tmp_path / "cache", patch)
        plan = amc.compile_plan("org/name", rules=[])
        assert plan.targets[0].shape == (16, 104)
        assert_bytes_equal(amc.load_state_dict("org/name", rules=[])["a.weight"], rounded(exact, BF16))
        with pytest.raises(amc.NameProblems, match=r"in another form(.|\n)*100 columns"):
            amc.load_state_dict("org/name", plan=plan)


def test_plan_in_json_has_the_true_columns(tmp_path):
    parts, exact = packed(5, 101, 32)
    write(tmp_path, settings(32), a=parts)
    text = amc.compile_plan(tmp_path, rules=[]).to_json()
    assert_bytes_equal(amc.load_state_dict(tmp_path, plan=text)["a.weight"], rounded(exact, BF16))


def test_groups_that_do_not_divide_the_columns_need_the_true_shape(tmp_path):
    parts, _ = packed(5, 101, 32)
    del parts["_shape"]
    write(tmp_path, settings(32), a=parts)
    with pytest.raises(amc.QuantizationError, match=r"104 columns, .* groups of 32: no tensor a\.weight_shape"):
        amc.load_state_dict(tmp_path, rules=[])
