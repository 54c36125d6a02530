"""``dcp.load`` in one process: what is read, in which dtype, and what is refused. Many ranks: tests/distributed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("transformers", reason="the models are transformers'")

from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from automodel_conv.integrations.dcp import HuggingFaceReader
from automodel_conv.testing import POISON, assert_bytes_equal

pytestmark = pytest.mark.filterwarnings("ignore")


def test_tensors_are_cast_once_to_what_they_are_loaded_into(mixtral):
    model, published = mixtral
    state = {name: torch.empty_like(tensor, dtype=torch.float32) for name, tensor in model.state_dict().items()}
    dcp.load(state, storage_reader=HuggingFaceReader(published))
    for name, tensor in model.state_dict().items():
        assert_bytes_equal(state[name], tensor.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8, torch.int8], ids=str)
def test_codes_are_not_cast_to_what_they_are_loaded_into(tmp_path, dtype):
    codes = torch.full((4, 6), 2, dtype=torch.uint8).view(dtype)
    save_file({"a.weight": codes}, tmp_path / "model.safetensors")
    state = {"a.weight": torch.empty(4, 6, dtype=torch.bfloat16)}
    state["a.weight"].view(torch.uint8).fill_(POISON)
    with pytest.raises(CheckpointException, match="holds codes of a quantized tensor"):
        dcp.load(state, storage_reader=HuggingFaceReader(tmp_path, rules=[]))
    assert (state["a.weight"].view(torch.uint8) == POISON).all()
    state["a.weight"] = torch.zeros(4, 6, dtype=dtype)
    dcp.load(state, storage_reader=HuggingFaceReader(tmp_path, rules=[]))
    assert_bytes_equal(state["a.weight"], codes)
